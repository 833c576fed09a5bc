"""na2d_av as a dense product, with nothing but PyTorch: the default on a CPU, and for small maps.

There it is faster than NATTEN's, however that is built. Formula and index arithmetic as in ops.py.
"""

from functools import lru_cache

import numpy as np
import torch

# A map up to this many pixels is one tile: a bigger matrix beats the copies that tiling needs.
WHOLE_MAP = 400
TILE = 8


def tiling(size, kernel_size, whole):
    """Cut an axis into tiles of equal length.

    A tile of `tile` pixels reads `region` consecutive values, the union of its pixels' windows.
    Returns tile, region, the first value of each region (tiles,), and the start of each pixel's
    window within its region (tiles, tile). The last tile may reach beyond the axis; its surplus
    pixels have zero weight.
    """
    tile = size if whole else min(TILE, size)
    tiles = -(-size // tile)
    region = min(size, tile + kernel_size - 1)
    pixel = np.minimum(np.arange(tiles * tile), size - 1).reshape(tiles, tile)  # (tiles, tile)
    window = np.clip(pixel - kernel_size // 2, 0, size - kernel_size)
    first = np.clip(window[:, 0], 0, size - region)
    return tile, region, first, window - first[:, None]


@lru_cache(maxsize=16)
def tile_indices(height, width, kernel_size, device):
    """What a map's size alone decides: which values each tile reads, where each weight goes."""
    whole = height * width <= WHOLE_MAP
    tile_h, region_h, first_h, start_h = tiling(height, kernel_size, whole)
    tile_w, region_w, first_w, start_w = tiling(width, kernel_size, whole)
    offset = np.arange(kernel_size)
    rows = start_h[:, :, None] + offset  # (tiles_h, tile_h, K)
    cols = start_w[:, :, None] + offset  # (tiles_w, tile_w, K)
    rows = rows[:, None, :, None, :, None]  # (tiles_h, 1, tile_h, 1, K, 1)
    cols = cols[None, :, None, :, None, :]  # (1, tiles_w, 1, tile_w, 1, K)
    column = rows * region_w + cols  # (tiles_h, tiles_w, tile_h, tile_w, K, K)
    # -> (tiles, pixels of a tile, K*K): the place of each weight among the values of its tile
    column = column.reshape(len(first_h) * len(first_w), tile_h * tile_w, kernel_size**2)
    read_h = (first_h[:, None] + np.arange(region_h)).reshape(-1)  # (tiles_h * region_h,)
    read_w = (first_w[:, None] + np.arange(region_w)).reshape(-1)  # (tiles_w * region_w,)
    # They are kept for later calls, which may want gradients: no inference tensors.
    with torch.inference_mode(False):
        indices = [torch.from_numpy(array).to(device) for array in (read_h, read_w, column)]
    return (tile_h, tile_w, region_h, region_w), *indices


def na2d_av_dense(attn, value, kernel_size):
    """`na2d_av` as matrix products: a tile's (pixels, values) matrix of weights times its values.

    A small map is one tile. A large one is cut up, so that time and memory grow with its pixels.
    """
    B, heads, H, W, dim = value.shape
    sizes, read_h, read_w, column = tile_indices(H, W, kernel_size, value.device)
    # torch.export traces with tensors that have no numbers; those must not serve a later call.
    if type(column) is not torch.Tensor:
        tile_indices.cache_clear()
    tile_h, tile_w, region_h, region_w = sizes
    tiles_h, tiles_w = -(-H // tile_h), -(-W // tile_w)
    tiles, pixels, values = tiles_h * tiles_w, tile_h * tile_w, region_h * region_w

    if tiles > 1:
        # Pixels beyond the map get zero weights.
        surplus_h, surplus_w = tiles_h * tile_h - H, tiles_w * tile_w - W
        # (B, heads, tiles_h * tile_h, tiles_w * tile_w, K*K)
        attn = torch.nn.functional.pad(attn, (0, 0, 0, surplus_w, 0, surplus_h))
        # (B, heads, tiles_h, tile_h, tiles_w, tile_w, K*K)
        attn = attn.reshape(B, heads, tiles_h, tile_h, tiles_w, tile_w, -1)
        attn = attn.transpose(3, 4)  # (B, heads, tiles_h, tiles_w, tile_h, tile_w, K*K)
        # (B, heads, tiles_h * region_h, tiles_w * region_w, dim)
        value = value.index_select(2, read_h).index_select(3, read_w)
        # (B, heads, tiles_h, region_h, tiles_w, region_w, dim)
        value = value.reshape(B, heads, tiles_h, region_h, tiles_w, region_w, dim)
        value = value.transpose(3, 4)  # (B, heads, tiles_h, tiles_w, region_h, region_w, dim)
    attn = attn.reshape(B, heads, tiles, pixels, -1)  # (B, heads, tiles, pixels, K*K)
    value = value.reshape(B, heads, tiles, values, dim)  # (B, heads, tiles, values, dim)

    matrix = attn.new_zeros(B, heads, tiles, pixels, values)
    matrix = matrix.scatter(-1, column.expand(*attn.shape), attn)
    out = matrix @ value  # (B, heads, tiles, pixels, dim)
    # (B, heads, tiles_h, tiles_w, tile_h, tile_w, dim)
    out = out.reshape(B, heads, tiles_h, tiles_w, tile_h, tile_w, dim)
    out = out.transpose(3, 4)  # (B, heads, tiles_h, tile_h, tiles_w, tile_w, dim)
    # The map, and what the tiles add to it: (B, heads, tiles_h * tile_h, tiles_w * tile_w, dim)
    out = out.reshape(B, heads, tiles_h * tile_h, tiles_w * tile_w, dim)
    return out[:, :, :H, :W]  # (B, heads, H, W, dim)
