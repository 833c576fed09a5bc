"""OverLoCK in timm: `import torch_impl.plugins.timm` registers the five variants.

    model = timm.create_model("overlock_xt", num_classes=10)
    maps = timm.create_model("overlock_xt", features_only=True)

A timm model returns logits in training too, which is what timm's train.py gives its loss. So this
one has no auxiliary head, whose parameters would never get a gradient; the paper's training, with
the auxiliary loss, is torch_impl/train.py. Initial weights and all other state-dict keys are those
of torch_impl.models. TorchScript and torch.fx cannot take it: ContMix asks for the map's size.

Nothing is downloaded. Weights come from a file, an official one or a checkpoint of train.py:
`checkpoint_path=...` for the same number of classes, else `pretrained=True` together with
`pretrained_cfg_overlay=dict(file=...)`, and in it `num_classes=...` if the file has not 1000.
"""

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn
from torch.nn.functional import dropout
from ..models import VARIANTS, OverLoCK

# The maps that OverLoCK.features returns: the module that each comes from, and its stride.
FEATURES = (("blocks1", 4), ("blocks2", 8), ("sub_blocks3", 16), ("sub_blocks4", 32))


class TimmOverLoCK(OverLoCK):
    """timm's interface of OverLoCK: (B, in_chans, H, W) -> logits (B, num_classes).

    num_classes=0 gives the pooled features (B, head_hidden_size), global_pool="" leaves the
    pooling out and gives (B, head_hidden_size or num_classes, H/32, W/32).

    Args:
        projection: as OverLoCK's, the channels before the classifier (`head_hidden_size`)
        num_classes: as OverLoCK's
        global_pool: "avg" or ""
        drop_rate: probability of dropout before the classifier
        kwargs: of OverLoCK
    Raises:
        ValueError: for any other global_pool.
    """

    def __init__(self, projection, num_classes=1000, global_pool="avg", drop_rate=0.0, **kwargs):
        super().__init__(projection=projection, num_classes=num_classes, **kwargs)
        del self.aux_head
        self.drop_rate = drop_rate
        self.num_features = self.feature_dims[3]
        self.head_hidden_size = projection
        self.feature_info = [
            dict(num_chs=dim, reduction=stride, module=module)
            for dim, (module, stride) in zip(self.feature_dims, FEATURES)
        ]
        self.set_global_pool(global_pool)

    def set_global_pool(self, global_pool):
        if global_pool not in ("avg", ""):
            raise ValueError(f'global_pool is "avg" or "" for OverLoCK, not {global_pool!r}')
        self.global_pool = global_pool
        self.head[3] = nn.AdaptiveAvgPool2d(1) if global_pool else nn.Identity()

    def get_classifier(self):
        return self.head[4]

    def reset_classifier(self, num_classes, global_pool=None):
        """A new classifier, or none if num_classes is 0; global_pool=None keeps the pooling."""
        self.num_classes = num_classes
        self.head[4] = nn.Identity()
        if num_classes > 0:
            classifier = nn.Conv2d(self.head_hidden_size, num_classes, kernel_size=1)
            nn.init.normal_(classifier.weight, std=0.02)
            nn.init.zeros_(classifier.bias)
            self.head[4] = classifier.to(self.head[0].weight)
        if global_pool is not None:
            self.set_global_pool(global_pool)

    def forward_features(self, x):
        """(B, in_chans, H, W) -> (B, num_features, H/32, W/32)."""
        return self.stages(x)[4]

    def forward_head(self, x, pre_logits=False):
        """(B, num_features, H/32, W/32) -> logits, or what the classifier gets."""
        x = dropout(self.head[:4](x), self.drop_rate, self.training)
        x = x if pre_logits else self.head[4](x)
        return x.flatten(1) if self.global_pool else x  # (B, C, 1, 1) -> (B, C)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x,
        indices=None,
        norm=False,
        stop_early=False,
        output_fmt="NCHW",
        intermediates_only=False,
    ):
        """The maps of `features` that `indices` names (None: all; n: the last n), as a list.

        With the output of forward_features before them, unless intermediates_only. There is no
        final norm to apply, and stop_early saves nothing: all four maps are always computed. Raises
        ValueError if output_fmt is not "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f'output_fmt is "NCHW" for OverLoCK, not {output_fmt!r}')
        take, _ = feature_take_indices(len(self.feature_info), indices)
        maps = self.features(x)
        intermediates = [maps[i] for i in take]
        return intermediates if intermediates_only else (maps[3], intermediates)

    def prune_intermediate_layers(self, indices=1, prune_norm=False, prune_head=True):
        """Take the head away. All else stays: the maps need one another. Returns the indices."""
        take, _ = feature_take_indices(len(self.feature_info), indices)
        if prune_head:
            self.num_classes = 0
            self.head = nn.Identity()
        return take

    def set_grad_checkpointing(self, enable=True):
        """Not there: a block run twice would move its BatchNorms' statistics twice."""
        if enable:
            raise NotImplementedError("OverLoCK has no gradient checkpointing")

    def group_matcher(self, coarse=False):
        """timm's regular expressions for layer-wise learning rates, in the order of the network.

        A group is a block with what leads into it, or, if `coarse`, a stage.
        """
        block, first = ("", None) if coarse else (r"\.(\d+)", (0,))

        def stage(entry, blocks):
            return [(rf"^{entry}", first), (rf"^{blocks}{block}", None)]

        return dict(
            stem=r"^patch_embed1",
            base1=rf"^blocks1{block}",
            base2=stage("patch_embed2", "blocks2"),
            base3=stage("patch_embed3", "blocks3"),
            overview=stage("patch_embed4", "blocks4"),
            focus3=stage("high_level_proj", "sub_blocks3"),
            focus4=stage("patch_embedx", "sub_blocks4"),
        )

    def no_weight_decay(self):
        """Names of all parameters but the convolutions' weights.

        timm by itself leaves out those of one axis alone, as upstream did in its training: GRN,
        LayerScale and the position biases, which have more, were decayed there.
        """
        modules = self.named_modules()
        decayed = {f"{name}.weight" for name, module in modules if isinstance(module, nn.Conv2d)}
        return {name for name, _ in self.named_parameters()} - decayed

    def load_state_dict(self, state_dict, *args, **kwargs):
        """As torch.nn.Module's; takes any file that checkpoint_filter_fn knows."""
        return super().load_state_dict(checkpoint_filter_fn(state_dict), *args, **kwargs)


