"""Which CUDA toolkit Jittor gets, and how its package is changed for CUDA 13 and cuDNN 9."""

import ctypes
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from jittor_impl import program, train
from jittor_impl.aligned import gpu, start
from jittor_impl.aligned.setup import cuda_toolkit, patch_jittor

SCRIPT = Path(patch_jittor.__file__)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder with a copy of the files that the changes are about, as Jittor has them."""
    installed = patch_jittor.package_root()
    for name in patch_jittor.read_patch(patch_jittor.PATCH.read_text()):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(installed / name, tmp_path / name)
    monkeypatch.setattr(patch_jittor, "package_root", lambda: tmp_path)
    patch_jittor.apply(revert=True)  # on a machine where CUDA 13 is in use
    return tmp_path


def contents(folder):
    return {path: path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_changes_can_be_made_twice_and_taken_back(package):
    original = contents(package)
    assert set(patch_jittor.apply()) == set(original)
    changed = contents(package)
    assert all(changed[path] != original[path] for path in original)
    assert patch_jittor.apply() == [] and contents(package) == changed
    assert set(patch_jittor.apply(revert=True)) == set(original) and contents(package) == original
    assert patch_jittor.apply(revert=True) == []
    for path in package.rglob("*.py"):
        compile(changed[path], path, "exec")


def test_a_package_that_somebody_else_changed_is_left_alone(package):
    path = package / "jittor" / "depthwise_conv.py"
    path.write_text(path.read_text().replace("cub::LaneId()", "lane_id()"))
    before = contents(package)
    message = "depthwise_conv.py is not as Jittor 1.3.11.0 has it; pip install"
    with pytest.raises(patch_jittor.PatchError, match=message):
        patch_jittor.apply()
    assert contents(package) == before


def test_another_version_of_jittor_is_refused():
    code = f"""
import sys
from importlib import metadata
metadata.distribution = lambda name: type("D", (), {{"version": "1.3.9.14"}})
sys.argv[:] = ["patch_jittor.py"]
sys.path.insert(0, {str(SCRIPT.parents[1])!r})
from setup import patch_jittor
sys.exit(patch_jittor.main())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    message = "the changes are for Jittor 1.3.11.0, installed is 1.3.9.14"
    assert f"{message}; pip install jittor==1.3.11.0" in result.stderr


# (header of Jittor, what it uses that CUDA 13 dropped)
HEADERS = [("helper_cuda.h", "computeMode"), ("cuda_limits.h", "npp.h")]


@pytest.mark.parametrize("header, dropped", HEADERS)
def test_headers_compile_with_cuda_13_once_changed(header, dropped, package, tmp_path):
    nvccs = [n for n in cuda_toolkit.system_nvccs() if cuda_toolkit.toolkit_version(n) >= (13,)]
    if not nvccs:
        pytest.skip("no nvcc of CUDA 13 or newer")
    source = tmp_path / "headers.cu"
    source.write_text(f'#include "{header}"\n')
    # The copy first, then the installed package for the files that the changes are not about.
    folders = [package / "jittor", Path(start.jt.__file__).parent]
    places = ("extern/cuda/inc", "src/misc", "src")
    includes = [f"-I{folder / place}" for folder in folders for place in places]
    command = [nvccs[0], "-std=c++17", "-DIS_CUDA", "-cuda", *includes, "-o", os.devnull, source]
    before = subprocess.run(command, capture_output=True, text=True)
    assert before.returncode != 0 and dropped in before.stderr, before.stderr
    patch_jittor.apply()
    after = subprocess.run(command, capture_output=True, text=True)
    assert after.returncode == 0, after.stderr


def fake_toolkit(folder, release, cudnn, lib64="lib64"):
    """A toolkit that says what it is, and no more."""
    (folder / "bin").mkdir(parents=True)
    (folder / "include").mkdir()
    (folder / lib64).mkdir()
    # Any library that can be loaded will do.
    library = next(Path(ctypes.__file__).parent.parent.glob("lib-dynload/_ctypes*.so"))
    for name in ("cudart", "cublas"):
        (folder / lib64 / f"lib{name}.so").symlink_to(library)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.48\n")
    nvcc.chmod(0o755)
    if cudnn:
        (folder / "include" / "cudnn_version.h").write_text(f"#define CUDNN_MAJOR {cudnn}\n")
    return str(nvcc)


