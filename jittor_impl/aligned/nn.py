"""Layers of PyTorch that Jittor 1.3.11 lacks or computes otherwise, with PyTorch's arithmetic.

Jittor's BatchNorm and LayerNorm take the variance as E[x²] - E[x]², which loses digits where the mean is large
beside the spread (2e-4 at a ratio of 20); its BatchNorm keeps the biased variance; its AdaptiveAvgPool2d cuts
windows of equal size, which is wrong for, say, 9 -> 7. Shapes are (B, C, H, W) unless a comment says otherwise.
"""
from functools import lru_cache

import numpy as np
import fused
from jittor_setup import jt
from jittor import nn
from ops import cast, check_channels, kernel_types


def on_cpu():
    """Whether a kernel that fused.py has for the CPU alone is to be used; on a GPU its formula runs as Jittor's operators."""
    return not jt.flags.use_cuda


def inferring(module):
    """Whether `module` may run kernels for inference, which have no gradient: it is in evaluation mode under no_grad."""
    return on_cpu() and not module.is_training() and jt.flags.no_grad


class Sequential(nn.Sequential):
    """torch.nn.Sequential. In inference a convolution takes the BatchNorm and the activation after it along."""

    def execute(self, x):
        if not inferring(self):
            return super().execute(x)
        layers = list(self.layers.values())
        while layers:
            layer = layers.pop(0)
            if type(layer) is not Conv2d:
                x = layer(x)
                continue
            norm = layers.pop(0) if layers and isinstance(layers[0], BatchNorm2d) else None
            activation = layers.pop(0) if layers and type(layers[0]) in fused.ACTIVATIONS else None
            x = layer.infer(x, norm, activation)
        return x


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d. A depthwise one that keeps the map's size is a kernel of ours, a dense one is on the CPU."""

    def execute(self, x):
        self.check(x)
        if self.is_dense() and on_cpu():
            return fused.DenseConv.apply(x, self.weight, self.bias, self.stride[0], self.padding[0], self.dilation[0])
        return self.depthwise(x, residual=False) if self.keeps_size() else super().execute(x)

    def infer(self, x, norm, activation):
        """activation(norm(self(x))) in inference; a BatchNorm2d and one of fused.ACTIVATIONS, or None."""
        self.check(x)
        if self.is_dense():
            return fused.dense_norm(x, self, norm, activation)
        if self.keeps_size() and self.dilation == (1, 1):
            return fused.merged_depthwise(x, [(self, norm)], activation)
        for layer in (self, norm, activation):
            x = x if layer is None else layer(x)
        return x

    def check(self, x):
        check_channels("Conv2d", x, self.in_channels)

    def is_dense(self):
        """Whether it is a convolution of our dense kernel: in one group, the same along both axes."""
        return self.groups == 1 and all(a == b for a, b in (self.stride, self.padding, self.dilation))

    def keeps_size(self):
        """Whether it is a convolution of our depthwise kernel: depthwise, odd, the same along both axes, map to map."""
        (k, k2), (d, d2) = self.kernel_size, self.dilation
        return (self.is_depthwise_conv and k == k2 and d == d2 and k % 2 == 1
                and self.stride == (1, 1) and self.padding == (d * (k // 2),) * 2)

    def depthwise(self, x, residual):
        """The depthwise convolution of x, plus x itself if `residual`; for one that `keeps_size`."""
        if x.dtype in kernel_types() and (on_cpu() or fused.fits_gpu(self.kernel_size[0], self.dilation[0])):
            weight, bias = (None if v is None else cast(v, x.dtype) for v in (self.weight, self.bias))
            return fused.DepthwiseConv.apply(x, weight, bias, self.dilation[0], residual)
        return x + super().execute(x) if residual else super().execute(x)


class BatchNorm2d(nn.Module):
    """torch.nn.BatchNorm2d: variance in two passes, running_var unbiased, num_batches_tracked kept."""

    def __init__(self, num_features, eps=1e-5, momentum=0.1):
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.weight = jt.ones(num_features)
        self.bias = jt.zeros(num_features)
        # Without stop_grad() the optimizer would train and decay the statistics.
        self.running_mean = jt.zeros(num_features).stop_grad()
        self.running_var = jt.ones(num_features).stop_grad()
        self.num_batches_tracked = jt.array(np.zeros((), np.int32)).stop_grad()

    def execute(self, x):
        if not self.is_training():
            scale = self.weight / jt.sqrt(self.running_var + self.eps)
            shift = self.bias - self.running_mean * scale
            return cast(x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1), x.dtype)  # (C,) -> (1, C, 1, 1)
        count = x.numel() // x.shape[1]
        if count < 2:
            raise ValueError(f"BatchNorm2d in training needs more than one value per channel, got shape {x.shape}")
        self.num_batches_tracked.update(self.num_batches_tracked + 1)
        return fused.BatchNorm.apply(x, self.weight, self.bias, self)


class LayerNorm(nn.Module):
    """Weight, bias and eps of a LayerNorm over the last axis."""

    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = jt.ones(dim)
        self.bias = jt.zeros(dim)


def channel_norm(x, weight, bias, eps):
    """Normalise each pixel over its channels: torch's layer_norm on the axis C of x, in two passes."""
    return fused.ChannelNorm.apply(x, weight, bias, eps)


def grn(x, gamma, beta):
    """Global Response Normalization. Where a channel is 0 its norm's gradient is 0, as in PyTorch, not NaN."""
    return fused.GRN.apply(x, gamma, beta)


class AdaptiveAvgPool2d(nn.Module):
    """torch.nn.AdaptiveAvgPool2d for a square output."""

    def __init__(self, output_size):
        super().__init__()
        self.output_size = output_size

    def execute(self, x):
        return adaptive_avg_pool2d(x, (self.output_size, self.output_size))


def adaptive_avg_pool2d(x, size):
    """torch.nn.functional.adaptive_avg_pool2d: (B, C, H, W) -> (B, C, *size)."""
    if tuple(size) == (1, 1):
        return x.mean((2, 3), keepdims=True)  # (B, C, 1, 1)
    return separable(x, pooling_matrix(x.shape[2], size[0]), pooling_matrix(x.shape[3], size[1]))


def interpolate(x, size, mode, align_corners):
    """torch.nn.functional.interpolate, mode "bilinear" with align_corners=False: (B, C, H, W) -> (B, C, *size)."""
    if mode != "bilinear" or align_corners:
        raise ValueError(f"interpolate: only bilinear with align_corners=False, got {mode}, {align_corners}")
    return separable(x, bilinear_matrix(x.shape[2], size[0]), bilinear_matrix(x.shape[3], size[1]))


def separable(x, rows, cols):
    """rows @ x @ cols.T: (B, C, H, W), (h, H), (w, W) -> (B, C, h, w).

    Pooling and interpolation are linear and act on each axis by itself. As two products with small constant
    matrices they are exact to rounding, gradients included, with no scatter in the backward pass.
    """
    if on_cpu():
        return fused.Separable.apply(x, rows, cols)
    B, C, H, W = x.shape
    h, w = rows.shape[0], cols.shape[0]
    x = jt.matmul(x.reshape(B * C * H, W), cols.transpose(0, 1))  # (B, C, H, W) -> (B*C*H, W) -> (B*C*H, w)
    x = x.reshape(B * C, H, w).transpose(1, 2).reshape(B * C * w, H)  # (B*C, H, w) -> (B*C, w, H) -> (B*C*w, H)
    x = jt.matmul(x, rows.transpose(0, 1))  # (B*C*w, h)
    return x.reshape(B, C, w, h).transpose(2, 3)  # (B, C, w, h) -> (B, C, h, w)


def constant(array):
    """A Var that no optimizer trains and no gradient reaches."""
    return jt.array(array).stop_grad()


@lru_cache(maxsize=None)
def pooling_matrix(size, out_size):
    """(out_size, size): output i is the mean of inputs floor(i*size/out_size) to ceil((i+1)*size/out_size) - 1."""
    matrix = np.zeros((out_size, size), np.float32)
    for i in range(out_size):
        first, end = i * size // out_size, -(-(i + 1) * size // out_size)
        matrix[i, first:end] = 1 / (end - first)
    return constant(matrix)


@lru_cache(maxsize=None)
def bilinear_matrix(size, out_size):
    """(out_size, size): output i samples the input at (i + 0.5) * size / out_size - 0.5, not below 0."""
    matrix = np.zeros((out_size, size), np.float32)
    scale = np.float32(size) / np.float32(out_size)
    for i in range(out_size):
        position = max(np.float32(i + 0.5) * scale - np.float32(0.5), np.float32(0))
        low = min(int(position), size - 1)
        high = min(low + 1, size - 1)
        matrix[i, low] += 1 - (position - low)
        matrix[i, high] += position - low
    return constant(matrix)
