"""Compile Jittor's core and every operator of a model for CUDA 13, on a machine without a GPU.

    python tests/compile_for_cuda.py [--model overlock_xxt] [--img-size 64] [--archs "80 90"]
                                     [--home FOLDER]

The operators are those of a training step and of inference. Runs in an environment with
requirements-jittor.txt and requirements-cuda.txt, or the first and PyTorch's packages of CUDA
libraries beside a system-wide nvcc. The compiler, the headers and Jittor are the real
ones; the libraries that are loaded are stand-ins whose functions do nothing (cuda_stubs.c), so that
Jittor goes on from one operator to the next. It shows that everything compiles and links, and
nothing about the numbers. Takes some 15 minutes on two cores; with --home the compiled files stay
there for the next time.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))
from jittor_impl.aligned.setup import cuda_toolkit  # noqa: E402
from jittor_impl.aligned.setup.atomic import replace_link  # noqa: E402

# Batches of the default run, the last ones too: Jittor compiles some operators for each size.
TRAINING, VALIDATION = (64, 16), (64, 40)
STUBS = TESTS / "cuda_stubs.c"
STAND_INS = ("cudart", "cublas", "cublasLt", "cudnn", "cufft", "curand", "cusparse")


def make_stand_in(library, folder):
    """A library of the same name and with the same functions, which do nothing.

    Returns its path.
    """
    settings = dict(check=True, capture_output=True, text=True)
    symbols = subprocess.run(["nm", "-D", "--defined-only", library], **settings).stdout
    lines = [line.split() for line in symbols.splitlines()]
    names = {words[2].partition("@")[0] for words in lines if words[1] in "TWi"}
    stubs = subprocess.run(["gcc", "-E", "-P", STUBS], **settings).stdout
    written = set(re.findall(r"\b\w+(?=\()", stubs))
    prefix = "_*(cuda|cublas|cudnn|cufft|curand|cusparse)"
    names = {name for name in names - written if re.match(prefix, name)}
    source, stand_in = folder / f"{library.name}.c", folder / library.name
    source.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(names)))
    options = ["-w", "-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
    subprocess.run(["gcc", *options, "-o", stand_in, source, STUBS], check=True)
    return stand_in


def prepare(home):
    """Put the toolkit of this environment under `home`, with stand-ins for its libraries.

    Returns its nvcc.
    """
    # Those that are put together there; what is installed elsewhere gets no stand-ins.
    nvccs = [n for n in cuda_toolkit.candidates(home) if home in Path(n).parents]
    nvcc = next((n for n in nvccs if not cuda_toolkit.problem(n, home)), None)
    if not nvcc:
        sys.exit(
            "compile_for_cuda.py: error: NVIDIA's packages are not installed; "
            "pip install -r requirements-cuda.txt"
        )
    lib64 = Path(nvcc).parents[1] / "lib64"
    for name in STAND_INS:
        library = (lib64 / f"lib{name}.so").resolve()
        stand_in = make_stand_in(library, lib64.parent)
        for link in lib64.glob(f"lib{name}.so*"):
            replace_link(link, stand_in)
    return nvcc


def steps(model_name, size):
    """A training step and inference, on the GPU that is not there; runs in a process of its own."""
    import numpy as np
    from jittor_impl import models, train
    from jittor_impl.aligned.gpu import prepare_gpu
    from jittor_impl.aligned.start import jt

    jt.flags.use_cuda = 1
    prepare_gpu(tf32=False)
    defaults = train.make_parser().parse_args(["--num-classes", "20"])
    model = models.OverLoCK(**models.VARIANTS[model_name], num_classes=defaults.num_classes)
    optimizer = train.make_optimizer(model, defaults)
    images = np.zeros((max(TRAINING + VALIDATION), 3, size, size), np.float32)
    model.train()
    for n in TRAINING:
        train.training_step(model, optimizer, images[:n], np.zeros(n, np.int64), defaults)
        print(f"every operator of a training step of {n} images is compiled", flush=True)
    model.eval()
    with jt.no_grad():
        for n in VALIDATION:
            model(jt.array(images[:n])).numpy()
        model.reparam()
        model(jt.array(images)).numpy()
    print("every operator of inference is compiled", flush=True)


def main():
    parser = argparse.ArgumentParser(
        prog="compile_for_cuda.py", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--model", default="overlock_xxt")
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--archs", default="80 90", help="compute capabilities, without the dot")
    parser.add_argument(
        "--home", type=Path, help="where the compiled files go, by default a temporary folder"
    )
    args = parser.parse_args()
    if "OVERLOCK_COMPILES_FOR_CUDA" in os.environ:
        return steps(args.model, args.img_size)
    with tempfile.TemporaryDirectory() as temporary:
        home, start = (args.home or Path(temporary)).resolve(), time.perf_counter()
        home.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "HOME": str(home),
            "nvcc_path": prepare(home),
            "cuda_archs": args.archs,
            "OVERLOCK_COMPILES_FOR_CUDA": "1",
        }
        environment.pop("JITTOR_HOME", None)  # it would come before HOME
        status = subprocess.run([sys.executable, *sys.argv], env=environment).returncode
        print(
            f"{'compiled' if status == 0 else 'failed'} for compute capabilities {args.archs}, "
            f"{(time.perf_counter() - start) / 60:.0f} min"
        )
        sys.exit(status)


if __name__ == "__main__":
    main()