@pytest.fixture
def choose(tmp_path, monkeypatch):
    """The nvcc that choose_cuda gives Jittor on a machine with so many GPUs and this nvcc."""

    def choose(gpus, nvcc, chosen=None, driver=13, capability=90, packaged=None):
        monkeypatch.delenv("nvcc_path", raising=False)
        if chosen is not None:
            monkeypatch.setenv("nvcc_path", chosen)
        for module in (start, cuda_toolkit):
            monkeypatch.setattr(module, "device_count", lambda: gpus)
            monkeypatch.setattr(module, "driver_version", lambda: (driver, 0))
        monkeypatch.setattr(cuda_toolkit, "compute_capability", lambda number: capability)
        monkeypatch.setattr(cuda_toolkit, "packaged_nvcc", lambda home: packaged)
        nvccs = nvcc if isinstance(nvcc, list) else [nvcc] if nvcc else []
        monkeypatch.setattr(cuda_toolkit, "system_nvccs", lambda: nvccs)
        monkeypatch.setattr(start, "nvcc_paths", lambda: nvccs)
        start.choose_cuda(tmp_path)
        return os.environ["nvcc_path"]

    return choose


def test_nvcc_without_a_gpu_means_the_cpu(tmp_path, choose, capsys):
    nvcc = fake_toolkit(tmp_path / "cuda", "12.4", 8)
    assert choose(0, nvcc) == ""
    assert "no CUDA GPU is usable: running on the CPU\n" in capsys.readouterr().err
    assert choose(0, None) == "" and capsys.readouterr().err == ""
    assert choose(0, None, chosen=nvcc) == "" and "no CUDA GPU is usable" in capsys.readouterr().err
    assert choose(1, nvcc, chosen="") == "" and capsys.readouterr().err == ""


def test_a_gpu_without_nvcc_downloads_no_toolkit(choose, capsys):
    assert choose(1, None) == ""
    assert "no nvcc (pip install -r requirements-cuda.txt " in capsys.readouterr().err
    # Those packages are of CUDA 13, which is too new for this driver.
    assert choose(1, None, driver=12) == ""
    assert "pip install" not in capsys.readouterr().err


def test_a_toolkit_that_jittor_downloaded_once_is_left_alone():
    from jittor_utils import install_cuda

    assert not install_cuda.has_installation()


# (release of CUDA, major version of cuDNN, number of files that they need changed)
TOOLKITS = [("12.4", 8, 0), ("12.4", 9, 7), ("13.0", 9, 7)]


@pytest.mark.parametrize("release, cudnn, changed", TOOLKITS)
def test_jittor_is_changed_where_the_toolkit_needs_it(
    tmp_path, release, cudnn, changed, package, choose, capsys
):
    original = contents(package)
    nvcc = fake_toolkit(tmp_path / "cuda", release, cudnn)
    assert choose(1, nvcc) == nvcc
    assert sum(path.read_text() != text for path, text in original.items()) == changed
    told = f"changed {changed} files of the installed Jittor" in capsys.readouterr().err
    assert told == bool(changed)
    assert choose(1, nvcc) == nvcc and capsys.readouterr().err == ""


def test_toolkits_that_cannot_be_used_mean_the_cpu(tmp_path, package, choose, monkeypatch, capsys):
    monkeypatch.setattr(cuda_toolkit, "SYSTEM_INCLUDE", tmp_path)
    assert choose(1, fake_toolkit(tmp_path / "without", "12.4", None)) == ""
    assert "no cuDNN beside" in capsys.readouterr().err
    # Conda's libraries are in lib, where Jittor does not look for them.
    assert choose(1, fake_toolkit(tmp_path / "conda", "12.4", 8, "lib")) == ""
    assert "lib64/libcudart.so" in capsys.readouterr().err
    assert choose(1, None, chosen="/nowhere/nvcc") == ""
    assert "no compiler /nowhere/nvcc" in capsys.readouterr().err
    broken = Path(fake_toolkit(tmp_path / "broken", "12.4", 8))
    broken.write_bytes(b"\x7fELF of another machine")
    assert choose(1, str(broken)) == "" and "is no CUDA toolkit" in capsys.readouterr().err
    (package / "jittor" / "compiler.py").write_text("something else")
    assert choose(1, fake_toolkit(tmp_path / "cuda", "13.0", 9)) == ""
    assert "compiler.py is not as Jittor 1.3.11.0 has it" in capsys.readouterr().err


def test_a_toolkit_that_is_too_new_gives_way(tmp_path, package, choose, capsys):
    new, old = fake_toolkit(tmp_path / "new", "13.0", 9), fake_toolkit(tmp_path / "old", "12.4", 8)
    assert choose(1, old, packaged=new) == new and "changed 7 files" in capsys.readouterr().err
    assert choose(1, old, packaged=new, driver=12) == old and capsys.readouterr().err == ""
    assert choose(1, old, packaged=new, capability=70) == old and capsys.readouterr().err == ""
    assert choose(1, None, packaged=new, driver=12) == ""
    assert "is of CUDA 13, but the GPU's driver is for CUDA 12 at most" in capsys.readouterr().err
    assert choose(1, None, packaged=new, capability=70) == ""
    assert "dropped GPUs older than Turing" in capsys.readouterr().err


