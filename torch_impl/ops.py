"""Operators that PyTorch lacks: na2d_av, neighbourhood attention's product of weights and values.

Three implementations of one function. NATTEN's is what the official OverLoCK calls. Ours need nothing but PyTorch: a
dense product, the default on a CPU, where it is faster than NATTEN's, however that is built; and, for large maps on a
GPU, the Triton kernels of na2d_av_triton.py.
"""
from functools import lru_cache

import numpy as np
import torch

try:
    import natten
    from natten.functional import na2d_av as natten_na2d_av
except ImportError:  # Windows, a PyTorch without a NATTEN build, or a NATTEN that dropped the unfused operators
    natten_na2d_av = None

BACKENDS = ("auto", "natten", "dense", "triton")
_backend = "auto"


@lru_cache(maxsize=None)
def natten_has_cuda():
    """Whether NATTEN is installed and was built for GPUs. One that was not returns memory as it was, with no exception."""
    return natten_na2d_av is not None and natten.has_cuda()


@lru_cache(maxsize=None)
def triton_kernels():
    """The module na2d_av_triton, imported when it is first needed; None where Triton is not installed."""
    try:
        import na2d_av_triton
    except ImportError:  # Windows, macOS, a PyTorch for CPUs
        return None
    return na2d_av_triton


def set_na2d_backend(name):
    """Choose who computes `na2d_av` from now on: "natten", "dense", "triton" or "auto" (see `choose_na2d_backend`).

    Raises:
        ValueError: if it is none of these, is not installed, or needs a GPU where there is none.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"na2d backend {name!r} is not one of {', '.join(BACKENDS)}")
    if name == "natten" and natten_na2d_av is None:
        raise ValueError("NATTEN is not installed (pip install --no-build-isolation -r requirements-natten.txt)")
    if name == "triton" and triton_kernels() is None:
        raise ValueError("Triton is not installed; it comes with a PyTorch for GPUs on Linux")
    if name == "triton" and not (torch.cuda.is_available() or triton_kernels().INTERPRETED):
        raise ValueError("the Triton kernels need a GPU and PyTorch sees none")
    _backend = name


def choose_na2d_backend(on_gpu, pixels, dtypes):
    """Who computes `na2d_av` when the backend is "auto": "natten", "triton" or "dense".

    Args:
        on_gpu: where the tensors are; pixels: of a map, H * W; dtypes: the set of the tensors' types.
    """
    if on_gpu and natten_has_cuda():
        return "natten"
    if on_gpu and pixels > WHOLE_MAP and triton_kernels() is not None and dtypes <= triton_kernels().DTYPES:
        return "triton"
    return "dense"


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
        attn: (B, heads, H, W, K*K) weights; value: (B, heads, H, W, dim); kernel_size: K, odd, at most min(H, W).
    Returns:
        (B, heads, H, W, dim), differentiable in attn and value.
    Raises:
        ValueError: on shapes that do not fit together; the message names them. On a backend that cannot run there.
    """
    check_na2d_av(attn.shape, value.shape, kernel_size)
    backend = _backend
    if backend == "auto":
        backend = choose_na2d_backend(value.is_cuda, value.shape[2] * value.shape[3], {attn.dtype, value.dtype})
    if backend == "natten":
        if value.is_cuda and not natten_has_cuda():
            raise ValueError("na2d_av: NATTEN was built without CUDA; choose another backend, or install its wheel for CUDA")
        return natten_na2d_av(attn.contiguous(), value.contiguous(), kernel_size)
    if backend == "triton":
        return triton_kernels().na2d_av_triton(attn, value, kernel_size)
    return na2d_av_dense(attn, value, kernel_size)


# A map up to this many pixels is one tile: a bigger matrix beats the copies that tiling needs.
WHOLE_MAP = 400
TILE = 8


