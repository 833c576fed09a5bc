"""The machine's GPU: why PyTorch cannot compute there, in one line, and how it does if it can."""

import ctypes
from functools import lru_cache

import torch

PINNED = "pip install -r requirements-torch.txt"
NEWER = "install PyTorch 2.7 or newer (requirements-torch.txt without its first two packages)"


def driver_version():
    """The newest CUDA that the driver of a GPU runs, such as (12, 4); () without driver or GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count, version = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return ()
    driver.cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000, version.value % 1000 // 10


def cuda_problem():
    """Why PyTorch can use no GPU of this machine, and what to do; None if it can."""
    if not torch.cuda.is_available():
        driver = driver_version()
        if not driver:
            return "PyTorch sees no CUDA GPU; look at its driver"
        there = f"there is a GPU, whose driver is for CUDA {driver[0]}.{driver[1]}"
        if torch.version.cuda is None:
            return f"{there}, and this PyTorch is built for CPUs; {PINNED}"
        remedy = "update the driver" if driver < (12,) else f"update the driver, or {PINNED}"
        return f"{there}, and this PyTorch is of CUDA {torch.version.cuda}; {remedy}"
    try:
        (torch.zeros(1, device="cuda") + 1).item()
    except RuntimeError as error:
        if "no kernel image" not in str(error):
            reason = str(error).partition("\n")[0]
            return f"PyTorch cannot compute on {torch.cuda.get_device_name()}: {reason}"
        major, minor = torch.cuda.get_device_capability()
        built = " ".join(torch.cuda.get_arch_list())
        gpu = f"{torch.cuda.get_device_name()} is an sm_{major}{minor}"
        return f"{gpu}, and this PyTorch is built for {built}; {NEWER if major >= 10 else PINNED}"
    return None


def has_tf32():
    """Whether the GPU can round to TF32, by tensor cores."""
    return torch.cuda.get_device_capability() >= (8, 0)


def prepare_gpu(tf32):
    """To be called before the first operator on a GPU; `tf32`: dense convolutions in TF32.

    Left to itself PyTorch takes it for convolutions alone, and in NVIDIA's containers for matrix
    products too.
    """
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_tf32 = False


def memory_format(device):
    """How maps lie in memory: channels last on a CPU, where PyTorch's convolutions are faster so.

    On a GPU it would send every depthwise convolution to cuDNN and none to PyTorch's own kernels
    (use_cudnn_depthwise in ATen). Which of the two is faster there has not been measured.
    """
    on_cpu = torch.device(device).type == "cpu"
    return torch.channels_last if on_cpu else torch.contiguous_format


@lru_cache(maxsize=16)
def kept(device, make, *sizes):
    # Later calls may want gradients: no inference tensors.
    with torch.inference_mode(False):
        return torch.from_numpy(make(*sizes)).to(device)


def uploaded(device, make, *sizes):
    """The array of integers make(*sizes); on a GPU, where it stays for later calls."""
    if device.type == "cpu":
        return make(*sizes)
    tensor = kept(device, make, *sizes)
    # torch.export traces with tensors that have no numbers; those must not serve a later call.
    if type(tensor) is not torch.Tensor:
        kept.cache_clear()
    return tensor


def describe_gpu():
    """Name, compute capability, and the versions that numbers depend on, for the log."""
    major, minor = torch.cuda.get_device_capability()
    driver, cudnn = ".".join(map(str, driver_version())), torch.backends.cudnn.version()
    # 8907 is 8.9.7, 91300 is 9.13.0
    unit = 10000 if cudnn >= 10000 else 1000
    cudnn = f"{cudnn // unit}.{cudnn % unit // 100}.{cudnn % 100}"
    return (
        f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}, driver for CUDA "
        f"{driver}, CUDA {torch.version.cuda}, cuDNN {cudnn}"
    )