def test_a_toolkit_that_is_older_than_the_gpu_gives_way(tmp_path, package, choose, capsys):
    old, new = fake_toolkit(tmp_path / "old", "12.4", 8), fake_toolkit(tmp_path / "new", "12.8", 8)
    assert choose(1, [old, new], capability=120) == new and capsys.readouterr().err == ""
    assert choose(1, old, capability=120) == ""
    assert "is of CUDA 12.4, older than the GPU; install CUDA 12.8" in capsys.readouterr().err
    assert choose(1, [old, new], capability=90) == old


def test_a_toolkit_that_compiles_nothing_here_gives_way(tmp_path, choose, capsys):
    """Such as CUDA 11.8 with Debian 12's g++; the answer is kept."""
    broken, good = (fake_toolkit(tmp_path / name, "12.4", 8) for name in ("broken", "good"))
    log = tmp_path / "calls"
    with open(broken, "a") as script:
        script.write(f"case $* in *empty.cu*) echo x >> {log}\n")
        script.write(
            "echo 'host_config.h:132: error: unsupported GNU version!' >&2; exit 1;; esac\n"
        )
    assert choose(1, [broken, good]) == good and capsys.readouterr().err == ""
    assert choose(1, broken) == "" and log.read_text() == "x\n"
    says = f"{broken} compiles nothing here (host_config.h:132: error: unsupported GNU version!)"
    assert says in capsys.readouterr().err


def test_every_toolkit_that_failed_is_named(tmp_path, choose, monkeypatch, capsys):
    monkeypatch.setattr(cuda_toolkit, "SYSTEM_INCLUDE", tmp_path)
    without = [fake_toolkit(tmp_path / name, "12.4", None) for name in ("one", "two")]
    assert choose(1, without, driver=12) == ""
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(f"no cuDNN beside {nvcc}" in err for nvcc in without)


def test_a_script_around_nvcc_is_seen_through(tmp_path, monkeypatch):
    """As module systems and compiler caches make them; CUDA_HOME is looked into too."""
    nvcc = Path(fake_toolkit(tmp_path / "cuda", "12.4", 8))
    with open(nvcc, "a") as script:
        script.write(f"echo '#$ TOP={nvcc.parent}/..' >&2\n")
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    script.chmod(0o755)
    assert cuda_toolkit.real_nvcc(str(script)) == str(nvcc)
    assert cuda_toolkit.real_nvcc("/nowhere/nvcc") == "/nowhere/nvcc"
    monkeypatch.setenv("PATH", str(script.parent), prepend=":")
    other = fake_toolkit(tmp_path / "other", "12.6", 9)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "other"))
    assert cuda_toolkit.system_nvccs()[:2] == [str(nvcc), other]


def plant_packages(site, files, contents):
    """Packages in pip's layout: files is {package: names}, contents {last part of a name: text}."""
    for package, names in files.items():
        info = site / f"{package.replace('-', '_')}-13.0.dist-info"
        info.mkdir(parents=True)
        description = f"Metadata-Version: 2.1\nName: {package}\nVersion: 13.0\n"
        (info / "METADATA").write_text(description)
        (info / "RECORD").write_text("".join(f"{name},,\n" for name in names))
        for name in names:
            path = site / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(contents.get(path.name, ""))
            path.chmod(0o755)


