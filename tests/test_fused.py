"""The CPU kernels of jittor_impl against float64 NumPy: depthwise convolution and GRN, with their gradients.

BatchNorm and LayerNorm are in test_aligned_nn.py, na2d_av in test_ops.py.
"""
import os
import subprocess
import sys

import aligned_nn
import numpy as np
import ops
import pytest
from aligned_nn import Conv2d, grn
from jittor_setup import jt


def error(actual, expected):
    return np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)


def depthwise(x, weight, grad_y, dilation):
    """y, grad_x, grad_weight: each tap shifts the padded image. x (B, C, H, W), weight (C, 1, K, K)."""
    K, (H, W) = weight.shape[2], x.shape[2:]
    pad = dilation * (K // 2)
    frame = ((0, 0), (0, 0), (pad, pad), (pad, pad))
    padded, grad_padded = np.pad(x, frame), np.zeros(np.pad(x, frame).shape)
    y, grad_weight = np.zeros(x.shape), np.zeros(weight.shape)
    for p in range(K):
        for q in range(K):
            window = (slice(None), slice(None), slice(p * dilation, p * dilation + H), slice(q * dilation, q * dilation + W))
            tap = weight[:, 0, p, q].reshape(1, -1, 1, 1)
            y += tap * padded[window]
            grad_padded[window] += tap * grad_y
            grad_weight[:, 0, p, q] = (grad_y * padded[window]).sum((0, 2, 3))
    return y, grad_padded[:, :, pad:pad + H, pad:pad + W], grad_weight


def convolution(x, weight, grad_y, stride, padding, dilation):
    """y, grad_x, grad_weight of a dense convolution: tap by tap. x (B, C, H, W), weight (O, C, K, L)."""
    frame = ((0, 0), (0, 0), (padding, padding), (padding, padding))
    padded = np.pad(x, frame)
    H, W = ((n - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(padded.shape[2:], weight.shape[2:]))
    y, grad_padded, grad_weight = 0, np.zeros(padded.shape), np.zeros(weight.shape)
    for p in range(weight.shape[2]):
        for q in range(weight.shape[3]):
            window = (slice(None), slice(None), slice(p * dilation, p * dilation + stride * (H - 1) + 1, stride),
                      slice(q * dilation, q * dilation + stride * (W - 1) + 1, stride))
            tap = weight[:, :, p, q]
            y = y + np.einsum("oc,bchw->bohw", tap, padded[window])
            if grad_y is not None:
                grad_padded[window] += np.einsum("oc,bohw->bchw", tap, grad_y)
                grad_weight[:, :, p, q] = np.einsum("bohw,bchw->oc", grad_y, padded[window])
    return y, grad_padded[:, :, padding:padding + x.shape[2], padding:padding + x.shape[3]], grad_weight


@pytest.mark.parametrize("shape", [(3, 8, 16, 16), (17, 12, 4, 4), (2, 20, 2, 2), (5, 3, 7, 11), (70, 30, 1, 1), (2, 300, 9, 8)])
@pytest.mark.parametrize("outs, kernel, stride, padding, dilation", [
    (7, 1, 1, 0, 1), (24, 1, 1, 0, 1), (24, 3, 1, 1, 1), (13, 3, 2, 1, 1), (5, 1, 2, 0, 1), (5, 2, 3, 1, 1), (6, 3, 1, 2, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_dense_convolution(shape, outs, kernel, stride, padding, dilation, bias):
    generator = np.random.default_rng(0)
    layer = Conv2d(shape[1], outs, kernel, stride=stride, padding=padding, dilation=dilation, bias=bias)
    layer.weight.update(jt.array(generator.standard_normal((outs, shape[1], kernel, kernel)).astype(np.float32)))
    x = generator.standard_normal(shape).astype(np.float32)
    geometry = (layer.weight.numpy().astype(np.float64), stride, padding, dilation)
    y = convolution(x.astype(np.float64), geometry[0], None, *geometry[1:])[0]
    grad_y = generator.standard_normal(y.shape).astype(np.float32)
    _, grad_x, grad_weight = convolution(x.astype(np.float64), geometry[0], grad_y, *geometry[1:])
    if bias:
        y = y + layer.bias.numpy().reshape(1, -1, 1, 1)
    var = jt.array(x)
    out = layer(var)
    inputs = [var, layer.weight] + ([layer.bias] if bias else [])
    grads = [g.numpy() for g in jt.grad((out * jt.array(grad_y)).sum(), inputs)]
    # Sums of at most 2700 products, in float32.
    assert tuple(out.shape) == y.shape
    assert error(out.numpy(), y) < 5e-6
    assert error(grads[0], grad_x) < 5e-6
    assert error(grads[1], grad_weight) < 5e-6
    if bias:
        assert error(grads[2], grad_y.sum((0, 2, 3), dtype=np.float64)) < 5e-6


# Every kernel and dilation of the five variants on small and odd maps; channels that do and do not fill 8 lanes.
@pytest.mark.parametrize("shape", [(3, 8, 16, 16), (17, 12, 4, 4), (2, 20, 2, 2), (1, 3, 7, 11), (2, 9, 1, 5), (2, 16, 13, 8)])
@pytest.mark.parametrize("K, dilation", [(3, 1), (3, 2), (3, 5), (3, 7), (5, 1), (5, 2), (7, 2), (9, 2), (13, 1), (17, 1)])
@pytest.mark.parametrize("bias, residual", [(True, True), (False, False)])
def test_depthwise_convolution(shape, K, dilation, bias, residual):
    generator = np.random.default_rng(0)
    x, grad_y = (generator.standard_normal(shape).astype(np.float32) for _ in range(2))
    layer = Conv2d(shape[1], shape[1], K, padding=dilation * (K // 2), dilation=dilation, groups=shape[1], bias=bias)
    layer.weight.update(jt.array(generator.standard_normal((shape[1], 1, K, K)).astype(np.float32)))
    var = jt.array(x)
    out = layer.depthwise(var, residual)
    y, grad_x, grad_weight = depthwise(x.astype(np.float64), layer.weight.numpy().astype(np.float64), grad_y, dilation)
    if bias:
        y += layer.bias.numpy().reshape(1, -1, 1, 1)
    if residual:
        y, grad_x = y + x, grad_x + grad_y
    inputs = [var, layer.weight] + ([layer.bias] if bias else [])
    grads = [g.numpy() for g in jt.grad((out * jt.array(grad_y)).sum(), inputs)]
    # Sums of at most 17 * 17 products forward and of the batch's pixels backward, in float32.
    assert error(out.numpy(), y) < 5e-6
    assert error(grads[0], grad_x) < 5e-6
    assert error(grads[1], grad_weight) < 5e-6
    if bias:
        assert error(grads[2], grad_y.astype(np.float64).sum((0, 2, 3))) < 5e-6


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 4, 4), (2, 24, 7, 9)])
def test_grn(shape, kernels, monkeypatch):
    """By the CPU kernel, and by the operators that run on a GPU."""
    monkeypatch.setattr(aligned_nn, "on_cpu", lambda: kernels)
    generator = np.random.default_rng(0)
    x, grad_y = (generator.standard_normal(shape).astype(np.float32) for _ in range(2))
    x[0, 1] = 0  # a dead channel
    gamma, beta = (generator.standard_normal((1, shape[1], 1, 1)).astype(np.float32) for _ in range(2))
    inputs = [jt.array(a) for a in (x, gamma, beta)]
    out = grn(*inputs)
    grads = [g.numpy() for g in jt.grad((out * jt.array(grad_y)).sum(), inputs)]

    x, grad_y = x.astype(np.float64), grad_y.astype(np.float64)
    norm = np.sqrt((x * x).sum((2, 3), keepdims=True))
    mean = norm.mean(1, keepdims=True) + 1e-6
    assert error(out.numpy(), (gamma * norm / mean + 1) * x + beta) < 2e-6
    dot = (grad_y * x).sum((2, 3), keepdims=True)
    grad_norm = gamma * dot / mean - (gamma * dot * norm).mean(1, keepdims=True) / mean**2
    grad_x = (gamma * norm / mean + 1) * grad_y + grad_norm * np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)
    assert error(grads[0], grad_x) < 2e-6
    assert error(grads[1], (dot * norm / mean).sum(0, keepdims=True)) < 2e-6
    assert error(grads[2], grad_y.sum((0, 2, 3)).reshape(1, -1, 1, 1)) < 2e-6


def test_the_thread_count_changes_no_bit_of_a_kernel(tmp_path):
    """Every kernel writes each number by one thread, in one order."""
    code = f"""
import sys; sys.path.insert(0, {str(ops.KERNELS.parent)!r})
import numpy as np
from aligned_nn import BatchNorm2d, Conv2d, channel_norm, grn
from jittor_setup import jt
from ops import na2d_av
generator = np.random.default_rng(0)
normal = lambda *shape: jt.array(generator.standard_normal(shape).astype(np.float32))
x, g, attn, gamma = normal(21, 24, 9, 9), normal(21, 24, 9, 9), normal(21, 2, 9, 9, 25), normal(1, 24, 1, 1)
conv, norm = Conv2d(24, 24, 5, padding=2, groups=24), BatchNorm2d(24)
conv.weight.update(normal(24, 1, 5, 5))
conv.bias.update(jt.zeros(24))
y = grn(channel_norm(norm(conv(x)), norm.weight, norm.bias, 1e-6), gamma, gamma)
y = na2d_av(attn, y.reshape(21, 2, 12, 9, 9).permute(0, 1, 3, 4, 2), 5).permute(0, 1, 4, 2, 3).reshape(x.shape)
grads = jt.grad((y * g).sum(), [x, conv.weight, norm.weight, gamma, attn])
np.savez(sys.argv[1], y.numpy(), *[v.numpy() for v in grads])
"""
    results = []
    for threads in ("1", "2"):
        out = tmp_path / f"{threads}.npz"
        subprocess.run([sys.executable, "-c", code, out], check=True, env={**os.environ, "OMP_NUM_THREADS": threads})
        results.append(dict(np.load(out)))
    assert results[0].keys() == results[1].keys() and len(results[0]) == 6
    assert all(np.array_equal(results[0][key], results[1][key]) for key in results[0])


def test_other_types_are_refused():
    with pytest.raises(ValueError, match="float32"):
        grn(jt.zeros((1, 2, 3, 3)).float16(), jt.zeros((1, 2, 1, 1)), jt.zeros((1, 2, 1, 1)))
