"""Importing the models works by itself, and aligned/start.py mends what it finds.

The tests of CUDA's set-up are in test_cuda_setup.py.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from jittor_impl.aligned import start
from jittor_impl.aligned.setup import compilation
from jittor_impl.aligned.start import jt

ROOT = Path(__file__).resolve().parent.parent


def python(code, folder=ROOT, **environment):
    """Run code in a process that inherits only what every shell has, nothing that Jittor set."""
    command = [sys.executable, "-c", code]
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], **environment}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def stopped(result, message):
    """Whether the process ended as for a user's mistake: status 2, the message, no traceback."""
    says = message in result.stderr and "Traceback" not in result.stderr
    return result.returncode == 2 and says


def test_second_import_takes_seconds():
    begin = time.perf_counter()
    result = python("import jittor_impl.models")
    assert result.returncode == 0, result.stderr
    assert len(result.stderr.splitlines()) <= 1, result.stderr  # at most the notice about CUDA
    assert time.perf_counter() - begin < 15


def test_import_in_a_thread_keeps_the_signal_handlers():
    """signal.signal works in the main thread alone, and Jittor's handlers quit without a word."""
    code = """
import os, signal, subprocess, threading
caught = []
signal.signal(signal.SIGINT, lambda *_: caught.append("SIGINT"))
def build():
    from jittor_impl.models import overlock_xxt
    caught.append(overlock_xxt(num_classes=2).num_classes)
thread = threading.Thread(target=build)
thread.start()
thread.join()
subprocess.run(["sh", "-c", "kill -9 $$"])
os.kill(os.getpid(), signal.SIGINT)
assert caught == [2, "SIGINT"], caught
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_jittor_is_imported_by_start_alone():
    """An earlier import would start Jittor as it is by itself: downloads, CUDA without a GPU."""
    for path in (ROOT / "jittor_impl").rglob("*.py"):
        if path.name != "start.py":
            lines = path.read_text().splitlines()
            imports = [line for line in lines if line.startswith(("import jittor", "from jittor"))]
            assert not imports, path


def test_operators_are_compiled_with_headers_ahead_of_them():
    """gcc says with -Winvalid-pch why it does not take a header that was compiled ahead."""
    flags = shlex.split(jt.flags.cc_flags)
    header = flags[0].removeprefix("-include")
    assert Path(f"{header}.gch").is_file() and "asm_tuner" not in jt.flags.python_path
    options = [flag for flag in flags if not flag.startswith(("-l", "-L", "-shared"))]
    # An operator of its own: those in the cache may be of older kernels or of a deleted clone.
    mark = f"{time.time_ns()}LL"
    jt.code((1,), "float32", [], cpu_src=f"out0_p[0] = {mark};").sync()
    sources = Path(header).parent.glob("jit/*_op.cc")
    source = next(path for path in sources if mark in path.read_text())
    command = [jt.flags.cc_path, *options, "-Winvalid-pch", "-fsyntax-only", "-H", source]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and f"! {header}.gch" in result.stderr, result.stderr[:2000]


def test_a_host_of_another_name_and_kernel_finds_the_same_cache():
    code = "import platform; platform.node = platform.platform = lambda *_: '{}'\n"
    code += "from jittor_impl.aligned.start import jt; print(jt.compiler.cache_path)"
    paths = {python(code.format(host)).stdout for host in ("one", "another")}
    assert paths == {f"{jt.compiler.cache_path}\n"}


def test_a_home_that_cannot_be_written_to(tmp_path):
    (tmp_path / ".cache").write_text("")
    result = python("import jittor_impl.models", HOME=str(tmp_path))
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert str(tmp_path / ".cache") in result.stderr and "set HOME" in result.stderr


def test_a_link_into_a_deleted_environment_is_mended(tmp_path):
    root = tmp_path / ".cache" / "jittor" / "mkl" / "dnnl_lnx_2.2.0_cpu_gomp"
    (root / "lib").mkdir(parents=True)
    (root / "lib" / "libmkldnn.so").symlink_to(tmp_path / "deleted" / "lib" / "libmkldnn.so")
    start.provide_onednn(tmp_path)
    assert (root / "lib" / "libmkldnn.so").resolve().is_file()
    assert (root / "include" / "oneapi" / "dnnl" / "dnnl.hpp").is_file()


def test_jittors_own_download_is_left_alone(tmp_path):
    root = tmp_path / ".cache" / "jittor" / "mkl" / "dnnl_lnx_2.2.0_cpu_gomp"
    (root / "lib").mkdir(parents=True)
    (root / "lib" / "libmkldnn.so").write_text("downloaded")
    start.provide_onednn(tmp_path)
    assert (root / "lib" / "libmkldnn.so").read_text() == "downloaded"
    assert not (root / "include").exists()


def test_missing_jittor_is_named():
    code = """
