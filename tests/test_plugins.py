"""OverLoCK in timm's registry and in mmengine's, tested with these libraries themselves."""

import sys
from pathlib import Path

import numpy as np
import pytest
from under_test import NAME

if NAME != "torch":
    pytest.skip("plugins are for PyTorch's libraries", allow_module_level=True)

import torch
from torch import nn
from torch_impl import models
from torch_impl.checkpoint import model_arrays, save_checkpoint
from torch_impl.errors import InputError

timm = pytest.importorskip("timm")
registry = pytest.importorskip("mmengine.registry")
timm_models = pytest.importorskip("timm.models")
timm_optim = pytest.importorskip("timm.optim")

from mmengine.model import BaseModule  # noqa: E402
from torch_impl.plugins import openmmlab  # noqa: E402
from torch_impl.plugins import timm as plugin  # noqa: E402

CROPS = {
    "overlock_xxt": 0.925,
    "overlock_xt": 0.925,
    "overlock_t": 0.95,
    "overlock_s": 0.95,
    "overlock_b": 0.975,
}
variants = pytest.mark.parametrize("variant", models.VARIANTS)


def normal(*shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape)
    return torch.from_numpy(values.astype(np.float32))


def xxt(**kwargs):
    return timm.create_model("overlock_xxt", **kwargs)


def backbone(**kwargs):
    return registry.MODELS.build(dict(type="OverLoCK", variant="overlock_xxt", **kwargs))


def without_heads(state):
    return {key: value for key, value in state.items() if key.split(".")[0] not in openmmlab.HEADS}


def equal(state, other):
    return state.keys() == other.keys() and all(
        torch.equal(state[key], other[key]) for key in state
    )


def no_gradient(model):
    return {name for name, parameter in model.named_parameters() if parameter.grad is None}


def save(path, model):
    """A checkpoint of train.py, after no step of training."""
    names, parameters = zip(*model.named_parameters())
    optimizer = torch.optim.AdamW([dict(params=parameters, names=names)])
    run = dict(epoch=0, step=0, best_top1=0.0, args={}, data={}, history=[])
    save_checkpoint(path, model, optimizer, None, run)
    return str(path)


def save_official(path, model):
    """A .pth as the official release is."""
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, path)
    return str(path)


def test_the_plugin_named_timm_imports_the_installed_timm():
    assert Path(timm.__file__).parent.name == "timm" and sys.modules["timm"] is timm
    assert plugin.build_model_with_cfg is timm_models.build_model_with_cfg
    assert plugin.__name__ == "torch_impl.plugins.timm"


def test_five_variants_are_registered():
    assert set(timm.list_models("overlock*")) == set(models.VARIANTS)
    assert timm.list_models("overlock*", pretrained=True) == []


@variants
def test_a_timm_model_is_what_its_pretrained_cfg_says(variant):
    """Input size, pool size, names of the first and last layer; every form that a head may take."""
    model = timm.create_model(variant).eval()
    cfg, state = model.pretrained_cfg, model.state_dict()
    assert cfg["crop_pct"] == CROPS[variant] and cfg["interpolation"] == "bicubic"
    data = timm.data.resolve_model_data_config(model)
    assert data["mean"] == timm.data.IMAGENET_DEFAULT_MEAN
    assert data["std"] == timm.data.IMAGENET_DEFAULT_STD
    assert data["input_size"] == (3, 224, 224)
    assert state[f"{cfg['first_conv']}.weight"].shape[1] == 3
    assert state[f"{cfg['classifier']}.weight"].shape[0] == cfg["num_classes"] == model.num_classes
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])

    projection, pool_size = model.head_hidden_size, cfg["pool_size"]
    with torch.no_grad():
        features = model.forward_features(normal(1, *cfg["input_size"]))
        assert features.shape == (1, model.num_features, *pool_size)
        pooled = model.forward_head(features, pre_logits=True)
        logits = model.forward_head(features)
        assert pooled.shape == (1, projection) and logits.shape == (1, 1000)
        assert torch.isfinite(logits).all()
        model.reset_classifier(10)
        assert model.forward_head(features).shape == (1, 10) and model.num_classes == 10
        model.reset_classifier(0)
        assert torch.equal(model.forward_head(features), pooled) and model.num_classes == 0
        model.reset_classifier(0, "")
        assert model.forward_head(features).shape == (1, projection, *pool_size)


