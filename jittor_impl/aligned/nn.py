"""torch.nn's layers that Jittor 1.3.11 lacks or computes otherwise, with PyTorch's arithmetic.

Jittor's BatchNorm and LayerNorm take the variance as E[x²] - E[x]², which loses digits where the
mean is large beside the spread (2e-4 at a ratio of 20); its BatchNorm keeps the biased variance;
its AdaptiveAvgPool2d cuts windows of equal size, which is wrong for, say, 9 -> 7.

Shapes are (B, C, H, W) unless a comment says otherwise.
"""

from itertools import takewhile

import numpy as np
from .functions import (
    ACTIVATIONS,
    ActivationFunction,
    BatchNormFunction,
    SqueezeExciteFunction,
    adaptive_avg_pool2d,
    convolve,
    fused_convolution,
    has_fused_kernel,
    has_merged_kernel,
    merged_depthwise,
    without_gradient,
)
from .launch import cast, has_kernel
from .reparam import has_reparam_kernel, reparam
from .start import jt, nn


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d; by kernels of ours where there is one (functions.py)."""

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        padding_mode="zeros",
    ):
        if isinstance(padding, str) or padding_mode != "zeros":
            raise ValueError(
                f"Conv2d: only a padding in numbers, with zeros, got {padding}, {padding_mode}"
            )
        # Jittor's takes a list for the size along each axis.
        sizes = (tuple(n) if isinstance(n, list) else n for n in (kernel_size, stride, padding))
        dilation = tuple(dilation) if isinstance(dilation, list) else dilation
        super().__init__(in_channels, out_channels, *sizes, dilation, groups, bias)

    def execute(self, x):
        return convolve(x, self, super().execute)


class BatchNorm2d(nn.Module):
    """torch.nn.BatchNorm2d: two-pass variance, unbiased running_var, num_batches_tracked kept.

    BatchNorm1d and BatchNorm3d too: x (B, C) or (B, C, ...).
    """

    def __init__(self, num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True):
        super().__init__()
        if momentum is None or not affine or not track_running_stats:
            raise ValueError(
                "BatchNorm2d: only with a momentum, affine=True and track_running_stats=True, got "
                f"{momentum}, {affine}, {track_running_stats}"
            )
        self.eps = eps
        self.momentum = momentum
        self.weight = jt.ones(num_features)
        self.bias = jt.zeros(num_features)
        # Without stop_grad() the optimizer would train and decay the statistics.
        self.running_mean = jt.zeros(num_features).stop_grad()
        self.running_var = jt.ones(num_features).stop_grad()
        self.num_batches_tracked = jt.array(np.zeros((), np.int32)).stop_grad()

    def execute(self, x):
        if x.ndim != 4:
            # (B, C, ...) -> (B, C, n, 1) and back
            return self.execute(x.reshape(*x.shape[:2], -1, 1)).reshape(x.shape)
        if not self.training:
            scale = self.weight / jt.sqrt(self.running_var + self.eps)
            shift = self.bias - self.running_mean * scale
            # (C,) -> (1, C, 1, 1)
            return cast(x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1), x.dtype)
        return self.normalize(x)

    def normalize(self, x, activation=None):
        """activation(x (B, C, H, W) by the batch's statistics); None or one of ACTIVATIONS."""
        if x.numel() // x.shape[1] < 2:
            raise ValueError(
                "BatchNorm2d in training needs more than one value per channel, "
                f"got shape {x.shape}"
            )
        function = BatchNormFunction()
        variables = self.weight, self.bias, self.statistics()
        y = function(x, *variables, self.momentum, self.eps, activation)
        self.keep_statistics(*function.statistics)
        return y

    def statistics(self):
        """Running mean and variance, and the number of batches in them, as kernels take it."""
        return self.running_mean, self.running_var, cast(self.num_batches_tracked, "int32")

    def keep_statistics(self, *new):
        """Let what `statistics` returns be `new`."""
        own = self.running_mean, self.running_var, self.num_batches_tracked
        for var, value in zip(own, new):
            var.update(value)


def infers(module):
    """Whether `module` may run kernels that stand for several layers and have no gradient.

    It may in evaluation mode under no_grad.
    """
    return not module.training and without_gradient()


def fuses(module):
    """Whether `module` may run kernels that stand for several layers and have a gradient.

    In evaluation with gradients every layer runs by itself, so that align.py can compare each.
    """
    return module.training or without_gradient()


def is_hooked(layer):
    """Whether `layer` has a hook, which wants its input or output: nothing is fused over it."""
    return hasattr(layer, "__fhook__") or hasattr(layer, "__fhook2__")


class FusedSequential(nn.Sequential):
    """torch.nn.Sequential.

    On a CPU a BatchNorm and the activation after it are one kernel; in inference those and the
    convolution before them.
    """

    def execute(self, x):
        layers = list(self.layers.values())
        while layers:
            norm, activation = followers(layers) if infers(self) else (None, None)
            count = 1 + (norm is not None) + (activation is not None)
            if count > 1:
                x = fused_convolution(x, layers[0], norm, activation)
            elif normalizes_and_activates(layers):
                x, count = layers[0].normalize(x, layers[1]), 2
            elif is_activation(layers[0]) and fuses(self) and has_kernel(ActivationFunction, x):
                x = ActivationFunction.apply(x, layers[0])
            else:
                x = layers[0](x)
            layers = layers[count:]
        return x


def followers(layers):
    """The BatchNorm and the activation that layers[0]'s kernel applies too, each None if not."""
    conv, *others = layers
    if type(conv) is not Conv2d or is_hooked(conv) or not has_fused_kernel(conv):
        return None, None
    others = list(takewhile(lambda layer: not is_hooked(layer), others))
    norm = others.pop(0) if others and isinstance(others[0], BatchNorm2d) else None
    activation = others[0] if others and is_activation(others[0]) else None
    return norm, activation


def is_activation(layer):
    return type(layer) in ACTIVATIONS and not is_hooked(layer)


def normalizes_and_activates(layers):
    """Whether the first two of `layers` are a BatchNorm in training and an activation."""
    if len(layers) < 2 or type(layers[0]) is not BatchNorm2d or is_hooked(layers[0]):
        return False  # a subclass of BatchNorm2d may compute something else
    norm, activation = layers[:2]
    single = has_kernel(ActivationFunction, norm.weight)
    return norm.training and is_activation(activation) and single


def squeeze_excite(x, gate):
    """x * gate(x); gate: a Sequential of pooling, Conv2d, GELU, Conv2d and Sigmoid.

    One kernel where there is one.
    """
    layers = list(gate.layers.values())
    _, conv1, _, conv2, _ = layers
    variables = conv1.weight, conv1.bias, conv2.weight, conv2.bias
    hooked = any(map(is_hooked, [gate, *layers]))
    if hooked or not fuses(gate) or not has_kernel(SqueezeExciteFunction, x, *variables):
        return x * gate(x)
    return SqueezeExciteFunction.apply(x, *variables)


def sum_of_branches(module, x, branches):
    """The sum of norm(conv(x)) over `branches` of `module`.

    branches: pairs (depthwise Conv2d, BatchNorm2d), the largest kernel first. In training they are
    one kernel; in inference they are merged into one convolution at every call, as `reparam` does
    for good.
    """
    hooked = any(is_hooked(layer) for branch in branches for layer in branch)
    if infers(module) and not hooked and has_merged_kernel(x, branches):
        return merged_depthwise(x, branches)
    # A subclass of BatchNorm2d computes something else, in training.
    plain = all(type(norm) is BatchNorm2d and norm.training for _, norm in branches)
    if plain and not hooked and has_reparam_kernel(x, branches):
        return reparam(x, branches)
    out = None
    for conv, norm in branches:
        out = norm(conv(x)) if out is None else out + norm(conv(x))
    return out


class LayerNorm(nn.Module):
    """torch.nn.LayerNorm, over the last axes of x: two-pass variance."""

    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, bias=True):
        super().__init__()
        if isinstance(normalized_shape, int):
            normalized_shape = (normalized_shape,)
        self.normalized_shape = tuple(normalized_shape)
        self.eps = eps
        self.weight = jt.ones(self.normalized_shape) if elementwise_affine else None
        self.bias = jt.zeros(self.normalized_shape) if elementwise_affine and bias else None

    def execute(self, x):
        axes = tuple(range(x.ndim - len(self.normalized_shape), x.ndim))
        if tuple(x.shape[axes[0] :]) != self.normalized_shape:
            raise ValueError(f"LayerNorm of {self.normalized_shape} got shape {tuple(x.shape)}")
        x = x - x.mean(axes, keepdims=True)
        x = x / jt.sqrt((x * x).mean(axes, keepdims=True) + self.eps)
        x = x if self.weight is None else x * self.weight
        return x if self.bias is None else x + self.bias


class AdaptiveAvgPool2d(nn.Module):
    """torch.nn.AdaptiveAvgPool2d: an output size, or one for each axis, None for the input's."""

    def __init__(self, output_size):
        super().__init__()
        self.output_size = output_size

    def execute(self, x):
        size = self.output_size
        size = (size, size) if size is None or isinstance(size, int) else size
        # (B, C, H, W) -> (B, C, h, w)
        return adaptive_avg_pool2d(x, [n or own for n, own in zip(size, x.shape[2:])])
