"""Operators that Jittor lacks: na2d_av, neighbourhood attention's product of weights and values.

The kernels are C++ and CUDA files under kernels/. Jittor compiles them at the first call and again when they change.
"""
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
from jittor_setup import jt

KERNELS = Path(__file__).resolve().parent / "kernels"


def check_na2d_av(attn_shape, value_shape, kernel_size):
    """Raise ValueError, with the shapes, unless they fit together as `na2d_av` describes."""
    shapes = f"attn {tuple(attn_shape)}, value {tuple(value_shape)}, kernel_size {kernel_size}"
    if not isinstance(kernel_size, (int, np.integer)) or kernel_size < 1 or kernel_size % 2 == 0:
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
        attn: (B, heads, H, W, K*K) weights; value: (B, heads, H, W, dim), of the same type; kernel_size: K, odd, at most
            min(H, W).
    Returns:
        (B, heads, H, W, dim), differentiable in attn and value.
    Raises:
        ValueError: on shapes or types that do not fit together; the message names them.
    """
    check_na2d_av(attn.shape, value.shape, kernel_size)
    check_types("na2d_av: attn and value", attn, value)
    return NA2dAV.apply(attn, value, kernel_size)


class NA2dAV(jt.Function):
    """`na2d_av` with its two gradients, each one kernel."""

    def execute(self, attn, value, kernel_size):
        B, heads, H, W, dim = value.shape
        self.attn, self.value = attn, value
        self.data = {"N": B * heads, "H": H, "W": W, "K": kernel_size, "dim": dim}
        return self.run("na2d_av_forward", attn, value, value.shape)

    def grad(self, grad_out):
        grad_out = cast(grad_out, self.value.dtype)
        grad_attn = self.run("na2d_av_grad_attn", grad_out, self.value, self.attn.shape)
        grad_value = self.run("na2d_av_grad_value", self.attn, grad_out, self.value.shape)
        return grad_attn, grad_value, None

    def run(self, kernel, a, b, out_shape):
        call = f"overlock::{kernel}(in0_p, in1_p, out0_p, $N, $H, $W, $K, $dim"
        headers = ("neighbourhood.h", "lanes.h", "product.h", "na2d_av_cpu.h"), ("neighbourhood.h", "cuda_launch.h", "na2d_av_cuda.h")
        return launch(headers, (f"{call});", f"{call}, 0);"), [a, b], [out_shape], self.data)[0]


# Off the GPU and on it, what the kernels read and write; sums and statistics are float32 for each.
TYPES = {0: ("float32",), 1: ("float32", "float16", "bfloat16")}


def kernel_types():
    """The types of maps that the kernels take on the device in use."""
    return TYPES[bool(jt.flags.use_cuda)]


def check_types(name, *inputs):
    """Raise ValueError, with the types, unless they are all the same."""
    if any(x.dtype != inputs[0].dtype for x in inputs):
        raise ValueError(f"{name} must be of one type, got {', '.join(str(x.dtype) for x in inputs)}")


def check_channels(name, x, *counts):
    """Raise ValueError, with the shape, unless x (B, C, H, W) has as many channels as each of `counts` says."""
    for count in counts:
        if x.shape[1] != count:
            raise ValueError(f"{name} of {count} channels got {x.shape[1]}, shape {tuple(x.shape)}")


def cast(x, dtype):
    """x as `dtype`; x itself if it is. A gradient may come as float32 to an output that is not, where the two types met."""
    return x if x.dtype == dtype else x.cast(dtype)


def launch(headers, code, inputs, shapes, data, dtypes=None):
    """Run a kernel: `headers` of kernels/ and C++ `code`, each a pair for CPU and CUDA ("" where there is none).

    In the code, inputs are in0_p, in1_p, ..., outputs of `shapes` out0_p, ..., and $NAME is the whole number
    data[NAME]. Numbers go in as data and not as text, so that another shape needs no other compilation.
    Outputs are of the first input's type, or of `dtypes`. Everything is float32, on a GPU float16 and bfloat16 too; other
    inputs raise ValueError.
    """
    types = kernel_types()
    if any(x.dtype not in types for x in inputs):
        got = ", ".join(str(x.dtype) for x in inputs)
        raise ValueError(f"the kernels are for {', '.join(types)}, got {got}; use x.float32()")
    dtypes = dtypes or [inputs[0].dtype] * len(shapes)
    return jt.code(shapes, dtypes, inputs, cpu_header=includes(headers[0]), cpu_src=with_data(code[0]),
                   cuda_header=includes(headers[1]), cuda_src=with_data(code[1]), data=data)


@lru_cache(maxsize=None)
def includes(names):
    return "\n".join(f'#include "{KERNELS / name}"' for name in names)


@lru_cache(maxsize=None)
def with_data(code):
    return re.sub(r"\$(\w+)", lambda match: f'(int)data["{match[1]}"]', code)