from importlib import metadata
version = metadata.version
def without_jittor(name):
    if name == "jittor":
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = without_jittor
import jittor_impl.aligned.start
"""
    result = python(code)
    assert stopped(result, "requirements-jittor.txt"), result.stderr


def test_numpy_2_is_refused():
    code = """
from importlib import metadata
metadata.version = lambda name: "2.1.0"
import jittor_impl.aligned.start
"""
    result = python(code)
    assert stopped(result, "pip install 'numpy<2'"), result.stderr


def test_missing_compiler_is_named(tmp_path):
    result = python("import jittor_impl.aligned.start", PATH=str(tmp_path))
    assert stopped(result, "no g++"), result.stderr


def test_paths_that_jittor_cannot_compile_in_are_named_before_it_starts(tmp_path):
    """Of HOME, of Python's headers; letters of any language are no obstacle."""
    home = tmp_path / "it's $here 家"
    begin = time.perf_counter()
    result = python("import jittor_impl.models", HOME=str(home))
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    says = f"its cache lies in {home}, which has \"'\" ' ' '$'; set HOME or JITTOR_HOME to"
    assert says in result.stderr and not home.exists()
    # Jittor notes a JITTOR_HOME down, for later starts without one.
    (tmp_path / ".cache" / "jittor").mkdir(parents=True)
    (tmp_path / ".cache" / "jittor" / "config.json").write_text('{"JITTOR_HOME": "/my home"}')
    result = python("import jittor_impl.models", HOME=str(tmp_path))
    assert stopped(result, "its cache lies in /my home, which has ' '"), result.stderr
    (tmp_path / ".cache" / "jittor" / "config.json").write_text("")
    result = python("import jittor_impl.models", HOME=str(tmp_path))
    assert stopped(result, "config.json, which Jittor wrote, is damaged; remove it"), result.stderr
    code = "import sysconfig; sysconfig.get_path = lambda _: '/opt/my python'"
    result = python(
        f"{code}\nimport os; os.path.isfile = lambda _: True; import jittor_impl.models"
    )
    assert stopped(result, "Python's headers lies in /opt/my python, which has ' '"), result.stderr
    assert time.perf_counter() - begin < 15


def test_an_environment_may_lie_anywhere_and_compiles_nothing_anew(tmp_path):
    """Its Jittor, in a path with spaces and quotes, is found in the cache by what it holds."""
    odd = tmp_path / 'my "env" it\'s $here 环境'
    place = Path(metadata.distribution("jittor").locate_file(""))
    for name in ("jittor", "jittor_utils"):
        shutil.copytree(place / name, odd / name)
    code = f"""
import sys; sys.path.insert(0, {str(odd)!r})
from jittor_impl.aligned.start import jt
print(jt.compiler.cache_path, jt.__file__, (jt.ones(3) + 1).sum().item())
"""
    result = python(code)
    assert result.stdout.split() == [jt.compiler.cache_path, jt.__file__, "6.0"], result.stderr
    assert "compiles itself" not in result.stderr


