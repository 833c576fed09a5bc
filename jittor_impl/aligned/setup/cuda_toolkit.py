"""Finds the CUDA toolkit that Jittor compiles with.

It is a system-wide one, NVIDIA's packages from PyPI (requirements-cuda.txt), or a system-wide nvcc
with the libraries that PyTorch brings as packages.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from glob import glob
from pathlib import Path

from .atomic import package_files, replace_link, replace_text

PACKAGES = (
    "nvidia-cuda-nvcc",
    "nvidia-cuda-crt",
    "nvidia-nvvm",
    "nvidia-cuda-runtime",
    "nvidia-cuda-cccl",
    "nvidia-cuda-nvrtc",
    "nvidia-cublas",
    "nvidia-cufft",
    "nvidia-curand",
    "nvidia-nvjitlink",
    "nvidia-cusparse",
    "nvidia-cudnn-cu13",
)
# In the order in which they need each other.
LIBRARIES = (
    "cudart",
    "cublasLt",
    "cublas",
    "cufft",
    "curand",
    "nvJitLink",
    "cusparse",
    "nvrtc",
    "cudnn",
)
SYSTEM_INCLUDE = Path("/usr/include")
DEBIAN_NVCC = "/usr/bin/nvcc"  # and Ubuntu's


def device_count():
    """Number of GPUs that the CUDA driver sees; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def driver_version():
    """The newest CUDA that the driver runs, such as (12, 4); raises OSError without a driver."""
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000, version.value % 1000 // 10


def compute_capability(number):
    """That of the GPU of this number, such as 75 for Turing; raises OSError without a driver."""
    driver = ctypes.CDLL("libcuda.so.1")
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), number)
    # 75 and 76 are the attributes' numbers in cuda.h.
    driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    return 10 * major.value + minor.value


def oldest_capability():
    return min(map(compute_capability, range(device_count())))


def gpu_name(number):
    """That of the GPU of this number; raises OSError without a driver."""
    driver = ctypes.CDLL("libcuda.so.1")
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(device), number)
    driver.cuDeviceGetName(name, len(name), device)
    return name.value.decode()


def nvcc_paths():
    """Where the machine has an nvcc: on the PATH, in CUDA_HOME, in CUDA's usual places."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    homes += ["/opt/cuda", *sorted(glob("/usr/local/cuda-*"), reverse=True)]
    found = [shutil.which("nvcc"), *(shutil.which("nvcc", path=f"{h}/bin") for h in homes if h)]
    return [nvcc for nvcc in found if nvcc]


def system_nvccs():
    """The nvccs of the machine, each in its toolkit and once."""
    return list(dict.fromkeys(map(real_nvcc, nvcc_paths())))


def real_nvcc(nvcc):
    """The nvcc in its toolkit, where `nvcc` is a link or a script that calls it; else `nvcc`."""
    beside = Path(nvcc).parent.parent.resolve()
    if (beside / "lib64" / "libcudart.so").exists():  # as beside the script of `put_together`
        return str(beside / "bin" / "nvcc")
    try:
        command = [nvcc, "--dryrun", "-c", "nothing.cu"]
        output = subprocess.run(command, capture_output=True, text=True).stderr
    except OSError:  # it is no program, or one for another kind of machine
        return nvcc
    top = re.search(r"^#\$ TOP=(.+)$", output, re.MULTILINE)
    root = Path(top[1].strip()).resolve() if top else None
    complete = root and (root / "bin" / "nvcc").exists() and (root / "lib64").exists()
    return str(root / "bin" / "nvcc") if complete else nvcc


def candidates(home, chosen=None):
    """The nvcc of each toolkit that may serve, the best first: all there are, or of `chosen`."""
    packaged = None if chosen else packaged_nvcc(home)
    if packaged:
        yield packaged
    nvccs = [real_nvcc(chosen)] if chosen else system_nvccs()
    yield from nvccs
    for nvcc in nvccs:
        composed = composed_nvcc(nvcc, home)
        if composed:
            yield composed


def packaged_nvcc(home):
    """The nvcc of a toolkit of NVIDIA's packages alone, None where they are not complete."""
    files = package_files(PACKAGES) or ()
    nvccs = [f.locate() for f in files if f.parent.name == "bin" and f.name == "nvcc"]
    return put_together(home, "overlock_cuda", nvccs[0], package_links(files)) if nvccs else None


