"""Jittor's layers with PyTorch's arithmetic, against float64 NumPy where Jittor's own go wrong."""

import numpy as np
import pytest
from jittor_impl.aligned import launch
from jittor_impl.aligned.functions import (
    LayerNormFunction,
    adaptive_avg_pool2d,
    bilinear_matrix,
    convolve,
    cross_entropy_loss,
    interpolate,
    pooling_matrix,
)
from jittor_impl.aligned.nn import AdaptiveAvgPool2d, BatchNorm2d, Conv2d, LayerNorm
from jittor_impl.aligned.start import jt, nn
from jittor_impl.aligned.swap import swapped


def error(actual, expected):
    return np.abs(actual - expected).max() / np.abs(expected).max()


# (size of the input, size of the output)
POOLED = [(9, 7), (13, 7), (11, 7), (7, 4), (4, 7), (2, 7), (14, 7), (7, 2), (5, 1), (6, 6)]


@pytest.mark.parametrize("size", POOLED)
def test_adaptive_pooling(size, kernels):
    """Jittor's own is off by 0.6 at 9 -> 7 and divides by zero at 4 -> 7."""
    in_size, out_size = size

    def window(i, size):
        return slice(int(np.floor(i * size / out_size)), int(np.ceil((i + 1) * size / out_size)))

    x = np.random.default_rng(0).standard_normal((2, 3, in_size, in_size + 2))
    expected = np.empty((2, 3, out_size, out_size))
    for i in range(out_size):
        for j in range(out_size):
            rows, cols = window(i, in_size), window(j, in_size + 2)
            expected[:, :, i, j] = x[:, :, rows, cols].mean((2, 3))
    var = jt.array(x.astype(np.float32))
    out = adaptive_avg_pool2d(var, (out_size, out_size))
    assert error(out.numpy(), expected) < 1e-6
    # The layer is linear, so <grad, x> = <pool(x), w> for the gradient of <pool(x), w>.
    w = np.random.default_rng(1).standard_normal(expected.shape)
    grad = jt.grad((out * jt.array(w.astype(np.float32))).sum(), var).numpy()
    limit = 1e-5 * np.linalg.norm(expected) * np.linalg.norm(w)
    assert abs((grad * x).sum() - (expected * w).sum()) < limit


def test_pooling_and_interpolation_matrices_average():
    for size, out_size in ((9, 7), (4, 9), (2, 15), (30, 11)):
        assert np.allclose(pooling_matrix(size, out_size).sum(1), 1)
        assert np.allclose(bilinear_matrix(size, out_size).sum(1), 1)


# (size of the input, size of the output)
INTERPOLATED = [((4, 4), (9, 9)), ((6, 10), (9, 15)), ((2, 3), (4, 6)), ((9, 9), (5, 4))]


@pytest.mark.parametrize("size", INTERPOLATED)
def test_bilinear_interpolation(size, kernels):
    (H, W), (h, w) = size
    x = np.random.default_rng(0).standard_normal((1, 2, H, W))
    expected = np.empty((1, 2, h, w))
    for i in range(h):
        for j in range(w):
            y, z = max((i + 0.5) * H / h - 0.5, 0), max((j + 0.5) * W / w - 0.5, 0)
            y0, z0 = int(y), int(z)
            y1, z1 = min(y0 + 1, H - 1), min(z0 + 1, W - 1)
            a, b = y - y0, z - z0
            upper = (1 - b) * x[..., y0, z0] + b * x[..., y0, z1]
            lower = (1 - b) * x[..., y1, z0] + b * x[..., y1, z1]
            expected[..., i, j] = (1 - a) * upper + a * lower
    out = interpolate(jt.array(x.astype(np.float32)), (h, w), mode="bilinear", align_corners=False)
    assert error(out.numpy(), expected) < 2e-6


