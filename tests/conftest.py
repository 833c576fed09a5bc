"""Fixtures of the tests.

Those of models, operators and training are written once, for either framework: they run against
`impl`, the adapter of tools/frameworks.py, which hides what differs.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from under_test import BESIDE_TORCH, DEVICE, NAME  # noqa: E402
from tools import frameworks  # noqa: E402

# What the tests expect is right to the bit on a CPU, so they see no GPU unless they ask for one.
# Jittor then compiles itself without CUDA, once: with CUDA it does not start without a GPU.
if DEVICE == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# A shell lets what it starts in the background, and all that this starts, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What is about Jittor alone runs beside Jittor.
if NAME == "jittor":
    collect_ignore = [f"test_{name}.py" for name in BESIDE_TORCH]
else:
    jittor_only = ("aligned_nn", "functions", "setup", "cuda_setup")
    collect_ignore = [f"test_{name}.py" for name in jittor_only]
# `make test-gpu`: what computes, and train.py as a whole.
ON_GPU = ("ops", "aligned_nn", "functions", "models", "contmix_block", "train")
if DEVICE == "cuda":
    names = {path.name for path in Path(__file__).parent.glob("test_*.py")}
    collect_ignore += names - {f"test_{name}.py" for name in ON_GPU}


# On a GPU always, for the tests that use a framework without it.
@pytest.fixture(scope="session", autouse=DEVICE == "cuda")
def impl():
    try:
        return frameworks.load(NAME, DEVICE)
    except SystemExit as error:
        pytest.exit(f"{error}; here that is OVERLOCK_DEVICE=cpu", 2)


@pytest.fixture(params=["cpu", "cuda"] if DEVICE == "cpu" else ["cuda"])
def kernels(request, monkeypatch):
    """jittor_impl's CPU kernels, then its GPU kernels, run on the CPU by cuda_on_cpu.h.

    On a GPU those alone, as they are.
    """
    from jittor_impl.aligned.start import jt

    code, emulation = jt.code, f'#include "{ROOT / "tests" / "cuda_on_cpu.h"}"\n'

    def run_cuda(shapes, dtypes, inputs, cpu_header, cpu_src, cuda_header, cuda_src, data):
        return code(
            shapes, dtypes, inputs, cpu_header=emulation + cuda_header, cpu_src=cuda_src, data=data
        )

    if request.param == "cuda" and DEVICE == "cpu":
        monkeypatch.setattr(jt, "code", run_cuda)
    return request.param


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A folder in TinyImageNet's layout: 3 classes of 12 training and 6 validation images.

    One training image is greyscale.
    """
    from PIL import Image

    root = tmp_path_factory.mktemp("data") / "tiny"
    generator = np.random.default_rng(0)
    annotations = []
    for label, wnid in enumerate(("n03", "n01", "n02")):
        train, val = root / "train" / wnid / "images", root / "val" / "images"
        for folder, prefix, count in ((train, "", 12), (val, "val_", 6)):
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = generator.integers(0, 120, (64, 64, 3)).astype(np.uint8)
                pixels[:, :, label] += 100  # the class is the colour: learnable in a few steps
                image = Image.fromarray(pixels)
                if folder == train and label == 0 and i == 0:
                    image = image.convert("L")
                image.save(folder / f"{prefix}{wnid}_{i}.JPEG")
        annotations += [f"val_{wnid}_{i}.JPEG\t{wnid}\t0\t0\t63\t63\n" for i in range(6)]
    (root / "val" / "val_annotations.txt").write_text("".join(sorted(annotations)))
    return root