def test_a_timm_model_without_classifier_and_pooling():
    with torch.no_grad():
        images = normal(2, 3, 64, 96)
        assert xxt(num_classes=0).eval()(images).shape == (2, 256)
        assert xxt(num_classes=0, global_pool="").eval()(images).shape == (2, 256, 2, 3)
        assert xxt(num_classes=5, global_pool="").eval()(images).shape == (2, 5, 2, 3)
    with pytest.raises(ValueError, match="not 'max'"):
        xxt(global_pool="max")


def test_a_timm_model_computes_what_overlock_computes():
    """The same weights from the same seed, the same logits; it lacks the auxiliary head alone."""
    model, expected = xxt(num_classes=10).eval(), models.overlock_xxt(num_classes=10).eval()
    official = {key: v for key, v in expected.state_dict().items() if not key.startswith("aux_")}
    assert equal(model.state_dict(), official)
    images = normal(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), expected(images))
        model.reparam()
        assert torch.allclose(model(images), expected(images), rtol=1e-4, atol=1e-6)


def test_a_timm_model_trains_on_logits_and_every_parameter_has_a_gradient():
    model = xxt(num_classes=42, in_chans=1, drop_path_rate=0.0).train()
    logits = model(normal(2, 1, 64, 64))
    assert logits.shape == (2, 42)
    logits.mean().backward()
    assert no_gradient(model) == set()


def test_drop_rates_of_a_timm_model():
    model = xxt(drop_path_rate=0.2, drop_rate=0.5)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, models.DropPath)]
    assert min(rates) == 0 and max(rates) == pytest.approx(0.2)
    features = normal(2, model.num_features, 2, 2)
    model.train()
    dropped = (model.forward_head(features, pre_logits=True) == 0).float().mean()
    assert 0.4 < dropped < 0.6
    model.eval()
    assert not (model.forward_head(features, pre_logits=True) == 0).any()


@pytest.mark.parametrize("out_indices", [None, (0, 1, 2, 3), (1, 3), (-1,), 2])
def test_timm_features_only(out_indices):
    images, full = normal(2, 3, 96, 64), models.overlock_xxt().eval()
    model = xxt(features_only=True, out_indices=out_indices).eval()
    with torch.no_grad():
        maps, expected = model(images), full.features(images)
    indices = range(4) if out_indices is None else out_indices
    indices = (2, 3) if out_indices == 2 else indices
    expected = [expected[i] for i in indices]
    assert len(maps) == len(expected)
    assert all(torch.equal(*pair) for pair in zip(maps, expected))
    assert model.feature_info.channels() == [m.shape[1] for m in maps]
    assert model.feature_info.reduction() == [96 // m.shape[2] for m in maps]
    modules = dict(model.model.named_modules())
    assert all(name in modules for name in model.feature_info.module_name())


def test_every_parameter_of_timm_features_has_a_gradient():
    model = xxt(features_only=True).train()
    sum(m.mean() for m in model(normal(2, 3, 64, 64))).backward()
    assert no_gradient(model) == set()


def test_timm_forward_intermediates():
    model, images = xxt().eval(), normal(1, 3, 64, 64)
    with torch.no_grad():
        last, maps = model.forward_intermediates(images)
        assert torch.equal(last, model.forward_features(images)) and len(maps) == 4
        (third,) = model.forward_intermediates(images, indices=[2], intermediates_only=True)
        assert torch.equal(third, maps[2])
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(images, output_fmt="NLC")


def test_weights_of_a_file_in_timm(tmp_path):
    """An official .pth and a checkpoint of train.py, by checkpoint_path and by pretrained."""
    trained = models.overlock_xxt(num_classes=20, seed=3).eval()
    official = models.overlock_xxt(num_classes=1000, seed=4).eval()
    images = normal(2, 3, 64, 64)
    with torch.no_grad():
        path = save(tmp_path / "last.safetensors", trained)
        model = xxt(num_classes=20, checkpoint_path=path).eval()
        assert torch.equal(model(images), trained(images))
        overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=path, num_classes=20))
        assert torch.equal(xxt(**overlay).eval()(images), trained(images))
        path = save_official(tmp_path / "overlock.pth", official)
        overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=path))
        assert torch.equal(xxt(**overlay).eval()(images), official(images))
        maps = xxt(**overlay, features_only=True).eval()(images)
        assert all(torch.equal(*pair) for pair in zip(maps, official.features(images)))
        # Another number of classes keeps the initial classifier, one channel sums the three.
        model = xxt(**overlay, num_classes=5, in_chans=1).eval()
        assert model(images[:, :1]).shape == (2, 5)
        summed = official.patch_embed1[0].weight.sum(1, keepdim=True)
        assert torch.allclose(model.patch_embed1[0].weight, summed, atol=1e-7)
        assert torch.equal(model.head[0].weight, official.head[0].weight)
    with pytest.raises(RuntimeError, match="Missing key"):
        timm.create_model("overlock_xt", checkpoint_path=path)
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        xxt(pretrained=True)