@pytest.mark.parametrize("ratio", [0, 20, 200])
def test_batch_norm(ratio, kernels):
    """With a mean that lies `ratio` standard deviations from 0.

    Jittor's own BatchNorm loses 4e-3 at a ratio of 200, and biases running_var.
    """
    generator = np.random.default_rng(0)
    x = (generator.standard_normal((8, 3, 5, 7)) + ratio).astype(np.float32)
    w = generator.standard_normal(x.shape).astype(np.float32)
    layer, var = BatchNorm2d(3), jt.array(x)
    layer.weight.update(jt.array(np.array([1.5, -2, 0.5], np.float32)))
    layer.train()
    out = layer(var)
    grads = [g.numpy() for g in jt.grad((out * jt.array(w)).sum(), [var, layer.weight, layer.bias])]

    x, gamma = x.astype(np.float64), np.array([1.5, -2, 0.5]).reshape(1, 3, 1, 1)
    axes = (0, 2, 3)
    mean, sigma = x.mean(axes, keepdims=True), np.sqrt(x.var(axes, keepdims=True) + 1e-5)
    normal = (x - mean) / sigma
    g = w * gamma
    dot = (g * normal).mean(axes, keepdims=True)
    grad_x = (g - g.mean(axes, keepdims=True) - normal * dot) / sigma
    # x itself is a float32: its rounding, relative to the spread, is what remains.
    limit = 5e-6 + 20 * ratio * np.finfo(np.float32).eps
    assert error(out.numpy(), normal * gamma) < limit
    assert error(grads[0], grad_x) < limit
    assert error(grads[1], (w * normal).sum(axes)) < limit
    assert error(grads[2], w.sum(axes)) < 5e-6
    unbiased = x.var(axes, ddof=1)
    assert error(layer.running_var.numpy(), 0.9 + 0.1 * unbiased) < 1e-5
    assert error(layer.running_mean.numpy(), 0.1 * mean.reshape(-1) + 1e-9) < 1e-5
    assert layer.num_batches_tracked.numpy().item() == 1

    layer.eval()
    running_mean = layer.running_mean.numpy().reshape(1, 3, 1, 1)
    running_var = layer.running_var.numpy().reshape(1, 3, 1, 1)
    expected = (x - running_mean) / np.sqrt(running_var + 1e-5)
    assert error(layer(var).numpy(), expected * gamma) < limit


def test_batch_norm_counts_batches_from_any_checkpoint():
    """The number may be in int64; another model with the same Var counts for itself."""
    layer, other = BatchNorm2d(2), BatchNorm2d(2)
    x = jt.array(np.random.default_rng(0).standard_normal((4, 2, 3, 3)).astype(np.float32))
    for norm in (layer, other):
        norm.train()
    layer.num_batches_tracked.update(jt.array64(np.full((), 5, np.int64)))
    layer(x)
    other.load_state_dict(layer.state_dict())
    other(x)
    counts = [norm.num_batches_tracked.numpy() for norm in (layer, other)]
    assert [count.item() for count in counts] == [6, 7]


def test_batch_norm_statistics_are_not_trained():
    layer = BatchNorm2d(4)
    layer.train()
    optimizer = jt.optim.AdamW([layer.weight, layer.bias], lr=0.1)
    x = jt.array(np.random.default_rng(0).standard_normal((4, 4, 3, 3)).astype(np.float32))
    optimizer.step((layer(x) * x).sum())
    assert layer.running_mean.is_stop_grad() and layer.running_var.is_stop_grad()
    assert error(layer.running_mean.numpy(), 0.1 * x.numpy().mean((0, 2, 3))) < 1e-5


@pytest.mark.parametrize("ratio", [0, 200])
def test_channel_norm(ratio, kernels):
    generator = np.random.default_rng(0)
    x = (generator.standard_normal((2, 24, 3, 5)) + ratio).astype(np.float32)
    weight, bias = (generator.standard_normal(24).astype(np.float32) for _ in range(2))
    w = generator.standard_normal(x.shape).astype(np.float32)
    variables = [jt.array(a) for a in (x, weight, bias)]
    out = LayerNormFunction.apply(*variables, 1e-6)
    grads = [g.numpy() for g in jt.grad((out * jt.array(w)).sum(), variables)]
    x = x.astype(np.float64)
    sigma = np.sqrt(x.var(1, keepdims=True) + 1e-6)
    normal = (x - x.mean(1, keepdims=True)) / sigma
    gamma = weight.reshape(1, -1, 1, 1)
    g = w * gamma
    grad_x = (g - g.mean(1, keepdims=True) - normal * (g * normal).mean(1, keepdims=True)) / sigma
    limit = 5e-6 + 20 * ratio * np.finfo(np.float32).eps
    assert error(out.numpy(), normal * gamma + bias.reshape(1, -1, 1, 1)) < limit
    for actual, wanted in zip(grads, (grad_x, (w * normal).sum((0, 2, 3)), w.sum((0, 2, 3)))):
        assert error(actual, wanted) < limit


