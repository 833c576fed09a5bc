"""Runs a port with this folder's layers in place of Jittor's: `with swapped(): ...`.

Hold it around all of it, from the import of the port's own files to the last step: a file that says
`from jittor.nn import Conv2d` keeps the class that it found, and a model may make a layer or call
interpolate while it runs.
"""

from contextlib import contextmanager

from . import functions
from .nn import AdaptiveAvgPool2d, BatchNorm2d, Conv2d, LayerNorm
from .optim import AdamW
from .start import jt, nn

own_interpolate = nn.interpolate


def interpolate(
    x, size=None, scale_factor=None, mode="bilinear", align_corners=False, tf_mode=False
):
    """nn.interpolate of Jittor; ours where it is bilinear with align_corners=False."""
    if mode != "bilinear" or align_corners or tf_mode:
        return own_interpolate(x, size, scale_factor, mode, align_corners, tf_mode)
    if size is None:
        size = [int(n * scale_factor) for n in x.shape[2:]]
        if any(n * scale_factor != out for n, out in zip(x.shape[2:], size)):
            raise ValueError(
                f"interpolate: {tuple(x.shape[2:])} times {scale_factor} is no whole size"
            )
    size = (size, size) if isinstance(size, int) else size
    return functions.interpolate(x, size, "bilinear", False)


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
