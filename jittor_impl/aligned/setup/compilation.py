"""Compiles Jittor, and operators for it, once for all clones and environments, and faster.

Jittor recognises what it has compiled by the commands, with all paths in them. So that others find
it, what the commands name lies in Jittor's cache, in folders named after what they hold.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from .atomic import replace_text

FOLDER = Path(__file__).resolve().parent
# Tests in C++, which Jittor compiles into its core, and tests in Python.
TESTS = {"test", "mkl_test_op.cc", "mkl_test_op.h", "cpu_cnn_inference_f32.cpp"}
# These files of Jittor define a name that the headers declare otherwise.
WITHOUT_HEADERS = ("op_compiler.cc", "fp16_op_type.cc")


def import_from_cache(home):
    """Let this process import a copy of the environment's Jittor that lies in the cache.

    Where an environment lies then matters to nothing that is compiled. Jittor's tests are left out.
    Call it ahead of the import.
    """
    roots = [Path(find_spec(name).origin).parent for name in ("jittor", "jittor_utils")]
    paths = [path for root in roots for path in sorted(root.rglob("*")) if path.suffix != ".pyc"]
    site = roots[0].parent
    names = {path.relative_to(site): path for path in paths if path.is_file()}
    files = {name: path for name, path in names.items() if TESTS.isdisjoint(name.parts)}
    # Its compiled .pyc files come along: Python would warn of Jittor's escapes as it makes them.
    key = f"{sys.implementation.cache_tag}-{digest(files)}"
    folder = Path(home) / ".cache" / "jittor" / f"overlock-jittor-{key}"
    if not folder.exists():
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
        for root in roots:
            shutil.copytree(root, temporary / root.name, ignore=shutil.ignore_patterns(*TESTS))
        try:
            temporary.rename(folder)
        except OSError:  # another process was there first
            shutil.rmtree(temporary)
    sys.path.insert(0, str(folder))


def digest(files):
    """16 hexadecimal digits of what {name: path} holds."""
    sums = [(str(name), hashlib.sha1(path.read_bytes()).digest()) for name, path in files.items()]
    return hashlib.sha1(repr(sums).encode()).hexdigest()[:16]


def in_cache(files, cache):
    """A folder of the cache with copies of `files`, named after what they hold."""
    files = {path.name: path for path in sorted(files)}
    folder = Path(cache) / f"overlock-{digest(files)}"
    for name, path in files.items():
        if not (folder / name).exists():
            replace_text(folder / name, path.read_text(encoding="utf-8"), 0o644)
    return folder


def compile_core_faster(jittor_utils):
    """Compile Jittor's core in half the time: what most of its files begin with is compiled once.

    Where that cannot be done, it is compiled as usual.
    """
    run_command, run_commands = jittor_utils.run_cmd, jittor_utils.run_cmds
    memory, processors = jittor_utils.get_total_mem, len(os.sched_getaffinity(0))
    # It has as many compilers as memory for 3 GiB each, which keep each other waiting where there
    # are fewer processors.
    jittor_utils.get_total_mem = lambda: min(memory(), processors * 3 * 2**30)

    def run_one(command, *args, **kwargs):
        run = partial(run_command, command, *args, **kwargs)
        if not re.search(r'/data\.cc" -c -o "[^"]*/data\.o"$', command):
            return run()
        # Jittor compiles its data by itself before the rest, at which the header is compiled, too.
        compiler, *flags, _, _, source, _, _, _ = shlex.split(command)
        compile_header(core_header(Path(source).parent), compiler, without_linking(flags), run)

    def run_many(commands, cache, folder, name="run_cmds"):
        # Jittor comes here at every start, to see whether each command is still that which it ran.
        failed = Path(cache) / "core_headers.failed"
        if name != "Compiling jittor_core" or failed.exists() or "clang" in commands[0].split()[0]:
            return run_commands(commands, cache, folder, name)
        header = core_header(cache)
        try:
            if not list(Path(cache).glob("jittor_core*")):
                cpp = next(command for command in commands if source_of(command).suffix == ".cc")
                # compiler, source, flags..., -c, -o, object
                compiler, _, *flags, _, _, _ = shlex.split(cpp)
                compile_header(header, compiler, flags)
            run_commands(with_header(commands, header), cache, folder, name)
        except RuntimeError:
            failed.touch()
            run_commands(commands, cache, folder, name)
        Path(f"{header}.gch").unlink(missing_ok=True)  # 90 MB

    jittor_utils.run_cmd, jittor_utils.run_cmds = run_one, run_many


def core_header(cache):
    return write_header(Path(cache) / "core", FOLDER / "core_headers.h")


def without_linking(flags):
    return [flag for flag in flags if not flag.startswith(("-l", "-L", "-shared"))]


def source_of(command):
    """The file that a compiler's command compiles, in quotes: .cc, or .cu for nvcc."""
    return Path(re.search(r'"([^"]+\.c[cu])"', command)[1])


def with_header(commands, header):
    """The compiler's `commands` that begin with `header`, some files excepted.

    The largest file comes first: nothing would run beside it at the end.
    """
    faster = []
    for command in sorted(commands, key=lambda command: -source_of(command).stat().st_size):
        source = source_of(command)
        if source.suffix == ".cc" and source.name not in WITHOUT_HEADERS:
            command = command.replace(" ", f" -include'{header}' ", 1)
        faster.append(command)
    return faster


def write_header(path, source, key=""):
    """A file with the text of `source`, named `path`, and by the text and `key`."""
    text = source.read_text()
    header = Path(f"{path}-{hashlib.sha1((key + text).encode()).hexdigest()[:16]}.h")
    if not header.exists():
        replace_text(header, text, 0o644)
    return header


def compile_header(header, compiler, flags, meanwhile=lambda: None):
    """Compile `header` ahead, beside it, and run `meanwhile` at the same time.

    Returns whether it is compiled; the compiler then reads that.
    """
    compiled, temporary = Path(f"{header}.gch"), Path(f"{header}.{os.getpid()}")
    if not compiled.exists():
        command = [compiler, *flags, "-x", "c++-header", header, "-o", temporary]
        silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with subprocess.Popen(command, **silent) as process:
            meanwhile()
        if process.returncode == 0:
            os.replace(temporary, compiled)
    return compiled.exists()


def compile_operators_faster(jittor, cache):
    """Compile an operator for the CPU in a third of the time.

    Its headers are compiled ahead of it, and no Python runs around the compiler. Where the headers
    cannot be compiled ahead, the compiler reads them as usual.
    """
    if "clang" in jittor.flags.cc_path:
        return
    # asm_tuner.py swaps the stores of large loops for ones that bypass the cache, which no step of
    # ours gains from. Jittor reads every file that the command names to see whether it changed, so
    # Python is not named there.
    script = "compile_operator.sh"
    jittor.flags.python_path = f"sh {in_cache([FOLDER / script], cache) / script}"
    os.environ["OVERLOCK_PYTHON"] = sys.executable
    jittor.flags.use_parallel_op_compiler = min(
        jittor.flags.use_parallel_op_compiler, len(os.sched_getaffinity(0))
    )
    flags = jittor.flags.cc_flags
    header = write_header(Path(cache) / "operators", FOLDER / "operator_headers.h", key=flags)
    if compile_header(header, jittor.flags.cc_path, without_linking(shlex.split(flags))):
        jittor.flags.cc_flags = f" -include'{header}' {flags}"
