"""Our batches and layers beside torchvision's and timm's, which are the same ones."""

import numpy as np
import pytest
import torch
from PIL import Image
from under_test import module

transforms = pytest.importorskip("torchvision.transforms.functional")
timm = pytest.importorskip("timm.layers")
create_transform = pytest.importorskip("timm.data").create_transform
timm_grn = pytest.importorskip("timm.layers.grn")
dataset, layers, reader = module("dataset"), module("layers"), module("images")
EPS = float(np.finfo(np.float32).eps)


def normal(*shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape)
    return torch.from_numpy(values.astype(np.float32))


def assert_equal_but_for_rounding(actual, expected, operations):
    """Each of the operations rounds its result by half a unit in the last place, at most."""
    error = (actual - expected).abs().max().item()
    assert error <= operations * EPS / 2 * expected.abs().max().item(), error


def test_batches_are_flipped_tensors_normalised():
    """ToTensor, RandomHorizontalFlip, Normalize, image by image, in our order, with our flips."""
    data = object.__new__(dataset.TinyImageNet)
    generator = np.random.default_rng(0)
    data.images = generator.integers(0, 256, (40, 16, 20, 3)).astype(np.uint8)
    data.labels = np.arange(40)
    generator = np.random.default_rng([3, 2])
    order, flips = generator.permutation(40), generator.random(40) < 0.5
    batches = list(data.batches(16, seed=3, epoch=2))
    images = torch.from_numpy(np.concatenate([images for images, _ in batches]))
    assert 0 < flips.sum() < 40
    for image, index, flipped in zip(images, order, flips):
        expected = transforms.to_tensor(data.images[index])
        expected = transforms.hflip(expected) if flipped else expected
        expected = transforms.normalize(expected, reader.MEAN.tolist(), reader.STD.tolist())
        # Ours multiplies by 1 / (255 * std) and subtracts mean / std: five roundings, theirs three.
        assert_equal_but_for_rounding(image, expected, operations=8)


@pytest.mark.parametrize("shape", [(50, 120), (121, 50), (33, 33), (20, 17), (64, 64)])
@pytest.mark.parametrize("side, crop_pct", [(64, 1), (32, 0.925), (33, 0.875)])
def test_photographs_are_cut_as_timm_and_torchvision_do(tmp_path, shape, side, crop_pct):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    actual = reader.read_photo(tmp_path / "photo.png", side, side, crop_pct)
    options = dict(is_training=False, interpolation="bicubic", crop_pct=crop_pct)
    steps = create_transform(side, **options).transforms[:2]  # Resize, CenterCrop
    expected = Image.fromarray(pixels)
    for step in steps:
        expected = step(expected)
    assert np.array_equal(actual, np.asarray(expected))


def test_drop_path_is_timms(monkeypatch):
    """For the same draw. timm draws whether a sample is kept, ours drops it below drop_prob."""
    x, layer, draws = normal(64, 3, 4, 5), layers.DropPath(0.3).train(), []
    rand = torch.rand

    def drawn(*shape, **options):
        draws.append(rand(*shape, **options))
        return draws[-1]

    monkeypatch.setattr(torch, "rand", drawn)
    ours = layer(x)
    monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda t, keep: t.copy_(draws[0] >= 1 - keep))
    expected = timm.DropPath(0.3).train()(x)
    assert len(draws) == 1 and (expected == 0).any()
    assert_equal_but_for_rounding(ours, expected, operations=3)
    assert torch.equal(layer.eval()(x), x)


def test_squeeze_and_excitation_is_timms():
    x, ours = normal(3, 40, 5, 6), layers.SEModule(40)
    theirs = timm.SEModule(40, rd_channels=16, act_layer=torch.nn.GELU)
    for name, index in (("fc1", 1), ("fc2", 3)):
        getattr(theirs, name).load_state_dict(ours.proj[index].state_dict())
    # Means of 30, products of 40 and of 16 numbers.
    assert_equal_but_for_rounding(ours(x), theirs(x), operations=30 + 40 + 16)


def test_layer_norm_2d_is_timms():
    x, ours, theirs = normal(2, 24, 5, 7) + 3, layers.LayerNorm2d(24), timm.LayerNorm2d(24)
    ours.weight.data, ours.bias.data = normal(24, seed=1), normal(24, seed=2)
    theirs.load_state_dict(ours.state_dict())
    assert ours.eps == theirs.eps == 1e-6
    assert_equal_but_for_rounding(ours(x), theirs(x), operations=2 * 24)


def test_grn_is_timms():
    x, ours = normal(2, 24, 5, 7), layers.GRN(24)
    theirs = timm_grn.GlobalResponseNorm(24, channels_last=False)
    ours.gamma.data, ours.beta.data = normal(1, 24, 1, 1, seed=1), normal(1, 24, 1, 1, seed=2)
    theirs.weight.data, theirs.bias.data = ours.gamma.data.flatten(), ours.beta.data.flatten()
    # Norms of 35 pixels, their mean over 24 channels.
    assert_equal_but_for_rounding(ours(x), theirs(x), operations=35 + 24)
