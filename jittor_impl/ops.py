"""na2d_av, neighbourhood attention's product of weights and values, which Jittor lacks."""

import numpy as np
from .aligned.functions import NA2dAVFunction


def check_na2d_av(attn_shape, value_shape, kernel_size):
    """Raise ValueError, with the shapes, unless they fit together as `na2d_av` describes."""
    shapes = f"attn {tuple(attn_shape)}, value {tuple(value_shape)}, kernel_size {kernel_size}"
    whole = isinstance(kernel_size, (int, np.integer))
    if not whole or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"na2d_av: kernel_size must be a positive odd integer: {shapes}")
    if len(attn_shape) != 5 or len(value_shape) != 5:
        raise ValueError(f"na2d_av: attn and value must have 5 axes: {shapes}")
    if tuple(attn_shape[:4]) != tuple(value_shape[:4]):
        raise ValueError(f"na2d_av: attn and value must agree in (B, heads, H, W): {shapes}")
    if attn_shape[4] != kernel_size**2:
        expected = f"kernel_size**2 = {kernel_size**2}"
        raise ValueError(f"na2d_av: the last axis of attn must be {expected}: {shapes}")
    if min(value_shape[2:4]) < kernel_size:
        raise ValueError(f"na2d_av: the map must be at least as large as the kernel: {shapes}")


def na2d_av(attn, value, kernel_size):
    """Weighted sum of each pixel's K x K window (NATTEN 0.17's `na2d_av`; ContMix, equation 3).

    With r(i) = clamp(i - K//2, 0, H - K) and c(j) likewise (at the borders the window is shifted,
    not clipped), each head of each sample is

        out[i, j, d] = sum over p, q < K of attn[i, j, p*K + q] * value[r(i) + p, c(j) + q, d].

    Args:
        attn: weights, (B, heads, H, W, K*K)
        value: (B, heads, H, W, dim), of the same type
        kernel_size: K, odd, at most min(H, W)
    Returns:
        (B, heads, H, W, dim), differentiable in attn and value.
    Raises:
        ValueError: on shapes or types that do not fit together, which the message names.
    """
    check_na2d_av(attn.shape, value.shape, kernel_size)
    return NA2dAVFunction.apply(attn, value, kernel_size)
