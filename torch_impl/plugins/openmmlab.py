"""OverLoCK as a backbone of OpenMMLab's detectors and segmenters, by mmengine's registry.

    custom_imports = dict(imports=["torch_impl.plugins.openmmlab"])
    model = dict(
        backbone=dict(
            type="OverLoCK",
            variant="overlock_t",
            drop_path_rate=0.2,
            init_cfg=dict(type="Pretrained", checkpoint="overlock_t_in1k_224.pth"),
        ),
        neck=dict(type="FPN", in_channels=[64, 128, 384, 640]),
    )

The state-dict keys are OverLoCK's, without the two heads. (Upstream's own backbone for detection
adds a LayerNorm after each map, and a projection of the overview to the last; this one does not.)
"""

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch.nn.modules.batchnorm import _BatchNorm
from ..checkpoint import HEADS
from ..models import VARIANTS, OverLoCK
from ..weights import read_weights

# What frozen_stages freezes: the first n + 1 of these. From the third stage on, all that a map is
# made from.
STAGES = (
    ("patch_embed1",),
    ("blocks1",),
    ("patch_embed2", "blocks2"),
    ("patch_embed3", "blocks3", "patch_embed4", "blocks4", "high_level_proj", "sub_blocks3"),
    ("patch_embedx", "sub_blocks4"),
)


@MODELS.register_module(name="OverLoCK")
class OverLoCKBackbone(OverLoCK, BaseModule):
    """(B, in_chans, H, W) -> a tuple of maps (B, feature_dims[i], H/2**(i+2), W/2**(i+2)).

    Args:
        variant: "overlock_xxt", "overlock_xt", "overlock_t", "overlock_s" or "overlock_b"
        out_indices: which of the four maps, 0 to 3
        frozen_stages: -1 freezes nothing, 0 the stem, 1 to 4 also all that the first so many maps
            are made from; frozen parts are in evaluation mode and get no gradient
        norm_eval: whether BatchNorm keeps its statistics in training
        init_cfg: mmengine's. Of dict(type="Pretrained", checkpoint=PATH), PATH is a local file that
            weights.py reads, a classifier's or a detector's
        kwargs: of OverLoCK, such as drop_path_rate
    Raises:
        ValueError: if variant, out_indices or frozen_stages is none of these.
    """

    def __init__(
        self,
        variant,
        out_indices=(0, 1, 2, 3),
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,
        **kwargs,
    ):
        if variant not in VARIANTS:
            raise ValueError(f"variant {variant!r} is none of {', '.join(VARIANTS)}")
        if not set(out_indices) <= {0, 1, 2, 3} or frozen_stages not in range(-1, 5):
            raise ValueError(
                f"out_indices {tuple(out_indices)}, frozen_stages {frozen_stages}: give indices "
                "from 0 to 3, and -1 to 4 stages"
            )
        super().__init__(**VARIANTS[variant], num_classes=0, **kwargs)
        # Parameters without a gradient would stop distributed training.
        for name in HEADS:
            delattr(self, name)
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.init_cfg = init_cfg
        self.train()

    def init_weights(self, seed=None):
        """Draw the weights by `seed`, as OverLoCK's constructor does; without it, as init_cfg says.

        A Pretrained checkpoint is not left to mmengine, which would execute what a pickle says and
        only warn of keys that do not fit. Raises InputError if the file holds no OverLoCK,
        RuntimeError if it is one of another variant.
        """
        if seed is not None:
            OverLoCK.init_weights(self, seed)
        elif is_pretrained(self.init_cfg):
            arrays = read_weights(self.init_cfg["checkpoint"]).arrays
            weights = {key: torch.tensor(value) for key, value in arrays.items()}
            self.load_state_dict(
                {key: value for key, value in weights.items() if key.split(".")[0] not in HEADS}
            )
            self.is_init = True
        else:
            BaseModule.init_weights(self)

    def train(self, mode=True):
        super().train(mode)
        for names in STAGES[: self.frozen_stages + 1]:
            for name in names:
                getattr(self, name).eval().requires_grad_(False)
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, x):
        maps = self.features(x)
        return tuple(maps[i] for i in self.out_indices)


def is_pretrained(init_cfg):
    return isinstance(init_cfg, dict) and init_cfg.get("type") == "Pretrained"