@pytest.mark.parametrize("kernels", ["cuda"], indirect=True)
def test_half_precision(kernels, monkeypatch):
    """A float16 map, float32 parameters and a float32 loss, as on a GPU.

    Each result is off by its own rounding alone.
    """
    monkeypatch.setitem(launch.TYPES, 0, launch.TYPES[1])
    generator = np.random.default_rng(0)
    x, w = ((generator.standard_normal((4, 3, 5, 7))).astype(np.float16) for _ in range(2))
    norm, conv, results = BatchNorm2d(3), Conv2d(3, 3, 3, padding=1, groups=3), []
    conv.weight.update(conv.weight.float16().float32())  # exact in both
    norm.train()
    for dtype in ("float16", "float32"):
        var = jt.array(x).cast(dtype)
        for layer in (norm, lambda x: convolve(x, conv, own=None, residual=True)):
            out = layer(var)
            assert out.dtype == dtype
            loss = (out.float32() * jt.array(w).float32()).sum()
            grads = jt.grad(loss, [var, norm.weight, conv.weight])
            assert [g.dtype for g in grads] == [dtype, "float32", "float32"]
            results.append([v.float32().numpy() for v in (out, *grads)])
    assert norm.running_mean.dtype == norm.running_var.dtype == "float32"
    norm.eval()
    assert norm(jt.array(x)).dtype == "float16"
    for half, single in zip(results[:2], results[2:]):
        for actual, expected in zip(half, single):
            assert np.abs(actual - expected).max() <= (2**-11 + 5e-6) * np.abs(expected).max()


@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm(shape, axes, eps, affine):
    """Jittor's own loses 6e-3 at a mean of 200 times the spread."""
    if axes == len(shape):
        axes = 1
    generator = np.random.default_rng(0)
    x = (generator.standard_normal(shape) + 200).astype(np.float32)
    layer = LayerNorm(shape[-axes:], eps, affine)
    weight, bias = (generator.standard_normal(shape[-axes:]).astype(np.float32) for _ in range(2))
    if affine:
        layer.weight.update(jt.array(weight))
        layer.bias.update(jt.array(bias))
    last = tuple(range(len(shape) - axes, len(shape)))
    exact = x.astype(np.float64)
    exact = exact - exact.mean(last, keepdims=True)
    exact = exact / np.sqrt((exact**2).mean(last, keepdims=True) + eps)
    expected = exact * weight + bias if affine else exact
    # The mean itself is a float32, half a unit in the last place of 200 beside a spread of 1.
    assert error(layer(jt.array(x)).numpy(), expected) < 5e-6 + 200 * np.finfo(np.float32).eps