def test_packages_of_nvidia_become_a_toolkit(tmp_path, monkeypatch):
    """Again too after the environment that the links led to was replaced."""
    files = {package: [] for package in cuda_toolkit.PACKAGES}
    files["nvidia-cuda-nvcc"] = ["nvidia/cu13/bin/nvcc", "nvidia/cu13/bin/crt/link.stub"]
    files["nvidia-cuda-runtime"] = [
        "nvidia/cu13/include/cuda_runtime.h",
        "nvidia/cu13/include/crt/host_defines.h",
        "nvidia/cu13/lib/libcudart.so.13",
        "nvidia/cu13/lib/libcudadevrt.a",
    ]
    files["nvidia-cudnn-cu13"] = [
        "nvidia/cudnn/include/cudnn_version.h",
        "nvidia/cudnn/lib/libcudnn.so.9",
    ]
    for environment in ("old", "new"):
        site = tmp_path / environment
        nvcc = f"#!/bin/sh\necho release 13.0, V13.0.88 of {environment}\n"
        plant_packages(site, files, {"nvcc": nvcc, "cudnn_version.h": "#define CUDNN_MAJOR 9\n"})
        monkeypatch.syspath_prepend(site)
        nvcc = cuda_toolkit.packaged_nvcc(tmp_path)
        root = Path(nvcc).parent.parent
        assert f"of {environment}" in subprocess.run([nvcc], capture_output=True, text=True).stdout
        assert cuda_toolkit.toolkit_version(nvcc) == (13, 0, 88)
        assert cuda_toolkit.cudnn_version(nvcc) == (9,)
        for name, target in (
            ("include/crt/host_defines.h", "cu13/include/crt/host_defines.h"),
            ("lib64/libcudart.so", "cu13/lib/libcudart.so.13"),
            ("lib64/libcudadevrt.a", "cu13/lib/libcudadevrt.a"),
            ("lib64/libcudnn.so.9", "cudnn/lib/libcudnn.so.9"),
        ):
            assert (root / name).resolve() == site / "nvidia" / target
        shutil.rmtree(site)


# (release of CUDA, PyTorch's packages of libraries for it)
LIBRARIES = [
    (
        "12.4",
        {
            "nvidia-cublas-cu12": "nvidia/cublas/lib/libcublas.so.12",
            "nvidia-cudnn-cu12": "nvidia/cudnn/lib/libcudnn.so.9",
        },
    ),
    (
        "13.0",
        {
            "nvidia-cublas": "nvidia/cu13/lib/libcublas.so.13",
            "nvidia-cudnn-cu13": "nvidia/cudnn/lib/libcudnn.so.9",
        },
    ),
]


@pytest.mark.parametrize("release, libraries", LIBRARIES)
def test_nvcc_takes_the_libraries_that_pytorch_brings(
    tmp_path, release, libraries, package, choose, monkeypatch, capsys
):
    """Where its own toolkit has none, and whichever nvcc was chosen; its own files win."""
    monkeypatch.setattr(cuda_toolkit, "SYSTEM_INCLUDE", tmp_path)
    toolkit, site = tmp_path / "cuda", tmp_path / "site"
    nvcc = fake_toolkit(toolkit, release, None)
    (toolkit / "lib64" / "libcublas.so").unlink()
    (toolkit / "include" / "cuda_runtime.h").touch()
    with open(nvcc, "a") as script:
        script.write(f"echo '#$ TOP={toolkit}/bin/..' >&2\n")
    assert choose(1, nvcc) == ""
    remedy = " ".join(cuda_toolkit.library_packages(int(release[:2])))
    assert f"there is no cuBLAS beside {nvcc}; pip install {remedy}" in capsys.readouterr().err
    assert set(libraries) < set(remedy.split())

    header = "nvidia/cudnn/include/cudnn_version.h"
    files = {name: [library] for name, library in libraries.items()}
    files[list(files)[1]].append(header)
    other = "nvidia/cublas/lib/libcudart.so.1"
    files[list(files)[0]].append(other)
    plant_packages(site, files, {"cudnn_version.h": "#define CUDNN_MAJOR 9\n"})
    for name in (*libraries.values(), other):
        shutil.copy(toolkit / "lib64" / "libcudart.so", site / name)  # which can be loaded
    monkeypatch.syspath_prepend(site)
    for chosen in (None, nvcc):
        composed = Path(choose(1, nvcc, chosen=chosen))
        assert composed.parts[-4:-2] == ("jittor", f"overlock_cuda_{release}.48")
    root = composed.parents[1]
    assert cuda_toolkit.cudnn_version(str(composed)) == (9,)
    for name, target in (
        ("lib64/libcublas.so", site / list(libraries.values())[0]),
        ("lib64/libcudart.so", toolkit / "lib64" / "libcudart.so"),
        ("include/cudnn_version.h", site / header),
        ("include/cuda_runtime.h", toolkit / "include" / "cuda_runtime.h"),
    ):
        assert (root / name).resolve() == target.resolve()
    # As a process that this one starts finds it; it is not put together again.
    (root / "lib64" / "libcublas.so").unlink()
    (root / "lib64" / "libcublas.so").symlink_to(toolkit / "lib64" / "libcudart.so")
    assert choose(1, nvcc, chosen=str(composed)) == str(composed)
    assert "_ctypes" in (root / "lib64" / "libcublas.so").resolve().name
    (root / "include" / "cudnn_version.h").unlink()
    text = composed.read_text()
    assert choose(1, nvcc, chosen=str(composed)) == "" and composed.read_text() == text
    # A toolkit with a cuDNN of its own needs nothing of theirs.
    whole = fake_toolkit(tmp_path / "whole", release, 9)
    assert choose(1, [nvcc, whole]) == whole