def composed_nvcc(nvcc, home):
    """That of a toolkit of this nvcc and the libraries in packages, None where there are none.

    PyTorch brings them: all that Jittor needs but a compiler. A library that the toolkit has itself
    is not taken from them.
    """
    version = toolkit_version(nvcc)
    if not version or toolkits(home) in Path(nvcc).parents:
        return None
    files = [f for name in library_packages(version[0]) for f in package_files([name]) or ()]
    if not files:
        return None
    links, root = package_links(files), Path(nvcc).resolve().parent.parent
    if nvcc != DEBIAN_NVCC:  # whose headers lie where every compiler looks
        links |= {f"include/{f.name}": f for f in (root / "include").glob("*")}
    for name in LIBRARIES:
        links |= {f"lib64/{f.name}": f for f in library_folder(nvcc).glob(f"lib{name}.so*")}
    name = f"overlock_cuda_{'.'.join(map(str, version))}"
    return put_together(home, name, nvcc, links)


def toolkits(home):
    """The folder of the toolkits that are put together here."""
    return Path(home) / ".cache" / "jittor"


def library_packages(release):
    """NVIDIA's packages of LIBRARIES for CUDA `release`, as PyTorch requires them."""
    names = ["cublas", "cufft", "curand", "nvjitlink", "cusparse", "cuda-nvrtc"]
    suffix = "" if release >= 13 else f"-cu{release}"
    return [f"nvidia-{name}{suffix}" for name in names] + [f"nvidia-cudnn-cu{release}"]


def package_links(files):
    """{place in a toolkit: what it leads to} for the headers and libraries among packages' files.

    They are relative to site-packages, such as nvidia/cudnn/lib/libcudnn.so.9.
    """
    links = {}
    for f in files:
        if "include" in f.parts:
            # Link what stands directly in include/: for nvidia/cu13/include/crt/host_defines.h that
            # is the folder include/crt.
            below_include = f.parts[f.parts.index("include") + 1 :]
            target = f.locate()
            for _ in below_include[1:]:
                target = target.parent
            links[f"include/{below_include[0]}"] = target
        elif f.parent.name == "lib" and f.suffix == ".a":
            links[f"lib64/{f.name}"] = f.locate()
        elif f.parent.name == "lib" and ".so" in f.name:
            links[f"lib64/{f.name}"] = f.locate()
            links[f"lib64/{f.name.partition('.so')[0]}.so"] = f.locate()
    return links


def put_together(home, name, nvcc, links):
    """Make the toolkit `name` of this nvcc and these links; returns its nvcc.

    Jittor expects bin/, include/ and lib64/ side by side and libraries without a version in their
    names, none of which packages have. Like oneDNN's, the links are renewed at every start, not
    trusted.
    """
    root = toolkits(home) / name
    for link, target in links.items():
        replace_link(root / link, target)
    # nvcc finds its parts beside itself, so it is called by its own name and not through a link.
    script = root / "bin" / "nvcc"
    text = f"#!/bin/sh\nexec '{Path(nvcc).resolve()}' \"$@\"\n"
    if not script.exists() or script.read_text() != text:
        replace_text(script, text, 0o755)
    return str(script)


def library_folder(nvcc):
    """Where Jittor looks for the libraries of this nvcc."""
    if nvcc == DEBIAN_NVCC:
        return Path("/usr/lib/x86_64-linux-gnu")
    return Path(nvcc).resolve().parent.parent / "lib64"


def load_libraries(nvcc):
    """Load the toolkit's libraries, which are in no search path.

    Jittor's own are linked to them by name, and find them if they are loaded already.
    """
    for name in LIBRARIES:
        library = library_folder(nvcc) / f"lib{name}.so"
        if library.exists():
            ctypes.CDLL(str(library.resolve()), ctypes.RTLD_GLOBAL)


