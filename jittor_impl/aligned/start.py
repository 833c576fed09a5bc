"""Imports Jittor so that it starts everywhere: `from .aligned.start import jt, nn`.

Left to itself, Jittor 1.3.11 downloads oneDNN from a server of its own, dies where `nvcc` is
installed without a usable GPU or is of CUDA 13, downloads a CUDA toolkit where there is a GPU
without `nvcc`, and compiles for minutes without a word.
"""

import atexit
import ctypes
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import ssl
import subprocess
import sys
import sysconfig
import time
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import numpy as np
from .setup import patch_jittor
from .setup.atomic import package_files, replace_link
from .setup.compilation import compile_core_faster, compile_operators_faster, import_from_cache
from .setup.cuda_toolkit import (
    candidates,
    cudnn_version,
    device_count,
    driver_version,
    load_libraries,
    nvcc_paths,
    problem,
    toolkit_version,
)

SETUP = Path(__file__).resolve().parent / "setup"
# libmkldnn.so and its headers, on PyPI
ONEDNN_PACKAGES = ("onednn-cpu-gomp", "onednn-devel-cpu-gomp")
# What may stand in a path in the commands that Jittor compiles with; letters of any language.
PLAIN = r"[\w@%+=:,./-]+"
OF_MPI = "OMPI_", "PMI", "SLURM_"  # how variables begin that tell a process which of many it is


def is_rank_0():
    return os.environ.get("OMPI_COMM_WORLD_RANK", "0") == "0"


def notice(message):
    if is_rank_0():
        print(f"jittor_impl: {message}", file=sys.stderr, flush=True)


def fail(message):
    if not is_rank_0():
        time.sleep(3)  # what rank 0 meets too, it says alone: mpirun then ends the others
    print(f"jittor_impl: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def provide_onednn(home):
    """Put the oneDNN of this environment where Jittor looks for the one it would download.

    That is in its cache, which lies under `home`. It outlives an environment, so links are renewed
    at every start, not trusted.
    """
    root = Path(home) / ".cache" / "jittor" / "mkl" / "dnnl_lnx_2.2.0_cpu_gomp"
    library = root / "lib" / "libmkldnn.so"
    if library.exists() and not library.is_symlink():
        return  # Jittor's own download
    files = package_files(ONEDNN_PACKAGES)
    if files is None:
        if not library.exists():
            notice(
                "oneDNN is not installed; Jittor will try to download it "
                "(pip install -r requirements-jittor.txt avoids that)"
            )
        return
    # Link file by file: an environment's lib/ may hold a libstdc++ that Jittor must not link to.
    # Paths are relative to site-packages: ../../libdnnl.so.2, ../../../include/oneapi/dnnl/dnnl.h.
    for f in files:
        if ".so" in f.name:
            replace_link(root / "lib" / f.name, f.locate())
        elif "include" in f.parts:
            replace_link(root.joinpath(*f.parts[f.parts.index("include") :]), f.locate())


def choose_mpi():
    """Turn Jittor's MPI on where mpirun or srun started several processes, else off."""
    if "OMPI_COMM_WORLD_SIZE" not in os.environ:
        # By srun's --mpi=pmix or pmi2. Jittor asks for OpenMPI's variable, MPI itself does not.
        size = os.environ.get("PMI_SIZE")
        if "PMIX_RANK" in os.environ:
            size = os.environ.get("SLURM_STEP_NUM_TASKS")
        if size:
            os.environ["OMPI_COMM_WORLD_SIZE"] = size
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) == 1:
        # Else Jittor would take one process for several.
        os.environ.pop("OMPI_COMM_WORLD_SIZE", None)
        os.environ["use_mpi"] = "0"
        return
    if not shutil.which(os.environ.get("mpicc_path", "mpicc")):
        remedy = "install it (Debian: apt install openmpi-bin libopenmpi-dev)"
        fail(f"several processes were started, but there is no mpicc to connect them; {remedy}")
    os.environ["use_mpi"] = "1"


def choose_cuda(home):
    """Give Jittor a CUDA toolkit that it can use, or turn its CUDA off.

    If off, a line of notice says why where there is a GPU or an nvcc. The environment variable
    nvcc_path decides where it is set: which nvcc, or none if it is empty.
    """
    chosen = os.environ.get("nvcc_path")
    if chosen == "":
        return
    if not device_count() and "OVERLOCK_COMPILES_FOR_CUDA" not in os.environ:
        installed = chosen or nvcc_paths()  # which is asked nothing: this is most users' start
        reasons = ["nvcc is installed but no CUDA GPU is usable"] if installed else []
    else:
        reasons = []
        for nvcc in candidates(home, chosen):
            reason = problem(nvcc, home) or prepare_cuda(nvcc)
            if not reason:
                os.environ["nvcc_path"] = nvcc
                return
            reasons.append(reason)
        reasons = reasons or ["there is a CUDA GPU but no nvcc"]
        if device_count() and driver_version() >= (13,):
            reasons[-1] += " (pip install -r requirements-cuda.txt brings all that is needed)"
    if reasons:
        notice(f"{'; '.join(reasons)}: running on the CPU")
    os.environ["nvcc_path"] = ""