def test_an_incomplete_set_of_packages_is_no_toolkit(tmp_path, monkeypatch):
    def files(package):
        if package == "nvidia-cudnn-cu13":
            raise metadata.PackageNotFoundError(package)
        return []

    monkeypatch.setattr(metadata, "files", files)
    assert cuda_toolkit.packaged_nvcc(tmp_path) is None


# A driver of CUDA 13.1 with an RTX 4090 and a T4.
DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? device ? 7 : 8 : attribute == 76 ? device ? 5 : 9 : 0;
    return 0;
}
int cuDeviceGetName(char *name, int size, int device) {
    strncpy(name, device ? "Tesla T4" : "NVIDIA GeForce RTX 4090", size);
    return 0;
}
int cuDriverGetVersion(int *version) { *version = 13010; return 0; }
"""


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """A machine with DRIVER, a toolkit and a cuDNN; what Jittor's cuDNN is told is in the list."""
    library = tmp_path / "libcuda.so"
    (tmp_path / "driver.c").write_text(DRIVER)
    command = ["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "driver.c"]
    subprocess.run(command, check=True)
    driver, told = ctypes.CDLL(str(library)), []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: {"libcuda.so.1": driver}[name])
    nvcc = Path(fake_toolkit(tmp_path / "cuda", "13.0", 9))
    with open(nvcc.parents[1] / "include" / "cudnn_version.h", "a") as header:
        header.write(
            "#define CUDNN_MINOR 13\n#define CUDNN_PATCHLEVEL 0\n#define CUDNN_VERSION 1\n"
        )
    monkeypatch.setenv("nvcc_path", str(nvcc))
    cudnn = SimpleNamespace(
        set_max_workspace_ratio=lambda ratio: told.append(("ratio", ratio)),
        set_algorithm_cache_size=lambda size: told.append(("size", size)),
    )
    jt = SimpleNamespace(has_cuda=True, flags=SimpleNamespace(), cudnn=cudnn)
    for module in (gpu, program):
        monkeypatch.setattr(module, "jt", jt)
    return told


def choose_device(*options):
    return program.choose_device(train.make_parser().parse_args(options))


def test_what_the_log_says_of_a_gpu(gpus):
    assert cuda_toolkit.oldest_capability() == 75 and cuda_toolkit.gpu_name(1) == "Tesla T4"
    says = "NVIDIA GeForce RTX 4090, compute capability 8.9, driver for CUDA 13.1, CUDA 13.0.48, "
    for options in ((), ("--device", "cuda", "--tf32", "off")):
        assert choose_device(*options) == says + "cuDNN 9.13.0, TF32 off"
    assert gpus[:2] == [("ratio", 0.05), ("size", 1000)]


def test_tf32_is_off_unless_the_program_starts_again_with_it(gpus, monkeypatch):
    """cuDNN reads the environment once, when Jittor loads it."""
    started = []

    def execv(program, words):
        started.append((words, os.environ.get("OVERLOCK_TF32")))
        raise SystemExit

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.delenv("OVERLOCK_TF32", raising=False)
    words = [sys.executable, *sys.orig_argv[1:]]
    assert choose_device().endswith("TF32 off") and not started
    with pytest.raises(SystemExit):
        choose_device("--tf32", "on")
    assert started.pop() == (words, "1")
    assert choose_device("--tf32", "on").endswith("TF32 on") and not started
    with pytest.raises(SystemExit):  # a program that was started by one with TF32
        choose_device()
    assert started.pop() == (words, None)
    with pytest.raises(train.InputError, match="--tf32 on needs a GPU of compute capability 8.0"):
        choose_device("--tf32", "on", "--device", "cpu")
    monkeypatch.setattr(gpu, "compute_capability", lambda number: 75)
    with pytest.raises(train.InputError, match="leave it out"):
        choose_device("--tf32", "on")
    monkeypatch.delenv("OVERLOCK_TF32", raising=False)
    for variable, expected in (({}, "0"), ({"OVERLOCK_TF32": "1"}, "None")):
        code = "import os; from jittor_impl.aligned import start"
        code += "; print(os.environ.get('NVIDIA_TF32_OVERRIDE'))"
        settings = dict(capture_output=True, text=True, cwd=Path(__file__).parents[1])
        environment = {**os.environ, "nvcc_path": "", "NVIDIA_TF32_OVERRIDE": "1", **variable}
        result = subprocess.run([sys.executable, "-c", code], env=environment, **settings)
        assert result.stdout.split() == [expected], result.stderr
