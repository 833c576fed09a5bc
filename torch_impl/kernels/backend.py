"""Who computes na2d_av: NATTEN, a dense product or Triton kernels, three forms of one function.

NATTEN's is what the official OverLoCK calls. Ours need nothing but PyTorch: a dense product
(na2d_av_dense.py), the default on a CPU, where it is faster than NATTEN's, however that is built;
and, for large maps on a GPU, Triton kernels (na2d_av_triton.py).
"""

from functools import cache

import torch
from .na2d_av_dense import WHOLE_MAP, na2d_av_dense

try:
    import natten
    from natten.functional import na2d_av as natten_na2d_av
except ImportError:
    # Windows, a PyTorch without a NATTEN build, or a NATTEN that dropped the unfused operators.
    natten_na2d_av = None

BACKENDS = ("auto", "natten", "dense", "triton")
HELP = (  # of the option --na2d
    "who computes na2d_av: NATTEN, our dense product, our Triton kernels, or auto: "
    "on a GPU NATTEN if built for it, else Triton for large maps; else dense"
)
_backend = "auto"


@cache
def natten_has_cuda():
    """Whether NATTEN is installed and was built for GPUs.

    One that was not raises nothing there: it returns whatever the memory held.
    """
    return natten_na2d_av is not None and natten.has_cuda()


@cache
def triton_kernels():
    """The module na2d_av_triton, imported when first needed; None if Triton is not installed."""
    try:
        from . import na2d_av_triton
    except ImportError:  # Windows, macOS, a PyTorch for CPUs
        return None
    return na2d_av_triton


def set_na2d_backend(name, device=None):
    """Choose who computes `na2d_av` from now on: one of BACKENDS; "auto" is `choose_na2d_backend`.

    device: "cpu" or "cuda", where the tensors will be, if that is known.

    Raises:
        ValueError: if it is none of these, is not installed, or cannot run there.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"na2d backend {name!r} is not one of {', '.join(BACKENDS)}")
    if name == "natten" and natten_na2d_av is None:
        command = "pip install --no-build-isolation natten==0.17.3"
        raise ValueError(f"NATTEN is not installed ({command})")
    if name == "natten" and device == "cuda" and not natten_has_cuda():
        raise ValueError("NATTEN was built without CUDA; docs/install.md names its wheel for CUDA")
    if name == "triton" and device == "cpu":
        raise ValueError("the Triton kernels need a GPU; give --device cuda")
    if name == "triton" and triton_kernels() is None:
        raise ValueError("Triton is not installed; it comes with a PyTorch for GPUs on Linux")
    if name == "triton" and not (torch.cuda.is_available() or triton_kernels().INTERPRETED):
        raise ValueError("the Triton kernels need a GPU and PyTorch sees none")
    _backend = name


def choose_na2d_backend(on_gpu, pixels, dtypes):
    """Who computes `na2d_av` when the backend is "auto": "natten", "triton" or "dense".

    Args:
        on_gpu: whether the tensors are on a GPU
        pixels: of a map, H * W
        dtypes: the set of the tensors' types
    """
    if on_gpu and natten_has_cuda():
        return "natten"
    large_on_gpu = on_gpu and pixels > WHOLE_MAP
    if large_on_gpu and triton_kernels() is not None and dtypes <= triton_kernels().DTYPES:
        return "triton"
    return "dense"


def na2d_av(attn, value, kernel_size):
    """`na2d_av` of ops.py, whose shapes are checked, by the backend that was set."""
    backend = _backend
    if backend == "auto":
        pixels, dtypes = value.shape[2] * value.shape[3], {attn.dtype, value.dtype}
        backend = choose_na2d_backend(value.is_cuda, pixels, dtypes)
    if backend == "natten":
        if value.is_cuda and not natten_has_cuda():
            raise ValueError(
                "na2d_av: NATTEN was built without CUDA; "
                "choose another backend, or install its wheel for CUDA"
            )
        return natten_na2d_av(attn.contiguous(), value.contiguous(), kernel_size)
    if backend == "triton":
        return triton_kernels().na2d_av_triton(attn, value, kernel_size)
    return na2d_av_dense(attn, value, kernel_size)
