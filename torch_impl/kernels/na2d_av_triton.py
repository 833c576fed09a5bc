"""na2d_av on a GPU as Triton kernels, forward and both gradients; formula and indices as in ops.py.

attn is (N, H, W, K*K), value, out and their gradients (N, H, W, dim), contiguous, N = B * heads.
Numbers are read and written in the type of their tensor and summed in float32. Nothing is added
atomically: the gradient of value gathers from the queries whose window contains a pixel, so that a
run can be repeated bit by bit.

An offset into a whole tensor has 64 bits (n is int64); the pixels of one map, and the numbers of
one row, fit in 32. tests/triton_run.py interprets the kernels on a CPU and tests/triton_compile.py
compiles them; no GPU has run them yet.
"""

import os

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

DTYPES = {torch.float32, torch.float16, torch.bfloat16}
# Triton's interpreter runs the kernels on CPU tensors; set the variable before Triton's import.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# How many numbers a program sums at once: 8 registers for each of its 128 threads.
TILE = 1024


@triton.jit
def window_start(i, size, K: tl.constexpr):
    """The first pixel of the window of pixel i, along an axis of `size` pixels.

    At the borders the window is shifted, not clipped.
    """
    start = i - K // 2
    start = tl.where(start > size - K, size - K, start)
    return tl.where(start < 0, 0, start)