def test_a_clone_may_lie_anywhere(tmp_path):
    clone = tmp_path / 'a "b" it\'s $here 仓库'
    shutil.copytree(ROOT / "jittor_impl", clone / "jittor_impl")
    code = """
from jittor_impl.aligned.start import jt
from jittor_impl.models import overlock_xxt
model = overlock_xxt(num_classes=2).eval()
print(model(jt.ones(1, 3, 64, 64)).numpy().shape)
"""
    result = python(code, folder=clone)
    assert result.returncode == 0 and "(1, 2)" in result.stdout, result.stderr


def test_the_folder_of_layers_works_alone(tmp_path):
    """As its README says: copied with the kernels, under a name of one's own."""
    shutil.copytree(ROOT / "jittor_impl" / "aligned", tmp_path / "layers")
    shutil.copytree(ROOT / "jittor_impl" / "kernels", tmp_path / "layers" / "kernels")
    code = """
from layers.start import jt, nn
from layers.swap import swapped
own = nn.BatchNorm2d, nn.AdamW
with swapped():
    norm, pool = nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d((None, 3))
    optimizer = nn.AdamW(norm.parameters())
    assert type(norm).__module__ == "layers.nn" and optimizer.weight_decay == 0.01
    optimizer.step((pool(norm(jt.randn(2, 2, 4, 5))) ** 2).sum())
    print(pool(jt.ones(1, 2, 4, 5)).shape, norm.num_batches_tracked.item())
assert own == (nn.BatchNorm2d, nn.AdamW)
"""
    result = python(code, folder=tmp_path)
    assert result.returncode == 0 and "[1,2,4,3,] 1" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("works", (True, False))
def test_core_compiles_with_headers_compiled_ahead(works, tmp_path):
    """Its files begin with them, some excepted; where that fails once, none does from then on."""
    (tmp_path / "small.cc").write_text("int small;")
    (tmp_path / "op_compiler.cc").write_text("int large; // the largest file is the first one")
    compiler = f'"{shutil.which("g++")}"'
    commands = [
        f'{compiler} "{tmp_path / name}"  -std=c++14  -c -o "{tmp_path / name}.o"'
        for name in ("small.cc", "op_compiler.cc")
    ]
    ran = []

    def run(commands, *_):
        ran.append(commands)
        if not works and "-include" in "".join(commands):
            raise RuntimeError

    jittor_utils = SimpleNamespace(run_cmd=ran.append, run_cmds=run, get_total_mem=lambda: 2**40)
    compilation.compile_core_faster(jittor_utils)
    for _ in range(2):
        jittor_utils.run_cmds(commands, str(tmp_path), "", "Compiling jittor_core")
    largest, small = ran[0]
    assert largest == commands[1]
    header = re.search(r"g\+\+\" -include'([^']+)' ", small)[1]
    assert Path(header).read_text() == (compilation.FOLDER / "core_headers.h").read_text()
    assert ran[1:] == ([ran[0]] if works else [commands, commands])
    jittor_utils.run_cmds(commands, str(tmp_path), "", "another")
    assert ran[-1] == commands
    assert jittor_utils.get_total_mem() == len(os.sched_getaffinity(0)) * 3 * 2**30
    # Beside its data, the header is compiled as the others will ask for it.
    include, data = Path(jt.flags.jittor_path) / "src", tmp_path / "data.cc"
    flags = f'-std=c++14 -I"{include}" -I"{sysconfig.get_path("include")}" -lm'
    (tmp_path / "vdp").write_text("")
    command = (
        f'{compiler} {flags} -include "{tmp_path}/vdp" "{data}" -c -o "{data.with_suffix(".o")}"'
    )
    jittor_utils.run_cmd(command)
    assert ran[-1] == command and Path(f"{header}.gch").exists()