@pytest.mark.parametrize("coarse, groups", [(False, 11), (True, 8)])
def test_timm_layer_groups_follow_the_network(coarse, groups):
    """The stem, the blocks or stages in the order of the forward pass, then the head."""
    model = xxt()
    layer = timm_models.group_parameters(model, model.group_matcher(coarse), reverse=True)
    assert set(layer) == {name for name, _ in model.named_parameters()}
    assert set(layer.values()) == set(range(groups))
    order = ["patch_embed1.0", "blocks1.0", "blocks2.0", "blocks3.0", "blocks3.1", "blocks4.0"]
    order += ["sub_blocks3.0", "sub_blocks3.1", "sub_blocks3.2", "sub_blocks4.0", "head.0"]
    ids = [{i for name, i in layer.items() if name.startswith(f"{part}.")} for part in order]
    assert all(len(group) == 1 for group in ids)
    ids = [group.pop() for group in ids]
    assert ids == sorted(ids) and ids[0] == 0 and ids[-1] == groups - 1
    assert layer["patch_embed2.0.weight"] == layer["blocks2.0.dwconv.weight"]
    assert layer["high_level_proj.weight"] == layer["sub_blocks3.0.dwconv1.weight"]
    assert layer["patch_embedx.h_proj.0.weight"] == layer["sub_blocks4.0.dwconv1.weight"]


def test_timm_decays_the_weights_of_convolutions_alone():
    model = xxt()
    convolutions = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    optimizer = timm_optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(weight) for weight in convolutions}
    assert {"sub_blocks3.0.rpb1", "sub_blocks4.0.ls1.weight"} <= model.no_weight_decay()
    assert "blocks1.0.proj.7.gamma" in model.no_weight_decay()


def test_timm_has_no_gradient_checkpointing_here():
    model = xxt()
    model.set_grad_checkpointing(False)
    with pytest.raises(NotImplementedError, match="no gradient checkpointing"):
        model.set_grad_checkpointing()


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3)])
def test_mmengine_builds_a_backbone(out_indices):
    """Four maps; the weights and keys are OverLoCK's without its heads."""
    model, expected = backbone(out_indices=out_indices, seed=2), models.overlock_xxt(seed=2)
    assert equal(model.state_dict(), without_heads(expected.state_dict()))
    images = normal(2, 3, 96, 64)
    model.eval(), expected.eval()
    with torch.no_grad():
        maps, expected = model(images), expected.features(images)
    assert isinstance(maps, tuple) and len(maps) == len(out_indices)
    assert all(torch.equal(m, expected[i]) for m, i in zip(maps, out_indices))


def test_the_channels_that_a_neck_is_told():
    """Those of the docstring's example, and of upstream's Mask R-CNN with OverLoCK-T."""
    model = registry.MODELS.build(dict(type="OverLoCK", variant="overlock_t"))
    assert model.feature_dims == (64, 128, 384, 640)


