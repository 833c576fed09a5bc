"""Operators that Jittor lacks: na2d_av, neighbourhood attention's product of weights and values.

The kernels are C++ and CUDA files under kernels/. Jittor compiles them at the first call and again when they change.
"""
from pathlib import Path

from jittor_setup import jt

KERNELS = Path(__file__).resolve().parent / "kernels"


def check_na2d_av(attn_shape, value_shape, kernel_size):
    """Raise ValueError, with the shapes, unless they fit together as `na2d_av` describes."""
    shapes = f"attn {tuple(attn_shape)}, value {tuple(value_shape)}, kernel_size {kernel_size}"
    if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"na2d_av: kernel_size must be a positive odd integer: {shapes}")
    if len(attn_shape) != 5 or len(value_shape) != 5:
        raise ValueError(f"na2d_av: attn and value must have 5 axes: {shapes}")
    if tuple(attn_shape[:4]) != tuple(value_shape[:4]):
        raise ValueError(f"na2d_av: attn and value must agree in (B, heads, H, W): {shapes}")
    if attn_shape[4] != kernel_size**2:
        raise ValueError(f"na2d_av: the last axis of attn must be kernel_size**2 = {kernel_size**2}: {shapes}")
    if min(value_shape[2:4]) < kernel_size:
        raise ValueError(f"na2d_av: the map must be at least as large as the kernel: {shapes}")


def na2d_av(attn, value, kernel_size):
    """Weighted sum of each pixel's kernel_size x kernel_size window (NATTEN 0.17's `na2d_av`; ContMix, eq. 3).

    out[b, n, i, j, d] = sum over p, q < K of attn[b, n, i, j, p*K + q] * value[b, n, r(i) + p, c(j) + q, d],
    where r(i) = clamp(i - K//2, 0, H - K) and c(j) likewise: at the borders the window is shifted, not clipped.

    Args:
        attn: (B, heads, H, W, K*K) weights; value: (B, heads, H, W, dim); kernel_size: K, odd, at most min(H, W).
    Returns:
        (B, heads, H, W, dim), differentiable in attn and value.
    Raises:
        ValueError: on shapes that do not fit together; the message names them.
    """
    check_na2d_av(attn.shape, value.shape, kernel_size)
    return NA2dAV.apply(attn, value, kernel_size)


class NA2dAV(jt.Function):
    """`na2d_av` with its two gradients, each one kernel."""

    def execute(self, attn, value, kernel_size):
        self.attn, self.value, self.kernel_size = attn, value, kernel_size
        return launch("na2d_av_forward", value.shape, attn, value, kernel_size, value.shape)

    def grad(self, grad_out):
        attn, value, kernel_size = self.attn, self.value, self.kernel_size
        grad_attn = launch("na2d_av_grad_attn", attn.shape, grad_out, value, kernel_size, value.shape)
        grad_value = launch("na2d_av_grad_value", value.shape, attn, grad_out, kernel_size, value.shape)
        return grad_attn, grad_value, None


def include(*names):
    return "\n".join(f'#include "{KERNELS / name}"' for name in names)


def launch(kernel, out_shape, a, b, kernel_size, value_shape):
    """Call `kernel` of na2d_av_cpu.h or na2d_av_cuda.h on inputs a and b; value_shape is (B, heads, H, W, dim)."""
    B, heads, H, W, dim = value_shape
    # Sizes go in as data, not as text, so that another shape needs no other compilation.
    call = (f'overlock::{kernel}(in0_p, in1_p, out0_p, (int64_t)data["N"], (int)data["H"], (int)data["W"], '
            f'(int)data["K"], (int)data["dim"]')
    return jt.code(
        out_shape, "float32", [a, b],
        cpu_header=include("neighbourhood.h", "na2d_av_cpu.h"), cpu_src=f"{call});",
        cuda_header=include("neighbourhood.h", "na2d_av_cuda.h"), cuda_src=f"{call}, 0);",
        data={"N": B * heads, "H": H, "W": W, "K": kernel_size, "dim": dim},
    )
