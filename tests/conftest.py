"""Which framework is under test: OVERLOCK_TESTS=jittor or torch (tests/run.py sets it), else the one installed.

The tests of models, operators and training are written once, against `impl`, which hides what differs.
"""
import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
NAME = os.environ.get("OVERLOCK_TESTS") or ("jittor" if importlib.util.find_spec("jittor") else "torch")
sys.path[:0] = [str(ROOT / f"{NAME}_impl"), str(ROOT / "tests")]

# What needs matplotlib, or both environments, runs beside PyTorch; what is about Jittor alone, beside Jittor.
if NAME == "jittor":
    collect_ignore = ["test_plot.py", "test_prepare.py", "test_both.py"]
else:
    collect_ignore = ["test_aligned_nn.py", "test_fused.py", "test_setup.py", "test_cuda_setup.py"]


class Jittor:
    name, suffix = "jittor", ""

    def __init__(self):
        import models
        import ops
        from jittor_setup import jt
        self.models, self.ops, self.jt = models, ops, jt

    def array(self, x):
        return self.jt.array(x.astype(np.int32) if x.dtype == np.int64 else x)

    def numpy(self, x):
        return x.numpy()

    def gradients(self, output, grad_output, inputs):
        return [g.numpy() for g in self.jt.grad((output * self.array(grad_output)).sum(), inputs)]

    def no_grad(self):
        return self.jt.no_grad()

    def cross_entropy(self, logits, target):
        return self.jt.nn.cross_entropy_loss(logits, target)

    def step(self, optimizer, loss):
        optimizer.step(loss)


class Torch:
    name, suffix = "torch", "_torch"

    def __init__(self):
        import models
        import ops
        import torch
        self.models, self.ops, self.torch = models, ops, torch

    def array(self, x):
        x = self.torch.from_numpy(np.array(x))
        return x.requires_grad_() if x.is_floating_point() else x

    def numpy(self, x):
        return x.detach().numpy()

    def gradients(self, output, grad_output, inputs):
        grad_output = self.torch.from_numpy(np.array(grad_output))
        return [g.numpy() for g in self.torch.autograd.grad(output, inputs, grad_output)]

    def no_grad(self):
        return self.torch.no_grad()

    def cross_entropy(self, logits, target):
        return self.torch.nn.functional.cross_entropy(logits, target)

    def step(self, optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="session")
def impl():
    return Jittor() if NAME == "jittor" else Torch()


@pytest.fixture(params=["cpu", "cuda"])
def kernels(request, monkeypatch):
    """jittor_impl's kernels for the CPU, then those for the GPU, run on the CPU by cuda_on_cpu.h."""
    import ops
    code, emulation = ops.jt.code, f'#include "{ROOT / "tests" / "cuda_on_cpu.h"}"\n'

    def run_cuda(shapes, dtypes, inputs, cpu_header, cpu_src, cuda_header, cuda_src, data):
        return code(shapes, dtypes, inputs, cpu_header=emulation + cuda_header, cpu_src=cuda_src, data=data)

    if request.param == "cuda":
        monkeypatch.setattr(ops.jt, "code", run_cuda)
    return request.param


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A folder in TinyImageNet's layout: 3 classes, 12 training and 6 validation images each, one of them greyscale."""
    from PIL import Image
    root = tmp_path_factory.mktemp("data") / "tiny"
    generator = np.random.default_rng(0)
    annotations = []
    for label, wnid in enumerate(("n03", "n01", "n02")):
        for split, count in (("train", 12), ("val", 6)):
            folder = root / "train" / wnid / "images" if split == "train" else root / "val" / "images"
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = generator.integers(0, 120, (64, 64, 3)).astype(np.uint8)
                pixels[:, :, label] += 100  # the class is the colour: learnable in a few steps
                image = Image.fromarray(pixels)
                name = f"{wnid}_{i}.JPEG" if split == "train" else f"val_{wnid}_{i}.JPEG"
                (image.convert("L") if split == "train" and label == 0 and i == 0 else image).save(folder / name)
                if split == "val":
                    annotations.append(f"{name}\t{wnid}\t0\t0\t63\t63\n")
    (root / "val" / "val_annotations.txt").write_text("".join(sorted(annotations)))
    return root
