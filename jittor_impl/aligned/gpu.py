"""The GPU that Jittor computes on: what it is told first, and what the log says of it."""

import os
import sys

from .setup.cuda_toolkit import (
    compute_capability,
    cudnn_version,
    driver_version,
    gpu_name,
    toolkit_version,
)
from .start import jt


def has_tf32():
    """Whether the GPU can round to TF32, by tensor cores."""
    return compute_capability(0) >= 80


def prepare_gpu(tf32):
    """To be called before the first operator on a GPU; `tf32`: dense convolutions in TF32.

    cuDNN takes TF32 unless the environment said otherwise when it was loaded, and Jittor has no
    flag for it: where it was not loaded as is asked for now, the program starts again.
    """
    if tf32 != ("OVERLOCK_TF32" in os.environ):
        os.environ.pop("OVERLOCK_TF32", None)
        if tf32:
            os.environ["OVERLOCK_TF32"] = "1"
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    # cuDNN's search asks for the largest workspace of all its algorithms, up to a quarter of the
    # memory, from an allocator that does not free its caches first.
    jt.cudnn.set_max_workspace_ratio(0.05)
    # XXT has 41 dense convolutions, for batches of three sizes and in two directions of gradients;
    # beyond 100 Jittor takes what cuDNN guesses.
    jt.cudnn.set_algorithm_cache_size(1000)


def describe_gpu():
    """Name, compute capability, and the versions that numbers depend on, for the log."""

    def version(numbers):
        return ".".join(map(str, numbers))

    nvcc, capability = os.environ["nvcc_path"], compute_capability(0)
    return (
        f"{gpu_name(0)}, compute capability {capability // 10}.{capability % 10}, driver for CUDA "
        f"{version(driver_version())}, CUDA {version(toolkit_version(nvcc))}, "
        f"cuDNN {version(cudnn_version(nvcc))}"
    )
