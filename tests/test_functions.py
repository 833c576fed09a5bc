"""The kernels of jittor_impl and their gradients against float64 NumPy.

Here are convolutions, ContMix, GRN and AdamW; BatchNorm, LayerNorm, pooling and interpolation are
in test_aligned_nn.py, na2d_av in test_ops.py.
"""

import json
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import test_ops
from under_test import DEVICE, cpu_only
from jittor_impl import contmix, models, ops, train
from jittor_impl.aligned import functions
from jittor_impl.aligned.foreach import clip_grad_norm, lerp
from jittor_impl.aligned.functions import (
    ActivationFunction,
    GRNFunction,
    cat_channels,
    convolve,
    split_channels,
)
from jittor_impl.aligned.nn import BatchNorm2d, Conv2d, FusedSequential
from jittor_impl.aligned.optim import AdamW
from jittor_impl.aligned.start import jt, nn
from jittor_impl.layers import (
    GRN,
    DilatedReparamBlock,
    LayerNorm2d,
    LayerScale,
    ResDWConv,
    SEModule,
)

ROOT = Path(__file__).resolve().parent.parent


def error(actual, expected):
    return np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)


def depthwise(x, weight, grad_y, dilation):
    """y, grad_x, grad_weight of x (B, C, H, W) and weight (C, 1, K, K).

    Tap by tap: each shifts the padded image.
    """
    K, (H, W) = weight.shape[2], x.shape[2:]
    pad = dilation * (K // 2)
    frame = ((0, 0), (0, 0), (pad, pad), (pad, pad))
    padded, grad_padded = np.pad(x, frame), np.zeros(np.pad(x, frame).shape)
    y, grad_weight = np.zeros(x.shape), np.zeros(weight.shape)
    for p in range(K):
        for q in range(K):
            rows = slice(p * dilation, p * dilation + H)
            cols = slice(q * dilation, q * dilation + W)
            window = (..., rows, cols)
            tap = weight[:, 0, p, q].reshape(1, -1, 1, 1)
            y += tap * padded[window]
            grad_padded[window] += tap * grad_y
            grad_weight[:, 0, p, q] = (grad_y * padded[window]).sum((0, 2, 3))
    return y, grad_padded[:, :, pad : pad + H, pad : pad + W], grad_weight


def convolution(x, weight, grad_y, stride, padding, dilation):
    """y, grad_x, grad_weight of x (B, C, H, W) and weight (O, C, K, L), tap by tap."""
    frame = ((0, 0), (0, 0), (padding, padding), (padding, padding))
    padded, kernel = np.pad(x, frame), weight.shape[2:]
    H, W = ((n - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(padded.shape[2:], kernel))
    y, grad_padded, grad_weight = 0, np.zeros(padded.shape), np.zeros(weight.shape)
    for p in range(kernel[0]):
        for q in range(kernel[1]):
            rows = slice(p * dilation, p * dilation + stride * (H - 1) + 1, stride)
            cols = slice(q * dilation, q * dilation + stride * (W - 1) + 1, stride)
            window = (..., rows, cols)
            tap = weight[:, :, p, q]
            y = y + np.einsum("oc,bchw->bohw", tap, padded[window])
            if grad_y is not None:
                grad_padded[window] += np.einsum("oc,bohw->bchw", tap, grad_y)
                grad_weight[:, :, p, q] = np.einsum("bohw,bchw->oc", grad_y, padded[window])
    rows, cols = (slice(padding, padding + size) for size in x.shape[2:])
    return y, grad_padded[..., rows, cols], grad_weight


@pytest.mark.parametrize(
    "shape",
    [
        (3, 8, 16, 16),
        (1, 5, 3, 16),
        (17, 12, 4, 4),
        (2, 20, 2, 2),
        (5, 3, 7, 11),
        (70, 30, 1, 1),
        (2, 300, 9, 8),
    ],
)
@pytest.mark.parametrize(
    "outs, kernel, stride, padding, dilation",
    [
        (7, 1, 1, 0, 1),
        (24, 1, 1, 0, 1),
        (24, 3, 1, 1, 1),
        (13, 3, 2, 1, 1),
        (5, 1, 2, 0, 1),
        (5, 2, 3, 1, 1),
        (6, 3, 1, 2, 2),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_dense_convolution(shape, outs, kernel, stride, padding, dilation, bias):
    generator = np.random.default_rng(0)
    geometry = dict(stride=stride, padding=padding, dilation=dilation)
    layer = Conv2d(shape[1], outs, kernel, **geometry, bias=bias)
    weight = generator.standard_normal((outs, shape[1], kernel, kernel)).astype(np.float32)
    layer.weight.update(jt.array(weight))
    x = generator.standard_normal(shape).astype(np.float32)
    x64, weight64 = x.astype(np.float64), layer.weight.numpy().astype(np.float64)
    y = convolution(x64, weight64, None, **geometry)[0]
    grad_y = generator.standard_normal(y.shape).astype(np.float32)
    _, grad_x, grad_weight = convolution(x64, weight64, grad_y, **geometry)
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


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_gradients_of_a_convolution_of_which_a_part_is_frozen(frozen):
    """Frozen are x, the weight or the bias: the others have the gradient that they had with all."""
    generator = np.random.default_rng(0)
    arrays = [
        generator.standard_normal(s).astype(np.float32) for s in ((2, 3, 5, 5), (4, 3, 3, 3), 4)
    ]
    layer, found = Conv2d(3, 4, 3, padding=1), []
    for stopped in ((), frozen):
        inputs = [jt.array(a) for a in arrays]
        for i in stopped:
            inputs[i].stop_grad()
        x, layer.weight, layer.bias = inputs
        wanted = [inputs[i] for i in range(3) if i not in frozen]
        y = layer(x)
        found.append([g.numpy() for g in jt.grad((y * y).sum(), wanted)])
    assert all(map(np.array_equal, *found))


@cpu_only("a GPU has Jittor's own operators")
def test_a_step_computes_no_gradient_of_the_image(monkeypatch):
    made, original = [], functions.launch

    def launch(kernel, headers, inputs, outputs, *others, **options):
        if kernel == "convolution_gradients":
            made.append([like is not None for like in outputs])
        return original(kernel, headers, inputs, outputs, *others, **options)

    monkeypatch.setattr(functions, "launch", launch)
    model, args = models.overlock_xxt(num_classes=3), train.make_parser().parse_args([])
    model.train()
    images, labels = np.zeros((2, 3, 32, 32), np.float32), np.array([0, 2])
    train.training_step(model, train.make_optimizer(model, args), images, labels, args)
    assert sum(not of_x for of_x, *_ in made) == 1
    assert all(of_weight for _, of_weight, _ in made)


@cpu_only("a GPU has Jittor's own operators")
def test_channels_are_gathered_and_parted():
    """As NumPy does it, forward and backward, with a part that nobody uses."""
    generator = np.random.default_rng(0)
    parts = [generator.standard_normal((3, n, 2, 5)).astype(np.float32) for n in (4, 1, 7)]
    weights = generator.standard_normal((3, 12, 2, 5)).astype(np.float32)
    maps = [jt.array(a) for a in parts]
    whole = cat_channels(maps)
    assert np.array_equal(whole.numpy(), np.concatenate(parts, 1))
    grads = jt.grad((whole * jt.array(weights)).sum(), maps)
    for grad, weight in zip(grads, np.split(weights, (4, 5), axis=1)):
        assert np.array_equal(grad.numpy(), weight)

    x = jt.array(weights)
    first, _, last = split_channels(x, (4, 1, 7))
    assert np.array_equal(first.numpy(), weights[:, :4])
    assert np.array_equal(last.numpy(), weights[:, 5:])
    grad = jt.grad((first * maps[0]).sum() + (last * maps[2]).sum(), x)
    parts[1][:] = 0
    assert np.array_equal(grad.numpy(), np.concatenate(parts, 1))


# Every kernel and dilation of the five variants; small and odd maps; numbers of channels that fill
# 8 lanes and that do not.
@pytest.mark.parametrize(
    "shape",
    [(3, 8, 16, 16), (17, 12, 4, 4), (2, 20, 2, 2), (1, 3, 7, 11), (2, 9, 1, 5), (2, 16, 13, 8)],
)
@pytest.mark.parametrize(
    "K, dilation",
    [(3, 1), (3, 2), (3, 5), (3, 7), (5, 1), (5, 2), (7, 2), (9, 2), (13, 1), (17, 1)],
)
@pytest.mark.parametrize("bias, residual", [(True, True), (False, False)])
def test_depthwise_convolution(shape, K, dilation, bias, residual):
    generator = np.random.default_rng(0)
    x, grad_y = (generator.standard_normal(shape).astype(np.float32) for _ in range(2))
    C, padding = shape[1], dilation * (K // 2)
    layer = Conv2d(C, C, K, padding=padding, dilation=dilation, groups=C, bias=bias)
    weight = generator.standard_normal((C, 1, K, K)).astype(np.float32)
    layer.weight.update(jt.array(weight))
    var = jt.array(x)
    out = convolve(var, layer, own=None, residual=residual)  # by the kernel, or not at all
    x64, weight64 = x.astype(np.float64), layer.weight.numpy().astype(np.float64)
    y, grad_x, grad_weight = depthwise(x64, weight64, grad_y, dilation)
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


@pytest.mark.parametrize("K, dilation, bias, residual", [(3, 1, True, True), (7, 2, False, False)])
def test_depthwise_convolution_of_cpu_and_gpu(K, dilation, bias, residual, kernels):
    test_depthwise_convolution((2, 3, 7, 11), K, dilation, bias, residual)


# By one thread for each number, and in tiles.
@pytest.mark.parametrize("shape, K", [((1, 2, 9, 10, 3), 5), ((2, 1, 8, 17, 5), 3)])
def test_na2d_av_of_cpu_and_gpu(impl, shape, K, kernels):
    test_ops.test_definition_in_float64(impl, shape, K)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def contmix_float64(query, key, weight, bias, rpb1, rpb2, x):
    """The definition, pixel by pixel."""
    (B, C, H, W), heads = x.shape, len(rpb1)
    query = query.reshape(B, heads, -1, H, W)
    key = key.reshape(B, heads, query.shape[2], -1)
    x = x.reshape(B, 2, heads, -1, H, W)
    out = np.zeros(x.shape)
    for half, rpb in enumerate((rpb1, rpb2)):
        K = (rpb.shape[1] + 1) // 2
        part = slice(0, K * K) if half == 0 else slice(len(weight) - K * K, None)
        for i in range(H):
            for j in range(W):
                r, c = min(max(i - K // 2, 0), H - K), min(max(j - K // 2, 0), W - K)
                affinity = np.einsum("bnd,bnds->bns", query[..., i, j], key)
                y, z = r - i + K - 1, c - j + K - 1
                position = rpb[:, y : y + K, z : z + K].reshape(heads, -1)
                attn = softmax(affinity @ weight[part].T + bias[part] + position)
                attn = attn.reshape(B, heads, K, K)
                window = x[:, half, :, :, r : r + K, c : c + K]
                out[:, half, :, :, i, j] = np.einsum("bnpq,bndpq->bnd", attn, window)
    return out.reshape(B, C, H, W)


# Maps as small as the large window and larger ones, up to and above 256 pixels; numbers of channels
# of a head that fill 8 lanes and that do not; few images and more than 16.
@pytest.mark.parametrize(
    "B, heads, query_dim, value_dim, H, W, K1, K2, regions",
    [
        (2, 2, 12, 12, 9, 9, 5, 9, 7),
        (3, 4, 3, 8, 7, 7, 5, 7, 7),
        (17, 1, 5, 3, 8, 15, 3, 7, 3),
        (1, 3, 16, 21, 14, 13, 5, 13, 7),
        (1, 2, 8, 20, 17, 20, 5, 13, 7),
    ],
)
def test_contmix(B, heads, query_dim, value_dim, H, W, K1, K2, regions, monkeypatch):
    """By the kernel, and by the operators that run on a GPU; both have the same gradients.

    On a GPU by the operators alone.
    """
    generator = np.random.default_rng(0)

    def normal(*shape):
        return generator.standard_normal(shape).astype(np.float32)

    proj = Conv2d(regions**2, K1**2 + K2**2, kernel_size=1)
    arrays = [
        normal(B, heads * query_dim, H, W),
        normal(B, heads * query_dim, regions, regions),
        0.1 * normal(K1**2 + K2**2, regions**2, 1, 1),
        normal(K1**2 + K2**2),
        normal(heads, 2 * K1 - 1, 2 * K1 - 1),
        normal(heads, 2 * K2 - 1, 2 * K2 - 1),
        normal(B, 2 * heads * value_dim, H, W),
    ]
    grad_out, results = jt.array(normal(B, 2 * heads * value_dim, H, W)), []
    for kernels in (True, False) if DEVICE == "cpu" else (False,):
        monkeypatch.setattr(contmix, "has_kernel", lambda _, answer=kernels: answer)
        monkeypatch.setattr(functions, "on_gpu", lambda answer=kernels: not answer)
        query, key, proj.weight, proj.bias, rpb1, rpb2, x = inputs = [jt.array(a) for a in arrays]
        out = contmix.contmix(query, key, proj, rpb1, rpb2, x)
        results.append([out.numpy()] + [g.numpy() for g in jt.grad((out * grad_out).sum(), inputs)])
    arrays[2] = arrays[2][:, :, 0, 0]
    expected = contmix_float64(*(a.astype(np.float64) for a in arrays))
    # Affinities sum up to 16 products, weights up to 49 affinities; logits of about 30 then go
    # through an exponential.
    assert all(error(result[0], expected) < 1e-5 for result in results)
    for kernel, operators in zip(results[0], results[-1]):
        assert error(kernel, operators) < 2e-5


def test_merged_branches_are_the_branches(kernels, monkeypatch):
    """In evaluation without gradients, a dilated reparam block is a single convolution.

    With gradients it is all of its branches.
    """
    generator = np.random.default_rng(0)
    block = DilatedReparamBlock(12, 13, deploy=False)
    for var in block.state_dict().values():
        var.update(jt.array(generator.uniform(0.5, 1.5, var.shape).astype(np.float32)))
    block.eval()
    if kernels == "cuda":  # the depthwise kernels alone, for Jittor's own operators know the device
        monkeypatch.setattr(functions, "on_gpu", lambda: True)
    x = jt.array(generator.standard_normal((3, 12, 9, 16)).astype(np.float32))
    with jt.no_grad():
        merged = block(x).numpy()
    assert error(merged, block(x).numpy()) < 2e-6
    assert np.abs(jt.grad(block(x).sum(), [x])[0].numpy()).max() > 0


def norm_gelu(dim):
    return BatchNorm2d(dim), nn.GELU()


DILATED = dict(padding=2, dilation=2, groups=5, bias=False)
SEQUENCES = [
    lambda: [Conv2d(5, 9, 3, stride=2, padding=1, bias=False), *norm_gelu(9)],
    lambda: [Conv2d(5, 14, 1), nn.GELU(), Conv2d(14, 5, 1), nn.SiLU()],
    lambda: [Conv2d(5, 30, 3, padding=1), BatchNorm2d(30), nn.SiLU(), Conv2d(30, 3, 1)],
    lambda: [Conv2d(5, 5, 3, padding=1, groups=5), *norm_gelu(5), ResDWConv(5), *norm_gelu(5)],
    lambda: [Conv2d(5, 5, 3, **DILATED), *norm_gelu(5), nn.Sigmoid()],
]


@pytest.mark.parametrize("layers", SEQUENCES)
def test_convolutions_apply_the_norm_and_the_activation_after_them(layers):
    """In inference a FusedSequential is its layers, one after another, in fewer kernels.

    Where gradients are wanted it has them.
    """
    generator = np.random.default_rng(0)
    sequential = FusedSequential(*layers())
    for var in sequential.state_dict().values():
        var.update(jt.array(generator.uniform(0.5, 1.5, var.shape).astype(np.float32)))
    sequential.eval()
    # A tile of 16 columns ends within an image.
    x = jt.array(generator.standard_normal((3, 5, 7, 5)).astype(np.float32))
    one_by_one = x
    for layer in sequential:
        one_by_one = layer(one_by_one)
    with jt.no_grad():
        together = sequential(x).numpy()
    assert error(together, one_by_one.numpy()) < 2e-6
    assert np.abs(jt.grad(sequential(x).sum(), [x])[0].numpy()).max() > 0


def run_training(module, x, grad_y):
    """y of `module` in training, the gradients of sum(y * grad_y), and the running statistics."""
    module.train()
    x, parameters = jt.array(x), [p for p in module.parameters() if not p.is_stop_grad()]
    y = module(x)
    grads = jt.grad((y * jt.array(grad_y)).sum(), [x, *parameters])
    statistics = [v for name, v in module.state_dict().items() if "running" in name]
    return [v.numpy() for v in (y, *grads, *statistics)]


@cpu_only("a GPU fuses none of them in training")
@pytest.mark.parametrize("shape", [(2, 9, 9), (1, 9, 6), (5, 7, 6), (3, 17, 6)])
@pytest.mark.parametrize(
    "channels, make",
    [
        (24, lambda: DilatedReparamBlock(24, 13, deploy=False)),
        (7, lambda: DilatedReparamBlock(7, 7, deploy=False)),
        (24, lambda: SEModule(24)),
        (9, lambda: FusedSequential(BatchNorm2d(9), nn.GELU())),
        (9, lambda: FusedSequential(BatchNorm2d(9), nn.SiLU(), nn.GELU())),
        (9, lambda: FusedSequential(LayerScale(9, 0.5), nn.SiLU())),
    ],
)
def test_fused_layers_train_as_single_ones(channels, make, shape):
    """Values, gradients and running statistics."""
    generator = np.random.default_rng(0)
    module, plain = make(), make()
    for var, other in zip(module.state_dict().values(), plain.state_dict().values()):
        if var.dtype == "float32":
            var.update(jt.array(generator.uniform(-1, 1, var.shape).astype(np.float32)))
            other.update(var)
    x = (generator.standard_normal((shape[0], channels, *shape[1:])) + 2).astype(np.float32)
    grad_y = generator.standard_normal(x.shape).astype(np.float32)
    for layer in plain.modules():
        layer.register_forward_hook(lambda *_: None)  # nothing is fused over a hook
    actual, expected = (run_training(m, x, grad_y) for m in (module, plain))
    # Where a gradient is a sum that cancels, its rounding is that of the other gradients.
    least = 0.01 * max(np.abs(e).max() for e in expected)
    for a, e in zip(actual, expected, strict=True):
        assert np.abs(a - e).max() < 3e-5 * max(np.abs(e).max(), least)


@cpu_only("a CPU's kernel")
def test_activations():
    """GELU and SiLU and their derivatives against float64, from the tails to around 0."""
    x = np.concatenate([np.linspace(-30, 30, 10007), np.geomspace(1e-20, 1e-3, 99)])
    x = x.astype(np.float32)
    z = x.astype(np.float64)
    normal = np.vectorize(math.erfc)(-z / 2**0.5) / 2
    sigmoid = 1 / (1 + np.exp(-z))
    expected = {
        nn.GELU: (z * normal, normal + z * np.exp(-z * z / 2) / (2 * np.pi) ** 0.5),
        nn.SiLU: (z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))),
    }
    for kind, (value, derivative) in expected.items():
        var = jt.array(x)
        y = ActivationFunction.apply(var, kind())
        limit = 3e-7 * np.maximum(np.abs(z), 1)
        assert (np.abs(y.numpy() - value) < limit).all()
        assert (np.abs(jt.grad(y.sum(), var).numpy() - derivative) < limit).all()
        small = np.abs(x) < 1e-3
        assert np.allclose(y.numpy()[small], value[small], rtol=3e-7, atol=0)


@pytest.mark.parametrize("training", (False, True))
def test_nothing_is_fused_over_a_hook(training):
    """A hook on a layer fires, with that layer's own output, and the result stays."""
    generator = np.random.default_rng(0)
    block, dim = DilatedReparamBlock(5, 7, deploy=False), 5
    layers = [Conv2d(5, 5, 3, padding=1), BatchNorm2d(5), nn.GELU(), block]
    layers += [Conv2d(5, 9, 1), nn.SiLU()]
    sequential = FusedSequential(*layers)
    for var in sequential.state_dict().values():
        var.update(jt.array(generator.uniform(0.5, 1.5, var.shape).astype(np.float32)))
    sequential.train() if training else sequential.eval()
    x = jt.array(generator.standard_normal((2, dim, 6, 5)).astype(np.float32))
    with nullcontext() if training else jt.no_grad():
        expected = sequential(x).numpy()
        for layer in [*layers, block.dil_conv_k3_2, block.origin_bn]:
            after = (layer.register_forward_hook, layer.remove_forward_hook)
            before = (layer.register_pre_forward_hook, layer.remove_pre_forward_hook)
            for register, remove in (after, before):
                calls = []
                register(lambda *arguments, calls=calls: calls.append(arguments[0]))
                assert error(sequential(x).numpy(), expected) < 2e-6
                assert calls == [layer], layer
                remove()


def test_adamw(kernels):
    """Parameters of several ranks, their moments and the step count follow torch.optim.AdamW."""
    generator = np.random.default_rng(0)
    shapes = [(5,), (3, 4), (2, 3, 3, 3), (7,)] * 20
    arrays = [generator.standard_normal(shape).astype(np.float32) for shape in shapes]
    params = [jt.array(a) for a in arrays]
    targets = [jt.array(generator.standard_normal(a.shape).astype(np.float32)) for a in arrays]
    # 1 - 0.999 in float32 is off by 1e-5.
    optimizer = AdamW(params, lr=1e-2, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.1)
    expected, m, v = [a.astype(np.float64) for a in arrays], [0] * len(arrays), [0] * len(arrays)
    for step in range(1, 6):
        optimizer.step(sum(((p - t) * (p - t)).sum() for p, t in zip(params, targets)))
        for i, target in enumerate(targets):
            grad = 2 * (expected[i] - target.numpy())
            m[i], v[i] = 0.9 * m[i] + 0.1 * grad, 0.999 * v[i] + 0.001 * grad**2
            step_size, correction = 1e-2 / (1 - 0.9**step), (1 - 0.999**step) ** 0.5
            decayed = expected[i] * (1 - 1e-2 * 0.1)
            expected[i] = decayed - step_size * m[i] / (np.sqrt(v[i]) / correction + 1e-6)
    for i, param in enumerate(params):
        assert error(param.numpy(), expected[i]) < 2e-6
        assert error(optimizer.param_groups[0]["m"][i].numpy(), m[i]) < 2e-6
        assert error(optimizer.param_groups[0]["values"][i].numpy(), v[i]) < 2e-6
    assert optimizer.n_step == 5


def test_clipping_and_averaging_many_vars(kernels):
    """Of several ranks and more than one kernel takes, one of them larger than a block."""
    generator = np.random.default_rng(0)
    shapes = [(5,), (3, 4), (60, 30), (7,)] * 20
    arrays, ends = (
        [generator.standard_normal(shape).astype(np.float32) for shape in shapes] for _ in range(2)
    )
    norm = np.sqrt(sum((a.astype(np.float64) ** 2).sum() for a in arrays))
    for max_norm in (0.5, 2 * norm):
        grads = [jt.array(a) for a in arrays]
        clip_grad_norm(grads, max_norm)
        factor = min(max_norm / (norm + 1e-6), 1)
        for grad, a in zip(grads, arrays):
            assert error(grad.numpy(), factor * a.astype(np.float64)) < 1e-6
    starts = [jt.array(a) for a in arrays]
    lerp(starts, [jt.array(b) for b in ends], 0.3)
    for start, a, b in zip(starts, arrays, ends):
        assert error(start.numpy(), a + 0.3 * (b.astype(np.float64) - a)) < 1e-6


@pytest.mark.parametrize("shape", [(3, 5, 4, 4), (2, 24, 7, 9)])
def test_grn(shape, kernels):
    generator = np.random.default_rng(0)
    x, grad_y = (generator.standard_normal(shape).astype(np.float32) for _ in range(2))
    x[0, 1] = 0  # a dead channel
    of_channels = (1, shape[1], 1, 1)
    gamma, beta = (generator.standard_normal(of_channels).astype(np.float32) for _ in range(2))
    inputs = [jt.array(a) for a in (x, gamma, beta)]
    out = GRNFunction.apply(*inputs)
    grads = [g.numpy() for g in jt.grad((out * jt.array(grad_y)).sum(), inputs)]

    x, grad_y = x.astype(np.float64), grad_y.astype(np.float64)
    norm = np.sqrt((x * x).sum((2, 3), keepdims=True))
    mean = norm.mean(1, keepdims=True) + 1e-6
    assert error(out.numpy(), (gamma * norm / mean + 1) * x + beta) < 2e-6
    dot = (grad_y * x).sum((2, 3), keepdims=True)
    grad_norm = gamma * dot / mean - (gamma * dot * norm).mean(1, keepdims=True) / mean**2
    direction = np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)
    grad_x = (gamma * norm / mean + 1) * grad_y + grad_norm * direction
    assert error(grads[0], grad_x) < 2e-6
    assert error(grads[1], (dot * norm / mean).sum(0, keepdims=True)) < 2e-6
    assert error(grads[2], grad_y.sum((0, 2, 3)).reshape(1, -1, 1, 1)) < 2e-6


@cpu_only("about the CPU's threads")
def test_the_thread_count_changes_no_bit_of_a_step(tmp_path):
    """One thread writes each number, in one order: in our kernels as in those of Jittor."""
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import numpy as np
from jittor_impl import models, train
from jittor_impl.aligned.start import jt
generator = np.random.default_rng(0)
model = models.overlock_xxt(num_classes=20)
model.train()
images = jt.array(generator.standard_normal((21, 3, 64, 64)).astype(np.float32))
output = model(images)
parameters = list(train.trainable(model).values())
grads = jt.grad((output["main"] * output["main"] + output["aux"]).sum(), parameters)
optimizer = train.make_optimizer(model, train.make_parser().parse_args([]))
optimizer.step((output["main"] * output["aux"]).sum())
np.savez(sys.argv[1], output["main"].numpy(), *[v.numpy() for v in [*grads, *parameters]])
"""
    results = []
    for threads in ("1", "2"):
        out, environment = tmp_path / f"{threads}.npz", {**os.environ, "OMP_NUM_THREADS": threads}
        subprocess.run([sys.executable, "-c", code, out], check=True, env=environment)
        results.append(dict(np.load(out)))
    assert results[0].keys() == results[1].keys() and len(results[0]) > 1000
    assert all(np.array_equal(results[0][key], results[1][key]) for key in results[0])


def test_indices_are_uploaded_once(monkeypatch):
    """The copy is a stop of the GPU; the numbers are those that a CPU indexes with."""
    rpb = jt.array(np.random.default_rng(0).standard_normal((2, 9, 9)).astype(np.float32))
    expected = contmix.position_bias(rpb, 7, 6).numpy()
    monkeypatch.setattr(functions, "on_gpu", lambda: True)
    assert np.array_equal(contmix.position_bias(rpb, 7, 6).numpy(), expected)
    sizes = contmix.relative_position_index, 7, 6, 5
    assert functions.uploaded(*sizes) is functions.uploaded(*sizes)


def test_operators_of_a_gpu():
    """None lacks a version for CUDA: it would stop the GPU and go by way of the host.

    And there are no more of them than there were: a GPU waits for their launches.
    """
    command = [sys.executable, ROOT / "tests" / "gpu_graph.py"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    limits = {
        "training": 3200,
        "inference": 1600,
        "clipping and EMA": 90,
    }  # they are 3178, 1590, 83
    # What Jittor's src/ops has for the CPU alone; there are CUDA libraries for the last three.
    for name, operators in json.loads(result.stdout.splitlines()[-1]).items():
        lacking = {"transpose", "arg_reduce", "argsort", "random"} & operators.keys()
        assert not lacking, (name, lacking)
        assert sum(operators.values()) <= limits[name], (name, operators)


@cpu_only("a GPU's kernels take half precision too")
def test_half_precision_is_refused():
    x, gamma, beta = jt.zeros((1, 2, 3, 3)), jt.zeros((1, 2, 1, 1)), jt.zeros((1, 2, 1, 1))
    message = "kernels are for float32, got float16, float32, float32; use x.float32"
    with pytest.raises(ValueError, match=message):
        GRNFunction.apply(x.float16(), gamma, beta)


def test_types_that_differ_are_refused():
    attn, value = jt.zeros((1, 2, 3, 3, 9)), jt.zeros((1, 2, 3, 3, 4))
    message = "attn and value must be of one type, got float16, float32"
    with pytest.raises(ValueError, match=message):
        ops.na2d_av(attn.float16(), value, 3)
    norm = BatchNorm2d(2)
    norm.train()
    norm.running_mean, norm.running_var = norm.running_mean.float16(), norm.running_var.float16()
    with pytest.raises(ValueError, match="statistics must be float32"):
        norm(jt.zeros((1, 2, 3, 3)))


def test_shapes_that_do_not_fit_are_refused():
    """The kernels read what the shapes say, so wrong ones must not reach them."""
    with pytest.raises(ValueError, match="3 channels got 4"):
        Conv2d(3, 8, 3, padding=1)(jt.zeros((1, 4, 8, 8)))
    with pytest.raises(ValueError, match="smaller than the kernel"):
        Conv2d(3, 8, 3, stride=2)(jt.zeros((1, 3, 2, 2)))
    block = DilatedReparamBlock(3, 7, deploy=False)
    for layer in (ResDWConv(3), BatchNorm2d(3), LayerNorm2d(3), GRN(3), block):
        with pytest.raises(ValueError, match="3 channels got 4"):
            layer(jt.zeros((1, 4, 8, 8)))
        layer.eval()
        with jt.no_grad(), pytest.raises((ValueError, RuntimeError)):
            layer(jt.zeros((1, 4, 8, 8))).sync()
    with pytest.raises((ValueError, RuntimeError)):
        cat_channels([jt.zeros((2, 3, 8, 8)), jt.zeros((2, 3, 4, 4))]).sync()
    with pytest.raises((ValueError, AssertionError)):
        split_channels(jt.zeros((2, 10, 4, 4)), (4, 4))
