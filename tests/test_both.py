"""What needs both environments.

The mirrored files, the same bits from the same seed, each other's checkpoints, align.py, bench.py.
"""

import argparse
import ast
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent
# What Jittor alone needs lies in aligned/; the kernels are each framework's own.
MIRRORED = sorted(path.name for path in (ROOT / "torch_impl").glob("*.py"))
WITHOUT_FRAMEWORK = [
    "augment.py",
    "class_names.py",
    "dataset.py",
    "errors.py",
    "figures.py",
    "images.py",
    "loader.py",
    "progress.py",
    "rand_augment.py",
    "read_pth.py",
    "recipe.py",
    "resume.py",
    "run_files.py",
    "weights.py",
]
SIZES = ["-b", "16", "--num-classes", "3", "--train-per-class", "12", "--val-per-class", "6"]


@pytest.fixture(scope="module")
def pythons():
    if "JITTOR_PYTHON" not in os.environ:
        pytest.skip("JITTOR_PYTHON is not set; `make test` sets it")
    return {"jittor": os.environ["JITTOR_PYTHON"], "torch": sys.executable}


def python_options(pythons):
    return ["--jittor-python", pythons["jittor"], "--torch-python", pythons["torch"]]


def run(pythons, name, *options, program="train.py"):
    command = [pythons[name], str(ROOT / f"{name}_impl" / program), *map(str, options)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def twins(name):
    """The file of this name in jittor_impl and in torch_impl."""
    return [ROOT / f"{impl}_impl" / name for impl in ("jittor", "torch")]


def outline(path):
    """Classes and functions of a file in order, with signatures; execute counts as forward."""
    names = []

    def visit(body, prefix):
        for node in body:
            if isinstance(node, ast.ClassDef):
                names.append(prefix + node.name)
                visit(node.body, f"{prefix}{node.name}.")
            if isinstance(node, ast.FunctionDef):
                is_forward = node.name == "execute" and "Function" not in prefix
                name = "forward" if is_forward else node.name
                names.append(f"{prefix}{name}({ast.unparse(node.args)})")

    visit(ast.parse(path.read_text()).body, "")
    return names


def constants(path):
    """{name: value} of the literals at the top of a file, without those that name the framework."""
    values = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = ast.unparse(node.value)
    return {name: value for name, value in values.items() if name not in ("FRAMEWORK", "SUFFIX")}


def test_the_same_files():
    names = []
    for name in ("jittor", "torch"):
        folder = ROOT / f"{name}_impl"
        names.append({path.name for path in folder.iterdir()} - {"__pycache__"})
    assert names[0] - {"aligned"} == names[1] - {"plugins"}


@pytest.mark.parametrize("name", MIRRORED)
def test_mirror(name):
    jittor, torch = twins(name)
    assert outline(jittor) == outline(torch)
    assert constants(jittor) == constants(torch)


@pytest.mark.parametrize("name", WITHOUT_FRAMEWORK)
def test_files_without_a_framework_are_the_same(name):
    jittor, torch = (path.read_text() for path in twins(name))
    assert jittor == torch


@pytest.mark.parametrize("name", MIRRORED)
def test_the_diff_is_a_translation_table(name):
    """Mirrored files differ in few lines.

    In models.py every line, blank or not, is at the same place.
    """
    jittor, torch = (path.read_text().splitlines() for path in twins(name))
    blocks = difflib.SequenceMatcher(None, jittor, torch, autojunk=False).get_matching_blocks()
    same = sum(block.size for block in blocks)
    if name != "__init__.py":  # one line
        assert same >= 0.8 * max(len(jittor), len(torch)), (same, len(jittor), len(torch))
    if name == "models.py":
        assert len(jittor) == len(torch)
        assert [not line for line in jittor] == [not line for line in torch]


@pytest.mark.parametrize("program", ["train.py", "predict.py", "visualize.py cam"])
def test_help_lists_the_same_options(pythons, program):
    program, *mode = program.split()

    def options(name):
        text = run(pythons, name, *mode, "--help", program=program)
        text = text.replace("_torch", "").replace("PyTorch", "Jittor")
        entries = re.split(r"\n  (?=-)", text[text.index("\n  -") :])
        return {entry.split()[0]: " ".join(entry.split()) for entry in entries if entry.strip()}

    jittor, torch = options("jittor"), options("torch")
    assert torch.pop("--na2d")  # NATTEN and Triton are PyTorch extensions
    assert jittor == torch


def test_same_seed_same_bits(pythons, dataset, tmp_path):
    arrays = {}
    for name, python in pythons.items():
        out = tmp_path / f"{name}.npz"
        command = [python, ROOT / "tests" / "dump_run.py", name, dataset, "5", out]
        subprocess.run(command, check=True)
        arrays[name] = dict(np.load(out))
    assert arrays["jittor"].keys() == arrays["torch"].keys() and len(arrays["torch"]) > 800
    for key, value in arrays["torch"].items():
        other = arrays["jittor"][key]
        assert np.array_equal(other, value) and other.dtype == value.dtype, key


def test_runs_lie_on_each_other_and_read_each_others_checkpoints(pythons, dataset, tmp_path):
    import torch
    from torch_impl import models

    common = [*SIZES, "--data-dir", dataset, "--output", tmp_path]
    history, suffix = {}, {"jittor": "", "torch": "_torch"}
    for name in pythons:
        run(pythons, name, *common, "--epochs", 2)
        history[name] = pd.read_csv(tmp_path / f"log{suffix[name]}.csv")
    # Six steps: what differs is rounding alone, which AdamW divides by the root of tiny squares.
    for key in ("train_loss", "train_loss_aux", "val_loss"):
        ours, theirs = (history[name][key].to_numpy() for name in ("jittor", "torch"))
        assert ours == pytest.approx(theirs, rel=2e-3), key

    for name, other in (("jittor", "torch"), ("torch", "jittor")):
        checkpoint = tmp_path / f"last{suffix[other]}.safetensors"
        out = run(pythons, name, *common, "--evaluate", checkpoint)
        loss = float(re.search(r"val loss ([\d.]+)", out).group(1))
        assert loss == pytest.approx(history[other]["val_loss"].iloc[-1], abs=2e-4)
        resume = ["--output", tmp_path / "resumed", "--epochs", 3, "--resume", checkpoint]
        out = run(pythons, name, *common, *resume)
        assert "resumed from" in out and "epoch 3/3" in out

    visual, shown = tmp_path / "visual", ["--checkpoint", tmp_path / "last.safetensors"]
    for mode in ("cam", "erf", "kernels"):
        for name in pythons:
            options = [mode, *shown, "--samples", 8, "--output", visual]
            run(pythons, name, *options, program="visualize.py")
    command = [sys.executable, ROOT / "plot.py", "--visual", visual]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Of the range of a map's values, as README and docs/results.md say.
    differences = [float(text) for text in re.findall(r"largest difference (\S+) of", out)]
    assert len(differences) == 3 and max(differences) <= 1e-4, out
    assert (visual / "cam_both.png").stat().st_size > 10000

    checkpoint, pictures = tmp_path / "last.safetensors", dataset / "val" / "images"
    predicted, exported = {}, {}
    for name in pythons:
        options = [pictures, "--checkpoint", checkpoint, "--json"]
        entries = json.loads(run(pythons, name, *options, program="predict.py"))
        predicted[name] = {
            (entry["image"], one["class"]): one["probability"]
            for entry in entries
            for one in entry["classes"]
        }
        path = tmp_path / f"{name}.pth"
        run(pythons, name, "--init", checkpoint, "--export", path)
        exported[name] = torch.load(path, weights_only=True)
    assert len(predicted["torch"]) == 18 * 3
    # They are printed with four digits, of which rounding may move the last.
    assert predicted["jittor"] == pytest.approx(predicted["torch"], abs=1.01e-4)
    for state in exported.values():
        models.overlock_xxt(num_classes=3).load_state_dict(state, strict=True)
        assert all(torch.equal(state[key], value) for key, value in exported["torch"].items())


# (key of the weights in the file, their type)
OFFICIAL_LAYOUTS = [(None, "float32"), ("state_dict", "float32"), ("model", "float16")]


@pytest.mark.parametrize("key, dtype", OFFICIAL_LAYOUTS)
def test_official_checkpoints_load_into_both(pythons, dataset, tmp_path, key, dtype):
    """A .pth as the official release is: of 1000 classes, under a key or not.

    Beside the key stand objects that are no tensors.
    """
    import torch
    from reference_weights import formula
    from torch_impl import models

    model = models.overlock_xxt(num_classes=1000)
    state = {}
    for name, value in model.state_dict().items():
        tensor = torch.from_numpy(formula(name, tuple(value.shape)))
        state[name] = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
    content = state if key is None else {key: state, "epoch": 3, "args": argparse.Namespace(lr=1.0)}
    torch.save(content, tmp_path / "overlock.pth")
    options = ["--num-classes", 3, "--train-per-class", 2, "--val-per-class", 6, "--epochs", 1]
    options += ["--data-dir", dataset, "--output", tmp_path]
    options += ["--init", tmp_path / "overlock.pth", "--lr", "1e-12"]
    losses = []
    for name in pythons:
        out = run(pythons, name, *options)
        assert "left at their initial values: head.4.weight" in out
        losses.append(float(re.search(r"train loss ([\d.]+)", out).group(1)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_hostile_pth_is_refused(tmp_path):
    """A tensor that reaches beyond its storage, and a class that would run code."""
    import torch
    from torch_impl import read_pth

    with pytest.raises(ValueError):
        read_pth.rebuild_tensor(np.zeros(4, np.float32), 2, (3,), (1,))
    with pytest.raises(ValueError):
        read_pth.rebuild_tensor(np.zeros(4, np.float32), 0, (2, 2), (-1, 1))

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    weight = torch.arange(6.0).reshape(2, 3).T
    torch.save({"weight": weight, "extra": Hostile()}, tmp_path / "hostile.pth")
    content = read_pth.read(tmp_path / "hostile.pth")
    assert np.array_equal(content["weight"], np.arange(6, dtype=np.float32).reshape(2, 3).T)
    assert not (tmp_path / "executed").exists()


def test_model_table_of_the_readmes():
    """tools/model_table.py prints the table that stands in both READMEs."""
    command = [sys.executable, ROOT / "tools" / "model_table.py"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in ("README.md", "README_zh.md"):
        for row in table.splitlines()[2:]:
            assert row in (ROOT / name).read_text(), (name, row)


def test_tables_of_times_are_those_of_the_log():
    """tools/bench_table.py prints docs/performance.md's tables from logs/reference.

    Six rows of the first one are in the READMEs.
    """
    command = [sys.executable, ROOT / "tools" / "bench_table.py"]
    printed = subprocess.run(command, capture_output=True, check=True, encoding="utf-8").stdout
    tables = printed.split("\n\n")
    for table in tables:
        assert table.strip() in (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    rows = tables[0].splitlines()
    larger = [row for row in rows if "batch 64 |" in row or "batch 8 |" in row]
    larger = [row for row in larger if "data loading" not in row]
    for readme in ("README.md", "README_zh.md"):
        text = (ROOT / readme).read_text(encoding="utf-8")
        for row in larger:
            cells = [cell.strip() for cell in row.split("|")[1:-1]]
            task, jittor, torch, current, ratio, turns, _, memory = cells
            shown = f"| {task} | {jittor} | {torch} | {current} | {ratio} ({turns}) | {memory} |"
            assert shown in text, (readme, task)
    assert len(larger) == 6


def test_bench_measures_both_frameworks(pythons, tmp_path):
    options = ["--only", "batch norm, 64x96x4x4", "--rounds", "1", "--output", tmp_path]
    command = [sys.executable, ROOT / "bench.py", *options, *python_options(pythons)]
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    table = pd.read_csv(tmp_path / "bench.csv")
    assert len(table) == 2
    assert (table[["jittor_ms", "torch_ms"]] > 0).all(axis=None) and table.floor_ms[0] > 0
    assert table.task[1] == "first training step of a new process"
    assert (tmp_path / "bench.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "products, kept, noisy",
    [
        ([10, 10, 10.9, 10], [0, 1, 2], 0),
        ([10, 12, 10, 10], [2], 2),
        ([10, 12, 10, 12], [0, 1, 2], 3),
    ],
)
def test_bench_leaves_out_turns_of_a_machine_that_is_not_quiet(monkeypatch, products, kept, noisy):
    import bench

    products, turns = iter(products), iter(range(3))
    monkeypatch.setattr(bench, "product_time", lambda device: next(products))
    monkeypatch.setattr(bench, "take_turn", lambda *_: next(turns))
    args = bench.make_parser().parse_args(["--rounds", "3"])
    assert bench.quiet_turns(None, {}, args) == (kept, noisy)


@pytest.mark.parametrize("variant, side", [("overlock_xxt", 64), ("overlock_xt", 224)])
def test_bench_times_the_windows_of_the_models(variant, side, monkeypatch):
    import torch
    import bench
    from torch_impl import contmix, models

    used, na2d_av = set(), contmix.na2d_av

    def record(attn, value, kernel_size):
        used.add((tuple(value.shape[1:]), kernel_size))
        return na2d_av(attn, value, kernel_size)

    monkeypatch.setattr(contmix, "na2d_av", record)
    with torch.no_grad():
        models.OverLoCK(**models.VARIANTS[variant]).eval()(torch.zeros(1, 3, side, side))
    batch = next(batches[0] for name, _, batches in bench.MODELS["cpu"] if name == variant)
    timed = {(shape[1:], kernel) for shape, kernel in bench.WINDOWS if shape[0] == batch}
    assert timed == {(shape, kernel) for shape, kernel in used if kernel > 5}


def align(pythons, dataset, output, *options):
    command = [sys.executable, ROOT / "align.py", *python_options(pythons)]
    command += ["--num-classes", "3", "--train-per-class", "12", "-b", "12"]
    command += ["--data-dir", dataset, "--output", output, *options]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


def test_align_finds_the_frameworks_alike(pythons, dataset, tmp_path):
    several = {"steps, 2 Jittor", "steps, 2 PyTorch"} if shutil.which("mpirun") else set()
    processes = ["--processes", "2"] if several else []
    result = align(pythons, dataset, tmp_path, "--steps", "12", *processes)
    assert result.returncode == 0, result.stdout + result.stderr
    table = pd.read_csv(tmp_path / "alignment.csv")
    checks = {"weights", "batches", "forward", "loss", "gradients", "step", "adamw", "steps"}
    assert set(table.check) == checks | several and table.ok.all()
    # Every block of the three sub-networks and both heads, in every mode.
    names = set(table.name[table.check == "forward"])
    blocks = [f"blocks{i}.{j}" for i, depth in enumerate((1, 1, 2, 1), 1) for j in range(depth)]
    blocks += ["sub_blocks3.0", "sub_blocks3.2", "sub_blocks3.0[1]", "sub_blocks4.0", "head"]
    modes = ("training", "evaluation", "inference")
    assert {f"{mode} {block}" for mode in modes for block in blocks} <= names
    assert "evaluation blocks1.0.proj.1.dil_bn_k3_5" in names  # only inference merges branches
    assert "training aux_head" in names
    assert (tmp_path / "alignment.png").stat().st_size > 10000


def test_align_finds_the_papers_recipe_alike(pythons, dataset, tmp_path):
    """Mixed and erased batches, soft targets, drop path, clipping, averaged weights."""
    result = align(pythons, dataset, tmp_path, "--recipe", "paper", "--steps", "10")
    assert result.returncode == 0, result.stdout + result.stderr
    table = pd.read_csv(tmp_path / "alignment.csv")
    assert table.ok.all() and (table.check == "batches").sum() == 8
    averaged = table[table.name.str.startswith("averaged ")]
    assert len(averaged) > 500 and averaged.name.str.endswith("running_var").any()


def test_align_names_a_broken_module(pythons, dataset, tmp_path):
    """A residual lost on purpose deep in the network is found there, not where it shows later."""
    options = ["--steps", "2", "--plant-fault", "sub_blocks3.1.dwconv2"]
    result = align(pythons, dataset, tmp_path, *options)
    verdict = "They first depart at forward: evaluation sub_blocks3.1.dwconv2\n"
    assert result.returncode == 1 and verdict in result.stdout, result.stdout


def test_a_device_that_is_not_there_is_one_line(pythons, dataset, tmp_path):
    """The tests hide the GPU of a machine that has one."""
    result = align(pythons, dataset, tmp_path, "--device", "cuda")
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("align.py: error: jittor failed: Jittor sees no CUDA GPU")
    command = [sys.executable, ROOT / "bench.py", "--device", "cuda", *python_options(pythons)]
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("bench.py: error: PyTorch sees no CUDA GPU")
    environment = {**os.environ, "OVERLOCK_TESTS": "torch", "OVERLOCK_DEVICE": "cuda"}
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_ops.py"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 2 and "here that is OVERLOCK_DEVICE=cpu" in result.stdout


def test_align_measures_steps_by_the_largest_of_several_perturbed_runs():
    from align import compare_steps

    torch, step = np.full(40, 2.0), np.arange(40)
    perturbed = 2 + 2e-6 * np.array([[1.0], [4.0], [2.0]]) * np.ones(40)
    within, beyond = 2 + 2 * 11e-6 * np.ones(40), 2 + 2e-6 * np.where(step < 25, 11, 30)
    rows = list(compare_steps(within, torch, perturbed))
    assert len(rows) == 31 and all(row["ok"] for row in rows) and rows[0]["name"] == "step 10"
    assert rows[0]["limit"] == pytest.approx(12e-6)
    assert rows[0]["mean_error"] == pytest.approx(11e-6)
    # The mean over ten steps passes 12e-6 with the first step of the larger gap.
    failed = [row["name"] for row in compare_steps(beyond, torch, perturbed) if not row["ok"]]
    assert failed[0] == "step 26"


def test_align_with_a_wrong_name_or_size(pythons, dataset, tmp_path):
    (tmp_path / "file").touch()
    for options, message in (
        (("--plant-fault", "nothing"), "nothing is not a ResDWConv"),
        (("-b", "64"), "larger than the training set"),
        (("--jittor-python", "/nowhere"), "no Python at /nowhere"),
        (("--output", tmp_path / "file"), "give another --output"),
    ):
        result = align(pythons, dataset, tmp_path, *options)
        assert result.returncode == 2 and message in result.stderr, result.stderr
        assert "Traceback" not in result.stderr, result.stderr