# The first and the last pixel whose window contains pixel p; because window_start never
# decreases, the windows of all pixels between contain it too.
@triton.jit
def first_query(p, K: tl.constexpr):
    return tl.where(p < K, 0, p - K + 1 + K // 2)


@triton.jit
def last_query(p, size, K: tl.constexpr):
    return tl.where(p >= size - K, size - 1, p + K // 2)


@triton.jit
def forward_kernel(
    attn,
    value,
    out,
    H,
    W,
    tiles,
    K: tl.constexpr,
    dim: tl.constexpr,
    PIXELS: tl.constexpr,
    DIM: tl.constexpr,
):
    """A program computes out at PIXELS consecutive pixels of a map, `tiles` programs a map.

    DIM is dim or, where that is no power of two, the next one.
    """
    n = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.program_id(0) % tiles * PIXELS + tl.arange(0, PIXELS)
    d = tl.expand_dims(tl.arange(0, DIM), 0)
    inside = pixel < H * W
    mask = tl.expand_dims(inside, 1) & (d < dim)
    weight = attn + (n * H * W + pixel) * (K * K)  # (PIXELS,) addresses, as those below
    row, column = window_start(pixel // W, H, K), window_start(pixel % W, W, K)
    neighbour = value + tl.expand_dims((n * H + row) * W + column, 1) * dim + d  # (PIXELS, DIM)
    total = tl.zeros((PIXELS, DIM), tl.float32)
    for _ in range(K):
        for q in range(K):
            a = tl.load(weight + q, mask=inside, other=0.0).to(tl.float32)
            v = tl.load(neighbour + q * dim, mask=mask, other=0.0).to(tl.float32)
            total += tl.expand_dims(a, 1) * v
        weight += K
        neighbour += W * dim
    tl.store(out + tl.expand_dims(n * H * W + pixel, 1) * dim + d, total, mask=mask)


@triton.jit
def grad_attn_kernel(
    grad_out,
    value,
    grad_attn,
    H,
    W,
    tiles,
    K: tl.constexpr,
    dim: tl.constexpr,
    WEIGHTS: tl.constexpr,
    DIM: tl.constexpr,
):
    """A program computes WEIGHTS consecutive numbers of a map's gradient, `tiles` programs a map.

    The gradient of a map is (H, W, K*K).
    """
    n = (tl.program_id(0) // tiles).to(tl.int64)
    # One 64-bit division for the program; what is left for each number fits in 32 bits.
    first = (tl.program_id(0) % tiles).to(tl.int64) * WEIGHTS
    rest = (first % (K * K)).to(tl.int32) + tl.arange(0, WEIGHTS)
    pixel = (first // (K * K)).to(tl.int32) + rest // (K * K)
    tap = rest % (K * K)
    d = tl.expand_dims(tl.arange(0, DIM), 0)
    inside = pixel < H * W
    mask = tl.expand_dims(inside, 1) & (d < dim)
    row = window_start(pixel // W, H, K) + tap // K
    column = window_start(pixel % W, W, K) + tap % K
    query = grad_out + tl.expand_dims(n * H * W + pixel, 1) * dim + d  # (WEIGHTS, DIM) addresses
    g = tl.load(query, mask=mask, other=0.0).to(tl.float32)
    neighbour = value + tl.expand_dims((n * H + row) * W + column, 1) * dim + d  # (WEIGHTS, DIM)
    v = tl.load(neighbour, mask=mask, other=0.0).to(tl.float32)
    number = first + tl.arange(0, WEIGHTS)
    tl.store(grad_attn + n * H * W * (K * K) + number, tl.sum(g * v, axis=1), mask=inside)


@triton.jit
def grad_value_kernel(
    attn,
    grad_out,
    grad_value,
    H,
    W,
    tiles,
    reach,
    K: tl.constexpr,
    dim: tl.constexpr,
    PIXELS: tl.constexpr,
    DIM: tl.constexpr,
):
    """A program computes PIXELS consecutive pixels of a row, `tiles` programs a row.

    The row's queries are the same for all its pixels; along the row a pixel has at most `reach`.
    """
    n = (tl.program_id(0) // tiles // H).to(tl.int64)
    y = tl.program_id(0) // tiles % H
    x = tl.program_id(0) % tiles * PIXELS + tl.arange(0, PIXELS)
    d = tl.expand_dims(tl.arange(0, DIM), 0)
    first, last = first_query(x, K), last_query(x, W, K)
    total = tl.zeros((PIXELS, DIM), tl.float32)
    for i in range(first_query(y, K), last_query(y, H, K) + 1):
        p = y - window_start(i, H, K)
        for b in range(reach):
            j = first + b
            q = x - window_start(j, W, K)
            query = (n * H + i) * W + j
            inside = (x < W) & (j <= last)
            a = tl.load(attn + (query * K + p) * K + q, mask=inside, other=0.0).to(tl.float32)
            mask = tl.expand_dims(inside, 1) & (d < dim)
            row = grad_out + tl.expand_dims(query, 1) * dim + d  # (PIXELS, DIM) addresses
            g = tl.load(row, mask=mask, other=0.0).to(tl.float32)
            total += tl.expand_dims(a, 1) * g
    mask = tl.expand_dims(x < W, 1) & (d < dim)
    tl.store(grad_value + tl.expand_dims((n * H + y) * W + x, 1) * dim + d, total, mask=mask)


class NA2dAV(torch.autograd.Function):
    """na2d_av of contiguous tensors, the result of type `dtype`.

    attn (B, heads, H, W, K*K), value (B, heads, H, W, dim) -> (B, heads, H, W, dim)
    """

    @staticmethod
    def forward(ctx, attn, value, K, dtype):
        ctx.save_for_backward(attn, value)
        ctx.K = K
        B, heads, H, W, dim = value.shape
        DIM = triton.next_power_of_2(dim)
        PIXELS = max(TILE // DIM, 1)
        tiles = triton.cdiv(H * W, PIXELS)
        out = torch.empty_like(value, dtype=dtype)
        with torch.cuda.device_of(value):
            forward_kernel[(B * heads * tiles,)](attn, value, out, H, W, tiles, K, dim, PIXELS, DIM)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        attn, value = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        K = ctx.K
        B, heads, H, W, dim = value.shape
        DIM = triton.next_power_of_2(dim)
        grad_attn = grad_value = None
        with torch.cuda.device_of(value):
            if ctx.needs_input_grad[0]:
                WEIGHTS = max(TILE // DIM, 1)
                tiles = triton.cdiv(H * W * K * K, WEIGHTS)
                grad_attn = torch.empty_like(attn)
                grad_attn_kernel[(B * heads * tiles,)](
                    grad_out, value, grad_attn, H, W, tiles, K, dim, WEIGHTS, DIM
                )
            if ctx.needs_input_grad[1]:
                PIXELS = min(max(TILE // DIM, 1), triton.next_power_of_2(W))
                tiles = triton.cdiv(W, PIXELS)
                # Queries of the pixel that has most: all, or those from 0 to K - 1 + K//2.
                reach = W if W < 2 * K else K + K // 2
                grad_value = torch.empty_like(value)
                grad_value_kernel[(B * heads * H * tiles,)](
                    attn, grad_out, grad_value, H, W, tiles, reach, K, dim, PIXELS, DIM
                )
        return grad_attn, grad_value, None, None


def na2d_av_triton(attn, value, kernel_size):
    """`na2d_av` of CUDA tensors, float32, float16 or bfloat16, of any strides, summed in float32.

    The result has the type that `attn @ value` has: without autocast that of both, which must be
    the same; under autocast autocast's, whatever the two are: the kernels read them as they are. A
    gradient has the type of its tensor.

    Raises:
        ValueError: if a tensor is not on a GPU (unless Triton interprets) or has another type.
        RuntimeError: as `attn @ value`, if the types differ without autocast.
    """
    if not (attn.is_cuda and value.is_cuda or INTERPRETED):
        raise ValueError(
            "na2d_av: Triton needs tensors on a GPU: "
            f"attn is on {attn.device}, value on {value.device}"
        )
    if not {attn.dtype, value.dtype} <= DTYPES:
        raise ValueError(
            "na2d_av: Triton takes float32, float16 or bfloat16: "
            f"attn is {attn.dtype}, value {value.dtype}"
        )
    dtype = (attn.new_empty(0, 0) @ value.new_empty(0, 0)).dtype
    return NA2dAV.apply(attn.contiguous(), value.contiguous(), kernel_size, dtype)