def prepare_cuda(nvcc):
    """Make this toolkit and the installed Jittor fit together. Returns why they cannot, or None."""
    try:
        if toolkit_version(nvcc) >= (13,) or cudnn_version(nvcc) >= (9,):
            changed = patch_jittor.apply()
            if changed:
                notice(
                    f"changed {len(changed)} files of the installed Jittor for CUDA 13 and cuDNN 9 "
                    "(python jittor_impl/aligned/setup/patch_jittor.py --revert takes it back)"
                )
        load_libraries(nvcc)
    except (patch_jittor.PatchError, OSError) as error:
        return str(error)
    return None


class Compilation:
    """The progress report while Jittor compiles itself; its own is silenced with its log.

    Jittor goes through its files at every import, which is shown only where it compiles them and
    does not just check them.
    """

    def __init__(self, _, files):
        self.files, self.next, self.start = files, 0, time.perf_counter()

    def update(self, i):
        done, on_terminal = i + 1, sys.stderr.isatty()
        due = on_terminal or done >= self.next or done == self.files
        if due and time.perf_counter() - self.start > 10:
            self.next = done + self.files / 5
            end = "\r" if on_terminal and done < self.files else "\n"
            text = f"jittor_impl: compiled {done} of {self.files} files"
            print(text, end=end, file=sys.stderr, flush=True)


def compile_jittor():
    """Compile Jittor in a process of its own.

    Jittor builds itself while it is imported, with a pool of processes that Ctrl-C would tear
    apart, and may exit in the middle to be started again.
    """
    notice("Jittor compiles itself: some minutes, the first time only")
    # This module again, by whatever name the folder around it goes in the user's project.
    folder, package = str(SETUP.parents[1]), SETUP.parent.name
    code = f"import sys; sys.path.insert(0, {folder!r}); import {package}.start"
    # It is none of the processes that MPI connects.
    environment = {name: os.environ[name] for name in os.environ if not name.startswith(OF_MPI)}
    environment["OVERLOCK_COMPILES_JITTOR"] = "1"
    child = subprocess.Popen([sys.executable, "-c", code], env=environment, start_new_session=True)
    try:
        status = child.wait()
    except KeyboardInterrupt:
        os.killpg(child.pid, signal.SIGKILL)
        notice("interrupted; what Jittor has compiled is kept")
        sys.exit(130)
    if status != 0:
        fail(f"Jittor could not be compiled (status {status}), the reason is above")


def cpu_key():
    """Names what compiled code may use of the processor: its flags, as -march=native sees them."""
    return hashlib.sha1(" ".join(sorted(cpu_flags())).encode()).hexdigest()[:8]