def checkpoint_filter_fn(state_dict, model=None):
    """The weights of an official state dict or of a checkpoint of train.py, without the aux head.

    train.py's keys begin with "model.", beside "optimizer.".
    """
    if any(key.startswith("model.") for key in state_dict):
        state_dict = {
            key.removeprefix("model."): value
            for key, value in state_dict.items()
            if key.startswith("model.")
        }
    return {k: value for k, value in state_dict.items() if not k.startswith("aux_head.")}


def cfg(crop_pct):
    """timm's description of the weights: upstream's input, on ImageNet-1K."""
    return dict(
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=crop_pct,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="patch_embed1.0",
        classifier="head.4",
        paper_ids="arXiv:2502.20087",
        origin_url="https://github.com/LMMMEng/OverLoCK",
    )


# upstream's models/overlock.py; XXT, which is not upstream's, as XT
default_cfgs = generate_default_cfgs(
    {
        "overlock_xxt": cfg(crop_pct=0.925),
        "overlock_xt": cfg(crop_pct=0.925),
        "overlock_t": cfg(crop_pct=0.95),
        "overlock_s": cfg(crop_pct=0.95),
        "overlock_b": cfg(crop_pct=0.975),
    }
)


def create(variant, pretrained, **kwargs):
    return build_model_with_cfg(
        TimmOverLoCK,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"),
        **{**VARIANTS[variant], **kwargs},
    )


@register_model
def overlock_xxt(pretrained=False, **kwargs):
    return create("overlock_xxt", pretrained, **kwargs)


@register_model
def overlock_xt(pretrained=False, **kwargs):
    return create("overlock_xt", pretrained, **kwargs)


@register_model
def overlock_t(pretrained=False, **kwargs):
    return create("overlock_t", pretrained, **kwargs)


@register_model
def overlock_s(pretrained=False, **kwargs):
    return create("overlock_s", pretrained, **kwargs)


@register_model
def overlock_b(pretrained=False, **kwargs):
    return create("overlock_b", pretrained, **kwargs)