@pytest.mark.parametrize("frozen_stages", [-1, 0, 2, 3, 4])
def test_frozen_stages_of_a_backbone_stay_as_they_are(frozen_stages):
    """No gradient, and BatchNorm's statistics do not move, also after eval() and train().

    All other parameters have a gradient.
    """
    model = backbone(frozen_stages=frozen_stages)
    model.eval()
    model.train()
    before = model_arrays(model)
    maps = model(normal(2, 3, 64, 64))
    if frozen_stages < 4:
        sum(m.mean() for m in maps).backward()
    after = model_arrays(model)
    parts = ["patch_embed1", "blocks1", "patch_embed2", "blocks2", "patch_embed3", "blocks3"]
    parts += ["patch_embed4", "blocks4", "high_level_proj", "sub_blocks3", "patch_embedx"]
    frozen = [*parts, "sub_blocks4"][: {-1: 0, 0: 1, 2: 4, 3: 10, 4: 12}[frozen_stages]]
    assert {name.split(".")[0] for name in no_gradient(model)} == set(frozen)
    for key in before:
        if key.endswith("num_batches_tracked"):
            assert after[key] == (0 if key.split(".")[0] in frozen else 1), key
    for key in (key for key in before if key.split(".")[0] in frozen):
        assert np.array_equal(before[key], after[key]), key


def test_norm_eval_of_a_backbone_keeps_the_statistics():
    model = backbone(norm_eval=True).train()
    before = model_arrays(model)
    sum(m.mean() for m in model(normal(2, 3, 64, 64))).backward()
    after = model_arrays(model)
    assert all(np.array_equal(before[key], after[key]) for key in before)
    assert no_gradient(model) == set() and model.training
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(norm.training for norm in norms)


class Detector(BaseModule):
    def __init__(self, init_cfg):
        super().__init__()
        self.backbone = backbone(init_cfg=init_cfg)
        self.neck = nn.Conv2d(160, 8, kernel_size=1)


@pytest.mark.parametrize("kind", ["official", "train.py", "detector"])
def test_a_backbone_is_initialised_from_a_local_checkpoint(tmp_path, kind):
    """By init_cfg, as a detector's init_weights asks for it."""
    trained = models.overlock_xxt(num_classes=20, seed=3)
    if kind == "official":
        path = save_official(tmp_path / "overlock.pth", trained)
    elif kind == "train.py":
        path = save(tmp_path / "last.safetensors", trained)
    else:
        detector = Detector(None)
        detector.backbone.load_state_dict(without_heads(trained.state_dict()))
        path = save_official(tmp_path / "detector.pth", detector)
    detector = Detector(dict(type="Pretrained", checkpoint=path))
    expected = without_heads(trained.state_dict())
    assert not equal(detector.backbone.state_dict(), expected)
    detector.init_weights()
    assert equal(detector.backbone.state_dict(), expected) and detector.backbone.is_init


def test_a_checkpoint_that_a_backbone_cannot_take(tmp_path):
    path = save_official(tmp_path / "overlock.pth", models.overlock_xxt(num_classes=20))
    config = dict(type="OverLoCK", variant="overlock_xt")
    model = registry.MODELS.build({**config, "init_cfg": dict(type="Pretrained", checkpoint=path)})
    with pytest.raises(RuntimeError, match="blocks1.1"):
        model.init_weights()
    for wrong in (tmp_path / "nothing.pth", "https://example.com/overlock.pth"):
        model = backbone(init_cfg=dict(type="Pretrained", checkpoint=str(wrong)))
        with pytest.raises(InputError, match="no checkpoint at"):
            model.init_weights()


def test_other_initialisations_of_a_backbone_are_left_to_mmengine():
    model = backbone(init_cfg=dict(type="Constant", layer="Conv2d", val=0.5))
    model.init_weights()
    assert (model.patch_embed1[0].weight == 0.5).all()
    model = backbone()
    drawn = {key: value.clone() for key, value in model.state_dict().items()}
    model.init_weights()  # without an init_cfg
    assert equal(model.state_dict(), drawn)


def test_arguments_that_a_backbone_refuses():
    for wrong, message in (
        (dict(variant="overlock_m"), "overlock_m.* is none of overlock_xxt, overlock_xt"),
        (dict(out_indices=(0, 4)), "out_indices"),
        (dict(frozen_stages=5), "frozen_stages 5"),
    ):
        with pytest.raises(ValueError, match=message):
            registry.MODELS.build(dict(type="OverLoCK", **{"variant": "overlock_xxt", **wrong}))


def test_deploy_and_drop_path_reach_a_backbone():
    model = backbone(deploy=True, drop_path_rate=0.3)
    assert "blocks1.0.proj.1.lk_origin.bias" in model.state_dict()
    assert max(m.drop_prob for m in model.modules() if isinstance(m, models.DropPath)) == 0.3