def cpu_flags():
    flags = re.search(r"^(?:flags|Features)\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.M)
    return flags[1].split() if flags else [platform.machine()]


@contextmanager
def names_of_any_host():
    """Let Jittor name its cache by the C library, not by the host's name and its kernel's version.

    Every container, and every node of a cluster, would compile anew what it could share.
    """
    own = platform.node, platform.platform
    system = "-".join((platform.system(), platform.machine(), *platform.libc_ver()))
    platform.node, platform.platform = (lambda: ""), (lambda: system)
    try:
        yield
    finally:
        platform.node, platform.platform = own


@contextmanager
def one_at_a_time(folder):
    """Keep other processes that want the same out meanwhile, where the file system has locks."""
    with open(Path(folder) / "overlock.lock", "a") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def jittor_home():
    """The folder that jittor_utils.home() will answer, without making it or noting it down."""
    # Where that notes the last JITTOR_HOME.
    kept = Path.home() / ".cache" / "jittor" / "config.json"
    try:
        before = json.loads(kept.read_text()).get("JITTOR_HOME") if kept.exists() else None
    except (ValueError, AttributeError):
        fail(f"{kept}, which Jittor wrote, is damaged; remove it")
    return os.path.abspath(os.environ.get("JITTOR_HOME") or before or Path.home())


def check_paths():
    """End with one line where Jittor could not compile because of a character in a path of its own.

    It writes paths into commands, and reads those commands with a parser of its own.
    """
    places = {
        "Python's headers": (sysconfig.get_path("include"), "use another Python"),
        "its cache": (jittor_home(), "set HOME or JITTOR_HOME to another folder"),
    }
    for name, (path, remedy) in places.items():
        odd = re.sub(PLAIN, "", str(path))
        if odd:
            characters = " ".join(map(ascii, dict.fromkeys(odd)))
            fail(f"Jittor cannot compile: {name} lies in {path}, which has {characters}; {remedy}")


@contextmanager
def signal_handlers_kept(*signals):
    """Leave the process's handlers of `signals` as they are.

    Jittor's quit without a word on Ctrl-C, and when any child process is killed. They are put back
    by the C library: Python's own signal.signal works in the main thread alone, and knows nothing
    of Jittor's handlers.
    """
    libc = ctypes.CDLL(None)
    # struct sigaction has 152 bytes.
    actions = {number: ctypes.create_string_buffer(256) for number in signals}
    for number, action in actions.items():
        libc.sigaction(number, None, action)
    try:
        yield
    finally:
        for number, action in actions.items():
            libc.sigaction(number, action, None)


def import_jittor():
    # Else the cache is named after the branch of the git repository around the environment.
    os.environ.setdefault("cache_name", f"overlock-{cpu_key()}")
    os.environ.setdefault("log_silent", "1")
    choose_mpi()
    # Jittor would download cuTT and CUTLASS where it finds a GPU, and does without them.
    for library in ("use_cutt", "use_cutlass"):
        os.environ.setdefault(library, "0")
    # Do not load torch where it happens to be installed.
    os.environ.setdefault("FIX_TORCH_ERROR", "0")
    # Jittor's core compiles faster at -O1 and runs no slower; its operators keep their -Ofast.
    if "cc_flags" not in os.environ:
        os.environ["cc_flags"] = " -O1 "
        os.environ["kernel_flags"] = os.environ.get("kernel_flags", "") + " -Ofast "
        if "avx512f" in cpu_flags():  # g++ would make vectors of half the width
            os.environ["kernel_flags"] += " -mprefer-vector-width=512 "
    # cuBLAS and cuDNN read it as they are loaded, and then stay with float32; see gpu.py.
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    if "OVERLOCK_TF32" in os.environ:
        del os.environ["NVIDIA_TF32_OVERRIDE"]
    try:
        numpy_version = metadata.version("numpy")
        metadata.version("jittor")
    except metadata.PackageNotFoundError as error:
        fail(
            f"{error.name} is not installed in {sys.prefix}; pip install -r requirements-jittor.txt"
        )
    if int(numpy_version.split(".")[0]) >= 2:
        fail("Jittor 1.3.11 computes wrongly with NumPy 2; pip install 'numpy<2'")
    headers = sysconfig.get_path("include")
    if not os.path.isfile(os.path.join(headers, "Python.h")):
        fail(
            f"no Python.h in {headers}; install Python's headers (Debian: apt install python3-dev)"
        )
    if not shutil.which(os.environ.get("cc_path", "g++")):
        fail("no g++, which Jittor compiles with; install it (Debian: apt install g++)")

    check_paths()
    for number in (np.float32, np.float64):
        np.finfo(number)  # measured once; it would warn after Jittor turned subnormal numbers off
    home = jittor_home()
    try:
        os.makedirs(os.path.join(home, ".cache", "jittor"), exist_ok=True)
        choose_cuda(home)  # which may change the Jittor that is copied
        import_from_cache(home)
        with names_of_any_host():
            import jittor_utils  # which makes folders
        from jittor_utils import install_cuda
    except OSError as error:
        fail(
            f"Jittor cannot keep what it compiles: {error.filename}: {error.strerror}; "
            "set HOME to a folder that can be written to"
        )
    # A toolkit that Jittor downloaded once would come before nvcc_path, and update itself.
    install_cuda.has_installation = lambda: False
    provide_onednn(home)
    # Jittor asks a python3.x-config. No virtual environment has one; another Python's may answer.
    jittor_utils._py3_include_path = f'-I"{headers}"'
    jittor_utils._py3_extension_suffix = sysconfig.get_config_var("EXT_SUFFIX")
    jittor_utils.DelayProgress = Compilation
    compile_core_faster(jittor_utils)
    compiling = "OVERLOCK_COMPILES_JITTOR" in os.environ
    nvcc, core = os.environ["nvcc_path"], "jittor_core*"
    if nvcc:
        core = f"cu{'.'.join(map(str, toolkit_version(nvcc)))}*/{core}"
    cache = Path(jittor_utils.cache_path)
    if not compiling and not list(cache.glob(core)):
        with one_at_a_time(cache):
            if not list(cache.glob(core)):
                compile_jittor()
    try:
        with signal_handlers_kept(signal.SIGINT, signal.SIGCHLD):
            import jittor
    except SystemExit:
        # Jittor found its cache outdated, rebuilt a part and wants to be started again.
        if compiling:
            sys.exit(0)
        if "OVERLOCK_RESTARTED" in os.environ:
            fail(f"Jittor rebuilds itself at every start; remove {jittor_utils.cache_path}")
        os.environ["OVERLOCK_RESTARTED"] = "1"
        compile_jittor()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    compile_operators_faster(jittor, jittor_utils.cache_path)
    # Jittor keeps a pool of compilers. Ctrl-C at a terminal reaches them too, and the exit hangs.
    if jittor_utils.pool_size:
        jittor_utils.pool_cleanup()
        atexit.unregister(jittor_utils.pool_cleanup)
        jittor_utils.pool_size = 0  # it makes another one when it needs it
    # jittor_utils turns the check of certificates off for the whole process.
    ssl._create_default_https_context = ssl.create_default_context
    return jittor


jt = import_jittor()
nn = jt.nn