def tiling(size, kernel_size, whole):
    """Cut an axis into tiles of equal length.

    A tile of `tile` pixels reads `region` consecutive values, the union of its pixels' windows.
    Returns tile, region, the first value of each region (tiles,), and each pixel's window start within its region
    (tiles, tile). The last tile may reach beyond the axis; its surplus pixels have zero weight.
    """
    tile = size if whole else min(TILE, size)
    tiles = -(-size // tile)
    region = min(size, tile + kernel_size - 1)
    pixel = np.minimum(np.arange(tiles * tile), size - 1).reshape(tiles, tile)
    window = np.clip(pixel - kernel_size // 2, 0, size - kernel_size)
    first = np.clip(window[:, 0], 0, size - region)
    return tile, region, first, window - first[:, None]


@lru_cache(maxsize=16)
def tile_indices(height, width, kernel_size, device):
    """Everything about a map that does not depend on data: which values each tile reads, where each weight goes."""
    whole = height * width <= WHOLE_MAP
    tile_h, region_h, first_h, start_h = tiling(height, kernel_size, whole)
    tile_w, region_w, first_w, start_w = tiling(width, kernel_size, whole)
    offset = np.arange(kernel_size)
    rows = (start_h[:, :, None] + offset)[:, None, :, None, :, None]  # (tiles_h, 1, tile_h, 1, K, 1)
    cols = (start_w[:, :, None] + offset)[None, :, None, :, None, :]  # (1, tiles_w, 1, tile_w, 1, K)
    column = rows * region_w + cols  # (tiles_h, tiles_w, tile_h, tile_w, K, K)
    # -> (tiles, pixels of a tile, K*K): the place of each weight among the values of its tile
    column = column.reshape(len(first_h) * len(first_w), tile_h * tile_w, kernel_size**2)
    read_h = (first_h[:, None] + np.arange(region_h)).reshape(-1)  # (tiles_h * region_h,)
    read_w = (first_w[:, None] + np.arange(region_w)).reshape(-1)  # (tiles_w * region_w,)
    indices = [torch.from_numpy(array).to(device) for array in (read_h, read_w, column)]
    return (tile_h, tile_w, region_h, region_w), *indices


def na2d_av_dense(attn, value, kernel_size):
    """`na2d_av` as matrix products: a tile's weights, scattered into a (pixels, values) matrix, times its values.

    A small map is one tile. A large one is cut into tiles, so that time and memory grow with its pixels.
    """
    B, heads, H, W, dim = value.shape
    (tile_h, tile_w, region_h, region_w), read_h, read_w, column = tile_indices(H, W, kernel_size, value.device)
    tiles_h, tiles_w = -(-H // tile_h), -(-W // tile_w)

    if tiles_h * tiles_w > 1:
        # Pixels beyond the map get zero weights: (B, heads, tiles_h * tile_h, tiles_w * tile_w, K*K).
        attn = torch.nn.functional.pad(attn, (0, 0, 0, tiles_w * tile_w - W, 0, tiles_h * tile_h - H))
        attn = attn.reshape(B, heads, tiles_h, tile_h, tiles_w, tile_w, -1)
        attn = attn.transpose(3, 4)  # (B, heads, tiles_h, tiles_w, tile_h, tile_w, K*K)
        value = value.index_select(2, read_h).index_select(3, read_w)  # (B, heads, tiles*region_h, tiles*region_w, dim)
        value = value.reshape(B, heads, tiles_h, region_h, tiles_w, region_w, dim)
        value = value.transpose(3, 4)  # (B, heads, tiles_h, tiles_w, region_h, region_w, dim)
    attn = attn.reshape(B, heads, tiles_h * tiles_w, tile_h * tile_w, -1)  # (B, heads, tiles, pixels, K*K)
    value = value.reshape(B, heads, tiles_h * tiles_w, region_h * region_w, dim)  # (B, heads, tiles, values, dim)

    matrix = attn.new_zeros(*attn.shape[:4], region_h * region_w)  # (B, heads, tiles, pixels, values)
    matrix = matrix.scatter(-1, column.expand(*attn.shape), attn)
    out = matrix @ value  # (B, heads, tiles, pixels, dim)
    out = out.reshape(B, heads, tiles_h, tiles_w, tile_h, tile_w, dim)
    out = out.transpose(3, 4)  # (B, heads, tiles_h, tile_h, tiles_w, tile_w, dim)
    out = out.reshape(B, heads, tiles_h * tile_h, tiles_w * tile_w, dim)  # the map, and what the tiles add to it
    return out[:, :, :H, :W]  # (B, heads, H, W, dim)
