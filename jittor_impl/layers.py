"""The layers that OverLoCK is built of. Shapes are (B, C, H, W) unless a comment says otherwise."""

import numpy as np
from .aligned.functions import GRNFunction, LayerNormFunction, LayerScaleFunction, convolve
from .aligned.launch import cast, has_kernel
from .aligned.nn import AdaptiveAvgPool2d, BatchNorm2d, Conv2d, squeeze_excite, sum_of_branches
from .aligned.nn import FusedSequential as Sequential
from .aligned.start import jt, nn

# The parallel branches beside a large kernel: its size, then (kernel size, dilation) of each branch
# (UniRepLKNet, arXiv 2311.15599, section 3.1).
DILATED_BRANCHES = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


class DropPath(nn.Module):
    """Stochastic depth: in training, drops a sample's whole branch with probability `drop_prob`.

    NumPy draws, so both frameworks drop the same: by `seed`, a list of numbers, where it is set
    (OverLoCK.seed_drop_path), else by NumPy's global generator. timm's arithmetic. `part`: which
    samples of a larger batch these are, where it is computed in parts (distributed.py).
    """

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob
        self.seed = self.part = None

    def execute(self, x):
        if not self.training or self.drop_prob == 0:
            return x
        # Drawn anew from the seed, not from a generator that goes on: a block that is computed
        # twice, for gradient checkpointing, drops the same.
        draw = np.random.random if self.seed is None else np.random.default_rng(self.seed).random
        keep = draw(x.shape[0] if self.part is None else self.part.places[-1] + 1)
        keep = (keep if self.part is None else keep[self.part.places]) >= self.drop_prob
        scale = (keep / (1 - self.drop_prob)).astype(np.float32).reshape(-1, 1, 1, 1)
        return x * cast(jt.array(scale), x.dtype)


class SEModule(nn.Module):
    """Squeeze-and-excitation: a gate per channel from the channel's mean over the map."""

    def __init__(self, dim, reduction=8):
        super().__init__()
        inner_dim = max(16, dim // reduction)
        self.proj = Sequential(
            AdaptiveAvgPool2d(1),
            Conv2d(dim, inner_dim, kernel_size=1),
            nn.GELU(),
            Conv2d(inner_dim, dim, kernel_size=1),
            nn.Sigmoid(),
        )

    def execute(self, x):
        return squeeze_excite(x, self.proj)


class LayerScale(nn.Module):
    """A scale and a shift per channel.

    The weight has a depthwise 1x1 convolution's shape, as the official keys do.
    """

    def __init__(self, dim, init_value):
        super().__init__()
        self.weight = jt.full((dim, 1, 1, 1), float(init_value))
        self.bias = jt.zeros(dim)

    def execute(self, x):
        if has_kernel(LayerScaleFunction, x, self.weight):
            return LayerScaleFunction.apply(x, self.weight, self.bias)
        x = x * self.weight.reshape(1, -1, 1, 1)  # (C, 1, 1, 1) -> (1, C, 1, 1)
        return x + self.bias.reshape(1, -1, 1, 1)  # (C,) -> (1, C, 1, 1)


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of each pixel."""

    def __init__(self, dim):
        super().__init__()
        self.eps = 1e-6
        self.weight = jt.ones(dim)
        self.bias = jt.zeros(dim)

    def execute(self, x):
        return LayerNormFunction.apply(x, self.weight, self.bias, self.eps)


class GRN(nn.Module):
    """Global Response Normalization (ConvNeXt V2, arXiv 2301.00808, section 3.2)."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = jt.zeros(1, dim, 1, 1)
        self.beta = jt.zeros(1, dim, 1, 1)

    def execute(self, x):
        return GRNFunction.apply(x, self.gamma, self.beta)


class ResDWConv(Conv2d):
    """3x3 depthwise convolution with a residual connection."""

    def __init__(self, dim):
        super().__init__(dim, dim, kernel_size=3, padding=1, groups=dim)

    def execute(self, x):
        return convolve(x, self, super().execute, residual=True)


def fuse_bn(conv, bn):
    """Weight and bias of a convolution that is `bn(conv(x))` in evaluation; `conv` has no bias."""
    scale = bn.weight / jt.sqrt(bn.running_var + bn.eps)
    # scale (C,) -> (C, 1, 1, 1), as the weight (C, 1, K, K)
    return conv.weight * scale.reshape(-1, 1, 1, 1), bn.bias - bn.running_mean * scale


def branch_names(kernel_size, dilation):
    """The official names of a dilated branch's convolution and BatchNorm."""
    return f"dil_conv_k{kernel_size}_{dilation}", f"dil_bn_k{kernel_size}_{dilation}"


class DilatedReparamBlock(nn.Module):
    """UniRepLKNet's sum of a large depthwise kernel and small dilated ones, each with a BatchNorm.

    `deploy=True` builds the merged form, one depthwise convolution with a bias.
    """

    def __init__(self, dim, kernel_size, deploy):
        super().__init__()
        padding = kernel_size // 2
        self.lk_origin = Conv2d(dim, dim, kernel_size, padding=padding, groups=dim, bias=deploy)
        self.dilated = () if deploy else DILATED_BRANCHES[kernel_size]
        if not deploy:
            self.origin_bn = BatchNorm2d(dim)
        for k, r in self.dilated:
            conv_name, bn_name = branch_names(k, r)
            conv = Conv2d(dim, dim, k, padding=r * (k // 2), dilation=r, groups=dim, bias=False)
            setattr(self, conv_name, conv)
            setattr(self, bn_name, BatchNorm2d(dim))

    def branches(self):
        """The pairs (convolution, BatchNorm) that are summed, that of the large kernel first."""
        pairs = [(self.lk_origin, self.origin_bn)]
        for k, r in self.dilated:
            conv_name, bn_name = branch_names(k, r)
            pairs.append((getattr(self, conv_name), getattr(self, bn_name)))
        return pairs

    def execute(self, x):
        if not self.dilated:
            return self.lk_origin(x)
        return sum_of_branches(self, x, self.branches())

    def merge_dilated_branches(self):
        """Merge all branches into `lk_origin`, for inference. Merging twice is harmless."""
        if not self.dilated:
            return
        large_k = self.lk_origin.weight.shape[2]
        (conv, bn), *others = self.branches()
        weight, bias = fuse_bn(conv, bn)
        for (k, r), (conv, bn) in zip(self.dilated, others):
            branch_weight, branch_bias = fuse_bn(conv, bn)
            # A k x k kernel with dilation r is a dense one, taps r apart around the same centre.
            reach = r * (k // 2)
            taps = slice(large_k // 2 - reach, large_k // 2 + reach + 1, r)
            weight[:, :, taps, taps] += branch_weight
            bias += branch_bias
            for name in branch_names(k, r):
                delattr(self, name)
        # The parameters stay the same objects: Jittor freezes new ones made in evaluation mode.
        self.lk_origin.weight.update(weight)
        self.lk_origin.bias = self.origin_bn.bias
        self.lk_origin.bias.update(bias)
        del self.origin_bn
        self.dilated = ()
