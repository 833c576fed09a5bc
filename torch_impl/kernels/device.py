"""Whether PyTorch can compute on the machine's GPU, and if not, why, in one line."""

import ctypes

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
