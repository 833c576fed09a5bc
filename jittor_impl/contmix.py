"""ContMix, OverLoCK's context-mixing dynamic convolution (paper, section 3.2)."""

from functools import lru_cache

import numpy as np
from .aligned.functions import ContMixFunction, linear, permute, uploaded
from .aligned.launch import has_kernel
from .aligned.start import jt, nn
from .ops import na2d_av


@lru_cache(maxsize=16)  # a detector's maps come in many sizes, 80 MB for one of 200x320
def relative_position_index(height, width, kernel_size):
    """Where in a (2K-1, 2K-1) table stand the biases of each pixel's neighbours (K = kernel_size).

    At the borders a window is shifted, not clipped, so its first row lies 0 to K-1 rows above its
    pixel. Returns integers of shape (height, width, K*K), each below (2K-1)**2.
    """

    def offsets(size):
        i = np.arange(size)
        first = np.clip(i - kernel_size // 2, 0, size - kernel_size)
        return (first - i + kernel_size - 1)[:, None] + np.arange(kernel_size)  # (size, K)

    rows = offsets(height)[:, None, :, None] * (2 * kernel_size - 1)  # (H, 1, K, 1)
    cols = offsets(width)[None, :, None, :]  # (1, W, 1, K)
    return (rows + cols).reshape(height, width, kernel_size**2)  # (H, W, K, K) -> (H, W, K*K)


def position_bias(rpb, height, width):
    """Relative position bias, from rpb (heads, 2K-1, 2K-1) -> (heads, height, width, K*K)."""
    kernel_size = (rpb.shape[1] + 1) // 2
    index = uploaded(relative_position_index, height, width, kernel_size)  # (height, width, K*K)
    return rpb.flatten(1)[:, index]  # (heads, (2K-1)²) -> (heads, height, width, K*K)


def mixed_kernels(query, key, proj, rpb1, rpb2):
    """The kernels of `contmix`, which has the arguments.

    Returns each pixel's affinity to the regions (B, heads, H*W, S*S), and what it mixes by it:
    kernels (B, heads, H, W, k1²) and (B, heads, H, W, k2²), each of which sums to 1.
    """
    B, _, H, W = query.shape
    heads, k1, k2 = rpb1.shape[0], (rpb1.shape[1] + 1) // 2, (rpb2.shape[1] + 1) // 2
    # (B, dim/2, H, W) -> (B, heads, dim/2/heads, H*W) -> (B, heads, H*W, dim/2/heads)
    query = permute(query.reshape(B, heads, -1, H * W), (0, 1, 3, 2))
    # (B, dim/2, S, S) -> (B, heads, dim/2/heads, S*S)
    key = key.reshape(B, heads, query.shape[3], -1)
    affinity = query @ key  # (B, heads, H*W, S*S)
    # The 1x1 convolution over a pixel's S*S affinities is a linear map of the last axis, by
    # proj.weight (k1² + k2², S*S, 1, 1) -> (k1² + k2², S*S).
    weight = linear(affinity, proj.weight.flatten(1), proj.bias)
    # (B, heads, H*W, k1² + k2²) -> (B, heads, H, W, k1² + k2²)
    weight = weight.reshape(B, heads, H, W, k1**2 + k2**2)
    # (B, heads, H, W, k1² + k2²) -> (B, heads, H, W, k1²), (B, heads, H, W, k2²)
    attn1, attn2 = jt.split(weight, (k1**2, k2**2), dim=-1)
    attn1 = nn.softmax(attn1 + position_bias(rpb1, H, W), dim=-1)  # (B, heads, H, W, k1²)
    attn2 = nn.softmax(attn2 + position_bias(rpb2, H, W), dim=-1)  # (B, heads, H, W, k2²)
    return affinity, attn1, attn2


def contmix(query, key, proj, rpb1, rpb2, x):
    """Convolve x by kernels made at each pixel: half of the channels by small ones, half by large.

    A pixel's kernels, k1 x k1 and k2 x k2, are mixtures of learned kernels, by its affinity to the
    S*S regions of the context prior.

    Args:
        query: (B, dim/2, H, W)
        key: (B, dim/2, S, S)
        proj: the 1x1 convolution from S*S affinities to k1² + k2² weights
        rpb1, rpb2: relative position biases, (heads, 2*k1-1, 2*k1-1) and (heads, 2*k2-1, 2*k2-1)
        x: (B, dim, H, W)
    Returns:
        (B, dim, H, W)
    Raises:
        ValueError: if the map is smaller than a kernel or the shapes do not fit together.
    """
    B, C, H, W = x.shape
    heads, Q, S = rpb1.shape[0], query.shape[1], key.shape[3]
    k1, k2 = (rpb1.shape[1] + 1) // 2, (rpb2.shape[1] + 1) // 2
    shapes = [tuple(tensor.shape) for tensor in (query, key, proj.weight, proj.bias, rpb1, rpb2)]
    fitting = [
        (B, Q, H, W),
        (B, Q, S, S),
        (k1**2 + k2**2, S**2, 1, 1),
        (k1**2 + k2**2,),
        (heads, 2 * k1 - 1, 2 * k1 - 1),
        (heads, 2 * k2 - 1, 2 * k2 - 1),
    ]
    if min(H, W) < max(k1, k2) or C % (2 * heads) or Q % heads or shapes != fitting:
        raise ValueError(
            f"contmix: x {tuple(x.shape)}, {heads} heads, kernels {k1} and {k2}; query, key, "
            f"proj's weight and bias, rpb1 and rpb2 {shapes} do not fit, {fitting} would, "
            "where no kernel is larger than the map"
        )
    # On a CPU one kernel computes all of it (kernels/contmix_cpu.h). tests/test_functions.py holds
    # it to the definition in float64, and its gradients to those of the formula below, which is
    # what runs on a GPU.
    if has_kernel(ContMixFunction):
        return ContMixFunction.apply(query, key, proj.weight, proj.bias, rpb1, rpb2, x)
    _, attn1, attn2 = mixed_kernels(query, key, proj, rpb1, rpb2)
    # (B, dim, H, W) -> (B, 2, heads, dim/2/heads, H, W) -> (2, B, heads, H, W, dim/2/heads)
    value = permute(x.reshape(B, 2, heads, -1, H, W), (1, 0, 2, 4, 5, 3))
    x1 = na2d_av(attn1, value[0], k1)
    x2 = na2d_av(attn2, value[1], k2)
    x = jt.cat([x1, x2], dim=1)  # (B, 2*heads, H, W, dim/2/heads)
    x = permute(x, (0, 1, 4, 2, 3))  # (B, 2*heads, dim/2/heads, H, W)
    return x.reshape(B, C, H, W)  # (B, 2*heads, dim/2/heads, H, W) -> (B, dim, H, W)
