"""What `make gpu` needs on a machine without a network, in one folder: `make gpu-bundle`.

    python tools/gpu_bundle.py [--python-version 3.12] [--bundle gpu-bundle]

downloads it. The machine must have a Python of that version with PyTorch and its CUDA libraries, an
nvcc and a g++. There, in this repository with the folder beside it,

    python tools/gpu_check.py --bundle gpu-bundle

makes the two environments from it, with that PyTorch in both, and makes the check.
"""

import argparse
import base64
import hashlib
import re
import shutil
import site
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 60  # MB
ENVIRONMENTS = {name: ROOT / f".venv-gpu-{name}" for name in ("jittor", "torch")}
# pip matches them one by one; from the glibc of Ubuntu 20.04 back.
PLATFORMS = (*(f"manylinux_2_{n}_x86_64" for n in (31, 28, 27, 24, 17, 12, 5)), "linux_x86_64")
PLATFORMS += ("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64")
# Of the six copies of one library in the package, the name that Jittor links to and its soname.
ONEDNN = ("libmkldnn.so", "libdnnl.so.2")


def requirements(name):
    """What the environment of Jittor or PyTorch needs beside the PyTorch of the machine."""
    lines = (ROOT / f"requirements-{name}.txt").read_text().splitlines()
    lines = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    # torch_impl takes whichever PyTorch and NumPy there are.
    if name == "torch":
        lines = [line for line in lines if not re.match(r"(torch|numpy)\b", line)]
    return [*lines, "pytest"]


def stripped(library):
    """The bytes of a shared library without what only a debugger reads."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "library.so"
        file.write_bytes(library)
        subprocess.run(["strip", "--strip-unneeded", file], check=True)
        return file.read_bytes()


def make_small(wheel):
    """Compress a wheel anew, in a way that pip reads too; of oneDNN's leave what Jittor needs.

    NumPy's is then 10 MB and not 18, oneDNN's 10 and not 65.
    """
    smaller, records = wheel.with_suffix(".part"), []
    with (
        zipfile.ZipFile(wheel) as old,
        zipfile.ZipFile(smaller, "w", zipfile.ZIP_LZMA) as new,
    ):
        for name in old.namelist():
            last = name.rpartition("/")[2]
            left_out = name.startswith("onednn") and "/lib/" in name and last not in ONEDNN
            if left_out or last == "RECORD":
                continue
            content = old.read(name)
            content = stripped(content) if last in ONEDNN else content
            new.writestr(name, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode()
            records.append(f"{name},sha256={digest.rstrip('=')},{len(content)}\n")
        record = next(name for name in old.namelist() if name.endswith("/RECORD"))
        new.writestr(record, "".join([*records, f"{record},,\n"]))
    smaller.replace(wheel)


def make(bundle, python_version):
    """Fill the folder `bundle` with wheels for this version of Python."""
    pip, wheels = [sys.executable, "-m", "pip"], bundle / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    jittor = next(line for line in requirements("jittor") if line.startswith("jittor=="))
    # Jittor comes as source alone.
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "-w", wheels, jittor], check=True)
    options = ["--quiet", "--only-binary=:all:", "--implementation=cp", f"--find-links={wheels}"]
    options += [f"--python-version={python_version}", *(f"--platform={p}" for p in PLATFORMS)]
    wanted = {*requirements("jittor"), *requirements("torch"), "pip"}
    subprocess.run([*pip, "download", *options, "-d", wheels, *sorted(wanted)], check=True)
    for wheel in [*wheels.glob("onednn_cpu_gomp-*.whl"), *wheels.glob("numpy-*.whl")]:
        make_small(wheel)
    report(bundle)


def report(bundle):
    """Print what is in the bundle; ends with status 1 if that is more than LIMIT."""
    sizes = {f: f.stat().st_size / 1e6 for f in bundle.rglob("*") if f.is_file()}
    for file, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size:6.1f} MB  {file.relative_to(bundle)}")
    total = sum(sizes.values())
    print(f"{total:6.1f} MB  {bundle}")
    if total > LIMIT:
        sys.exit(f"gpu_bundle.py: error: more than {LIMIT} MB")


def install(bundle, environments):
    """Make the environments, {name: folder}, of this Python with what it has, and of the bundle."""
    for name, environment in environments.items():
        subprocess.run(
            [sys.executable, "-m", "venv", "--clear", "--without-pip", environment], check=True
        )
        python = environment / "bin" / "python"
        code = "import site; print(site.getsitepackages()[0])"
        output = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
        # PyTorch, and the packages of CUDA libraries beside it; after the environment's own.
        places = [*site.getsitepackages(), site.getusersitepackages()]
        Path(output.stdout.strip(), "machine.pth").write_text("".join(f"{p}\n" for p in places))
        wheels = bundle / "wheels"
        pip = next(wheels.glob("pip-*.whl")) / "pip"
        command = [python, pip, "install", "--quiet", "--no-index", f"--find-links={wheels}"]
        subprocess.run([*command, *requirements(name)], check=True)


def main():
    parser = argparse.ArgumentParser(prog="gpu_bundle.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--python-version", default="3.12", help="that of the machine's PyTorch")
    add("--bundle", type=Path, default=ROOT / "gpu-bundle", help="the folder")
    add("--install", action="store_true", help="make the environments from it, on the machine")
    args = parser.parse_args()
    if not args.install:
        make(args.bundle, args.python_version)
    elif not list(args.bundle.glob("wheels/pip-*.whl")):
        parser.error(f"no wheels in {args.bundle}; make gpu-bundle, where there is a network")
    else:
        install(args.bundle, ENVIRONMENTS)


if __name__ == "__main__":
    main()