@pytest.mark.parametrize("shape", [(8, 3), (4, 3, 7), (2, 3, 4, 5, 6)])
def test_batch_norm_of_other_shapes(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    layer = BatchNorm2d(3, eps=1e-3, momentum=0.2)
    layer.train()
    out, axes = layer(jt.array(x)).numpy(), (0, *range(2, len(shape)))
    exact = x.astype(np.float64)
    mean, variance = exact.mean(axes, keepdims=True), exact.var(axes, keepdims=True)
    assert error(out, (exact - mean) / np.sqrt(variance + 1e-3)) < 5e-6
    unbiased = 0.8 + 0.2 * exact.var(axes, ddof=1)
    assert error(layer.running_var.numpy(), unbiased) < 1e-5


def test_cross_entropy():
    """Jittor's own hands the largest of 1000 logits 4e-7 of gradient that is none of its own."""
    generator = np.random.default_rng(0)
    x = (0.1 * generator.random((2, 1000))).astype(np.float32)
    var, labels = jt.array(x), np.array([587, 608])
    loss = cross_entropy_loss(var, jt.array(labels.astype(np.int32)))
    p = np.exp(x.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    assert error(loss.numpy(), -np.log(p[[0, 1], labels]).mean()) < 1e-7
    grad = p / 2
    grad[[0, 1], labels] -= 0.5
    assert np.abs(jt.grad(loss, var).numpy() - grad).max() < 1e-7 * np.abs(grad).max()
    assert np.abs(jt.grad(loss, var).numpy() - grad)[:, x.argmax(1)].max() < 1e-9


@pytest.mark.parametrize("shape", [(6, 4), (2, 4, 3, 5)])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("ignored", [None, 2, -100])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_of_every_kind(shape, weighted, ignored, reduction):
    generator = np.random.default_rng(0)
    x = generator.standard_normal(shape).astype(np.float32)
    labels = generator.integers(0, 4, (shape[0], *shape[2:])).astype(np.int32)
    labels.flat[0] = 2 if ignored is None else ignored
    weight = generator.random(4).astype(np.float32) if weighted else None
    given = None if weight is None else jt.array(weight)
    loss = cross_entropy_loss(jt.array(x), jt.array(labels), given, ignored, reduction)
    known = labels if ignored is None else np.where(labels == ignored, 0, labels)
    picked = np.take_along_axis(x.astype(np.float64), known[:, None], 1)[:, 0]
    counted = np.ones(labels.shape) if weight is None else weight[known].astype(np.float64)
    counted = np.where(labels == ignored, 0, counted) if ignored is not None else counted
    expected = (np.log(np.exp(x.astype(np.float64)).sum(1)) - picked) * counted
    if reduction == "mean":
        expected = expected.sum() / counted.sum()
    expected = expected.sum() if reduction == "sum" else expected
    assert loss.dtype == "float32"
    assert error(loss.numpy(), expected) < 5e-7


def test_what_a_layer_does_not_cover_is_named():
    for options in (dict(affine=False), dict(momentum=None), dict(track_running_stats=False)):
        with pytest.raises(ValueError, match="BatchNorm2d: only with a momentum"):
            BatchNorm2d(3, **options)
    for options in (dict(padding="same"), dict(padding_mode="reflect")):
        with pytest.raises(ValueError, match="Conv2d: only a padding in numbers, with zeros, got"):
            Conv2d(3, 3, 3, **options)
    x = jt.ones((1, 1, 5, 4))
    with swapped():
        for mode in ("nearest", "bilinear", "bicubic", "area"):
            with pytest.raises(ValueError, match=r"\(5, 4\) times 1.5 is no whole size"):
                nn.interpolate(x, scale_factor=1.5, mode=mode)
        for mode in ("nearest", "area"):
            with pytest.raises(ValueError, match=f"{mode} has no align_corners"):
                nn.interpolate(x, size=3, mode=mode, align_corners=True)


def test_a_convolution_takes_lists_as_pytorchs_does():
    """Jittor's own makes ([3, 2], [3, 2]) of a list."""
    conv = Conv2d(2, 4, [3, 2], stride=[2, 1], padding=[1, 0], dilation=[1, 2])
    assert conv.kernel_size == (3, 2) and conv.weight.shape == [4, 2, 3, 2]
    assert tuple(conv(jt.ones((1, 2, 6, 6))).shape) == (1, 4, 3, 4)


@pytest.mark.parametrize("size", [3, (2, 5), (None, 3), (4, None)])
def test_adaptive_pooling_layer_takes_a_size_for_each_axis(size):
    x = np.random.default_rng(0).standard_normal((2, 3, 6, 5)).astype(np.float32)
    h, w = (size, size) if isinstance(size, int) else (size[0] or 6, size[1] or 5)
    rows, cols = pooling_matrix(6, h).numpy(), pooling_matrix(5, w).numpy()
    assert error(AdaptiveAvgPool2d(size)(jt.array(x)).numpy(), rows @ x @ cols.T) < 1e-6