@cache
def toolkit_version(nvcc):
    """The toolkit's version, such as (13, 0, 88); () if nvcc does not tell."""
    try:
        output = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError:  # it is no program, or one for another kind of machine
        return ()
    version = re.search(r"V(\d+)\.(\d+)\.(\d+)", output)
    return tuple(map(int, version.groups())) if version else ()


def cudnn_version(nvcc):
    """That of the cuDNN that Jittor will find for this nvcc, such as (9, 13, 0); () if none."""
    toolkit = Path(nvcc).resolve().parent.parent
    targets = toolkit / "targets" / "x86_64-linux"
    for folder in (toolkit / "include", targets / "include", SYSTEM_INCLUDE):
        for name in ("cudnn_version.h", "cudnn.h"):  # cuDNN 7 has it in the latter
            header = folder / name
            if header.exists():
                text = header.read_text(errors="replace")
                version = re.findall(r"#define CUDNN_(?:MAJOR|MINOR|PATCHLEVEL) (\d+)", text)
                if version:
                    return tuple(map(int, version))
    return ()


def trial(nvcc, home):
    """The first error of compiling an empty program as Jittor will, None if there is none.

    A toolkit takes no g++ or C library that is newer than itself. It takes seconds, so the answer
    is kept, by what it depends on.
    """
    compiler = shutil.which(os.environ.get("cc_path", "g++"))
    commands = [compiler, "--version"], ["ldd", "--version"]
    versions = [subprocess.run(c, capture_output=True, text=True).stdout for c in commands]
    parts = [nvcc, str(toolkit_version(nvcc)), compiler, *versions]
    key = hashlib.sha1("\n".join(parts).encode()).hexdigest()[:16]
    answer = Path(home) / ".cache" / "jittor" / f"nvcc-{key}.txt"
    if not answer.exists():
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "empty.cu")
            source.write_text("#include <cuda_runtime.h>\n#include <cmath>\n")
            command = [nvcc, "-std=c++14", f"-ccbin={compiler}", "-c", source, "-o", f"{source}.o"]
            result = subprocess.run(command, capture_output=True, text=True)
        lines = [line for line in result.stderr.splitlines() if "error" in line]
        failed = result.returncode != 0
        replace_text(answer, (lines or ["no reason given"])[0] if failed else "", 0o644)
    return answer.read_text() or None


def problem(nvcc, home):
    """Why Jittor cannot work with this nvcc on this machine's GPUs; None if it can.

    Without a GPU, only whether it can compile.
    """
    if not shutil.which(nvcc):
        return f"there is no compiler {nvcc}"
    version, library = toolkit_version(nvcc), library_folder(nvcc) / "libcudart.so"
    if not version or not library.exists():
        return f"{nvcc} is no CUDA toolkit as Jittor needs it, with {library}"
    cublas = (library_folder(nvcc) / "libcublas.so").exists()
    if not cublas or not cudnn_version(nvcc):
        remedy = f"pip install {' '.join(library_packages(version[0]))}"
        return f"there is no {'cuDNN' if cublas else 'cuBLAS'} beside {nvcc}; {remedy}"
    gpus, release = device_count(), f"{nvcc} is of CUDA {version[0]}"
    if gpus and driver_version() < version[:1]:
        return f"{release}, but the GPU's driver is for CUDA {driver_version()[0]} at most"
    if gpus and version >= (13,) and oldest_capability() < 75:
        return f"{release}, which has dropped GPUs older than Turing; install CUDA 12"
    if gpus and oldest_capability() >= 100 and version < (12, 8):
        release = ".".join(map(str, version[:2]))
        return f"{nvcc} is of CUDA {release}, older than the GPU; install CUDA 12.8 or newer"
    error = trial(nvcc, home)
    return f"{nvcc} compiles nothing here ({error.strip()[:160]})" if error else None
