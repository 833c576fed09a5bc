"""Runs a port with this folder's layers in place of Jittor's: `with swapped(): ...`.

Hold it around all of it, from the import of the port's own files to the last step: a file that says
`from jittor.nn import Conv2d` keeps the class that it found, and a model may make a layer or call
interpolate while it runs.
"""

from contextlib import contextmanager

import numpy as np
from . import functions
from .nn import AdaptiveAvgPool2d, BatchNorm2d, Conv2d, LayerNorm
from .optim import AdamW
from .start import jt, nn

own_interpolate = nn.interpolate


def interpolate(
    x, size=None, scale_factor=None, mode="bilinear", align_corners=False, tf_mode=False
):
    """nn.interpolate of Jittor; ours where it is "area", or "bilinear" without align_corners.

    scale_factor: of both axes, or a pair.
    """
    if mode in ("nearest", "area") and align_corners:
        raise ValueError(f"interpolate: {mode} has no align_corners")
    if size is None:
        scales = np.broadcast_to(scale_factor, 2)
        size = [int(n * scale) for n, scale in zip(x.shape[2:], scales)]
        if any(n * scale != out for n, scale, out in zip(x.shape[2:], scales, size)):
            raise ValueError(
                f"interpolate: {tuple(x.shape[2:])} times {scale_factor} is no whole size"
            )
    size = (size, size) if isinstance(size, int) else tuple(size)
    if mode == "area":
        return functions.adaptive_avg_pool2d(x, size)
    if mode == "bilinear" and not align_corners and not tf_mode:
        return functions.interpolate(x, size, "bilinear", False)
    return own_interpolate(x, size, None, mode, align_corners, tf_mode)


# {module of Jittor: {name: ours}}
REPLACED = {
    nn: {
        "Conv": Conv2d,
        "Conv2d": Conv2d,
        "BatchNorm": BatchNorm2d,
        "BatchNorm1d": BatchNorm2d,
        "BatchNorm2d": BatchNorm2d,
        "BatchNorm3d": BatchNorm2d,
        "LayerNorm": LayerNorm,
        "AdaptiveAvgPool2d": AdaptiveAvgPool2d,
        "interpolate": interpolate,
        "cross_entropy_loss": functions.cross_entropy_loss,
        "AdamW": AdamW,
    },
    jt.optim: {"AdamW": AdamW},
}


@contextmanager
def swapped():
    own = {
        module: {n: getattr(module, n) for n in names if hasattr(module, n)}
        for module, names in REPLACED.items()
    }
    try:
        for module, names in own.items():
            for name in names:
                setattr(module, name, REPLACED[module][name])
        yield
    finally:
        for module, names in own.items():
            for name, value in names.items():
                setattr(module, name, value)
