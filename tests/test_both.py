"""What needs both environments: the mirror, the same bits from the same seed, each other's checkpoints."""
import argparse
import ast
import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
MIRRORED = ["models.py", "layers.py", "dataset.py", "checkpoint.py", "progress.py", "torch_pickle.py", "train.py"]
# What only one framework needs. Everything else must be in both.
ONLY_JITTOR = {"ops.py": {"NA2dAV", "NA2dAV.execute(self, attn, value, kernel_size)", "NA2dAV.grad(self, grad_out)",
                          "NA2dAV.run(self, kernel, a, b, out_shape)", "launch(headers, code, inputs, shapes, data)"}}
ONLY_TORCH = {"ops.py": {"set_na2d_backend(name)", "tiling(size, kernel_size, whole)",
                         "tile_indices(height, width, kernel_size, device)", "na2d_av_dense(attn, value, kernel_size)"}}
SIZES = ["-b", "16", "--num-classes", "3", "--train-per-class", "12", "--val-per-class", "6"]


@pytest.fixture(scope="module")
def pythons():
    if "JITTOR_PYTHON" not in os.environ:
        pytest.skip("JITTOR_PYTHON is not set; `make test` sets it")
    return {"jittor": os.environ["JITTOR_PYTHON"], "torch": sys.executable}


def run(pythons, name, *options):
    command = [pythons[name], str(ROOT / f"{name}_impl" / "train.py"), *map(str, options)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def outline(path):
    """Classes and functions of a file in order, with their signatures; forward and execute count as one name."""
    names = []

    def visit(body, prefix):
        for node in body:
            if isinstance(node, ast.ClassDef):
                names.append(prefix + node.name)
                visit(node.body, f"{prefix}{node.name}.")
            if isinstance(node, ast.FunctionDef):
                name = "forward" if node.name == "execute" and "Function" not in prefix else node.name
                names.append(f"{prefix}{name}({ast.unparse(node.args)})")

    visit(ast.parse(path.read_text()).body, "")
    return names


@pytest.mark.parametrize("name", [*MIRRORED, "ops.py"])
def test_mirror(name):
    jittor = [n for n in outline(ROOT / "jittor_impl" / name)]
    torch = [n for n in outline(ROOT / "torch_impl" / name)]
    only_jittor = {n.replace(".execute(", ".forward(") for n in ONLY_JITTOR.get(name, ())}
    assert only_jittor <= set(jittor) and ONLY_TORCH.get(name, set()) <= set(torch)
    assert [n for n in jittor if n not in only_jittor] == [n for n in torch if n not in ONLY_TORCH.get(name, ())]


@pytest.mark.parametrize("name", ["dataset.py", "progress.py", "torch_pickle.py"])
def test_files_without_a_framework_are_the_same(name):
    assert (ROOT / "jittor_impl" / name).read_text() == (ROOT / "torch_impl" / name).read_text()


@pytest.mark.parametrize("name", MIRRORED)
def test_mirrored_lines_stand_at_the_same_place(name):
    """The diff is a translation table: few lines, and blank lines at the same places."""
    counts = [len((ROOT / f"{impl}_impl" / name).read_text().splitlines()) for impl in ("jittor", "torch")]
    assert abs(counts[0] - counts[1]) <= 12, counts


def test_help_lists_the_same_options(pythons):
    def options(name):
        text = run(pythons, name, "--help").replace("_torch", "").replace("PyTorch", "Jittor")
        entries = re.split(r"\n  (?=-)", text[text.index("\n  -"):])
        return {entry.split()[0]: " ".join(entry.split()) for entry in entries if entry.strip()}

    jittor, torch = options("jittor"), options("torch")
    assert torch.pop("--na2d")  # NATTEN is a PyTorch extension
    assert jittor == torch


def test_same_seed_same_bits(pythons, dataset, tmp_path):
    arrays = {}
    for name, python in pythons.items():
        out = tmp_path / f"{name}.npz"
        subprocess.run([python, ROOT / "tests" / "dump_run.py", ROOT / f"{name}_impl", dataset, "5", out], check=True)
        arrays[name] = dict(np.load(out))
    assert arrays["jittor"].keys() == arrays["torch"].keys() and len(arrays["torch"]) > 800
    for key, value in arrays["torch"].items():
        assert np.array_equal(arrays["jittor"][key], value) and arrays["jittor"][key].dtype == value.dtype, key


def test_runs_lie_on_each_other_and_read_each_others_checkpoints(pythons, dataset, tmp_path):
    common = [*SIZES, "--data-dir", dataset, "--output", tmp_path]
    history, suffix = {}, {"jittor": "", "torch": "_torch"}
    for name in pythons:
        run(pythons, name, *common, "--epochs", 2)
        with open(tmp_path / f"log{suffix[name]}.csv") as f:
            history[name] = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(f)]
    # Six steps: the frameworks round differently, AdamW divides by the root of tiny squares, no more.
    for jittor, torch in zip(history["jittor"], history["torch"]):
        for key in ("train_loss", "train_loss_aux", "val_loss"):
            assert jittor[key] == pytest.approx(torch[key], rel=2e-3), key

    for name, other in (("jittor", "torch"), ("torch", "jittor")):
        checkpoint = tmp_path / f"last{suffix[other]}.safetensors"
        out = run(pythons, name, *common, "--evaluate", checkpoint)
        loss = float(re.search(r"val loss ([\d.]+)", out).group(1))
        assert loss == pytest.approx(history[other][-1]["val_loss"], abs=2e-4)
        out = run(pythons, name, *common, "--output", tmp_path / "resumed", "--epochs", 3, "--resume", checkpoint)
        assert "resumed from" in out and "epoch 3/3" in out


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_official_checkpoints_load_into_both(pythons, dataset, tmp_path, key):
    """A .pth as the official release is: 1000 classes, under a key or not, beside objects that are no tensors."""
    import models
    import torch
    from reference_weights import formula
    model = models.overlock_xxt(num_classes=1000)
    model.load_state_dict({k: torch.from_numpy(formula(k, tuple(v.shape))) for k, v in model.state_dict().items()})
    state = model.state_dict()
    content = state if key is None else {key: state, "epoch": 3, "args": argparse.Namespace(lr=1.0)}
    torch.save(content, tmp_path / "overlock.pth")
    common = ["--num-classes", "3", "--train-per-class", "2", "--val-per-class", "6", "--epochs", "1",
              "--data-dir", dataset, "--output", tmp_path, "--lr", "1e-12", "--init", tmp_path / "overlock.pth"]
    losses = []
    for name in pythons if key else ["torch"]:
        out = run(pythons, name, *common)
        assert "left at their initial values: head.4.weight" in out
        losses.append(re.search(r"train loss ([\d.]+)", out).group(1))
    assert losses[0] == losses[-1]
