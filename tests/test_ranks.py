"""Many processes, one run: 2 and 3 of them give the numbers of one, whatever ends or resumes them.

Processes are started by torchrun or mpirun, on the CPU.
"""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from under_test import NAME, cpu_only, module, save_weights
from tools.align.worker import launcher

train, distributed = module("train"), module("distributed")
run_files, checkpoint = module("run_files"), module("checkpoint")

ROOT = Path(__file__).resolve().parent.parent
WALL_CLOCK = ("epoch_time", "images_per_second")
# 17, 17 and 2 training images, 17 and 1 for validation: no step divides, and some have too few.
SIZES = ["-b", "17", "--num-classes", "3", "--train-per-class", "12", "--val-per-class", "6"]
# Steps of 8, 8 and 2 images, in two parts: of the last, one image each, a process has none.
RECIPE = ["--recipe", "paper", "--img-size", "64", "--crop-pct", "1", "--workers", "0"]
RECIPE += ["--warmup-epochs", "0", "--cooldown-epochs", "0", "--lr", "1e-3", "--ema-decay", "0.5"]
RECIPE += ["--clip-grad", "0.5", "-b", "4", "--grad-accumulation", "2"]
RECIPE += ["--train-per-class", "6", "--val-per-class", "2"]
PERTURBED_RUNS, LIMIT = 3, 3  # as in align.py

has_mpi = NAME == "torch" or shutil.which("mpirun") and shutil.which("mpicc")
needs_launcher = pytest.mark.skipif(
    not has_mpi, reason="no OpenMPI (Debian: apt install openmpi-bin libopenmpi-dev)"
)
pytestmark = cpu_only("one GPU runs one process")


def command(count, *options, program=ROOT / f"{NAME}_impl" / "train.py"):
    options = map(str, options)
    return [*launcher(NAME, sys.executable, count), str(program), *SIZES, *options]


def run(count, *options):
    result = subprocess.run(command(count, *options), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def history(output):
    """The rows of a log.csv without the times in them, as numbers."""
    with open(next(output.glob("log*.csv"))) as f:
        return [
            {key: float(value) for key, value in row.items() if key not in WALL_CLOCK}
            for row in csv.DictReader(f)
        ]


def state(output):
    """{key: array} of the weights, their averages and the moments in last.safetensors."""
    last = next(output.glob("last*.safetensors"))
    arrays, moments, run, _ = checkpoint.read_checkpoint(last)
    if run["args"]["ema_decay"]:
        averages = checkpoint.read_checkpoint(last, use_ema=True).arrays
        moments |= {f"ema.{key}": value for key, value in averages.items()}
    return {**arrays, **moments}


def run_here(impl, dataset, output, *options):
    """A run of one process: this one."""
    options = ["--data-dir", dataset, "--output", output, "--no-progress", *options]
    args = impl.train_args(*SIZES, *map(str, options))
    train.run_training(args, run_files.RunFiles(args.output, impl.suffix))


def runs_alone(impl, dataset, root, *options):
    """The folders of a run of one process, and of some that start one unit in the last place away.

    Two epochs each.
    """
    options = ["--epochs", 2, *options]
    outputs = [root / "unperturbed"]
    run_here(impl, dataset, outputs[0], *options)
    weights = checkpoint.model_arrays(train.make_model(impl.train_args(*SIZES)))
    for i in range(PERTURBED_RUNS):
        generator, start = np.random.default_rng(i), root / f"{i}.safetensors"
        moved = {}
        for key, value in weights.items():
            moved[key] = value
            if value.dtype == np.float32 and "running" not in key:
                towards = np.where(generator.random(value.shape) < 0.5, -np.inf, np.inf)
                moved[key] = np.nextafter(value, towards.astype(np.float32))
        save_weights(start, moved, "model.")
        outputs.append(root / str(i))
        run_here(impl, dataset, outputs[-1], *options, "--init", start)
    return outputs


@pytest.fixture(scope="module")
def alone(impl, dataset, tmp_path_factory):
    """Two epochs of one process, and of some that start one unit in the last place away."""
    return runs_alone(impl, dataset, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def two(dataset, tmp_path_factory):
    """Two epochs of two processes."""
    output = tmp_path_factory.mktemp("two")
    options = ["--data-dir", dataset, "--epochs", 2, "--output", output]
    return output, run(2, *options)


@pytest.fixture(scope="module")
def three(impl, dataset, tmp_path_factory):
    """An epoch of three processes, and another of one."""
    output = tmp_path_factory.mktemp("three")
    run(3, "--data-dir", dataset, "--epochs", 1, "--output", output)
    last = output / f"last{impl.suffix}.safetensors"
    shutil.copy(last, output / f"first{impl.suffix}")
    run_here(impl, dataset, output, "--epochs", 2, "--resume", last)
    return output


def gaps(output, reference):
    """{what: mean relative distance} of two runs: losses, statistics of BatchNorm and weights."""
    rows = zip(history(output), history(reference))
    losses = [abs(ours[k] / theirs[k] - 1) for ours, theirs in rows for k in ours if "loss" in k]
    ours, theirs = state(output), state(reference)
    assert ours.keys() == theirs.keys()
    found = {"losses": np.mean(losses)}
    kinds = {"statistics": "running_", "weights": "weight"}
    for kind, word in kinds.items():
        keys = [key for key in ours if word in key and not key.startswith("exp_avg")]
        distances = [np.abs(ours[key] - theirs[key]).mean() for key in keys]
        sizes = [np.abs(theirs[key]).mean() for key in keys]
        found[kind] = np.sum(distances) / np.sum(sizes)
    return found


def assert_apart_by_rounding(output, alone):
    """`alone`: what runs_alone returned."""
    by_chance = [gaps(perturbed, alone[0]) for perturbed in alone[1:]]
    for what, gap in gaps(output, alone[0]).items():
        limit = LIMIT * max(found[what] for found in by_chance)
        assert gap <= limit, (what, gap, limit)


@needs_launcher
@pytest.mark.parametrize("several", ["two", "three"])
def test_the_numbers_are_those_of_one_process(alone, several, request):
    output = request.getfixturevalue(several)
    output = output[0] if several == "two" else output
    assert [row["epoch"] for row in history(output)] == [1, 2]
    assert_apart_by_rounding(output, alone)


@needs_launcher
def test_those_of_the_papers_recipe(impl, dataset, tmp_path):
    """Averaged weights, a cosine, clipping, drop path, mixed images, accumulated gradients."""
    alone = runs_alone(impl, dataset, tmp_path, *RECIPE)
    output = tmp_path / "two"
    run(2, "--data-dir", dataset, "--epochs", 2, "--output", output, *RECIPE)
    assert "val_loss_ema" in history(output)[0]
    assert_apart_by_rounding(output, alone)


@needs_launcher
def test_rank_0_alone_speaks_and_writes(impl, two):
    output, text = two
    assert text.count("epoch 1/2: train loss") == text.count("parameters;") == 1
    names = {path.name for path in output.iterdir()}
    suffix = impl.suffix
    kept = {f"last{suffix}.safetensors", f"best{suffix}.safetensors"}
    assert names == kept | {f"log{suffix}.csv", f"log{suffix}.txt"}


@needs_launcher
def test_evaluation_counts_every_image_once(impl, dataset, two):
    """What the processes measured of their weights is what one measures of them."""
    output, _ = two
    args = impl.train_args(*SIZES, "--data-dir", str(dataset), "--no-progress")
    train.settle_recipe(args)
    _, val = train.load_data(args, train_per_class=0)
    model = train.make_model(args)
    last = output / f"last{impl.suffix}.safetensors"
    checkpoint.load_model(model, checkpoint.read_checkpoint(last).arrays, last)
    measured, logged = train.evaluate(model, val, args), history(output)[-1]
    assert measured["acc_top1"] == logged["acc_top1"] and measured["acc_top5"] == 1
    assert measured["val_loss"] == pytest.approx(logged["val_loss"], rel=1e-6)


def processes_of(launched):
    """{rank: process id} of the processes that a launcher started."""
    variable = b"\0RANK=" if NAME == "torch" else b"\0OMPI_COMM_WORLD_RANK="
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            environment = b"\0" + (entry / "environ").read_bytes()
        except OSError:
            continue
        started = parent == launched and any(word.endswith(b"train.py") for word in words)
        if started and variable in environment:
            rank = environment.split(variable)[1].split(b"\0")[0]
            found[int(rank)] = int(entry.name)
    return found


def has_ended(process):
    """Whether there is no such process, or one that its parent has not noticed the end of."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def said(errors):
    """The lines of train.py on the error stream; a launcher adds its own."""
    return [line for line in errors.splitlines() if line.startswith("train.py: ")]


def stop_after_an_epoch(end, *options):
    """Start two processes, call end(launcher's id, {rank: id}) in a later epoch, and wait.

    Returns the status, what was written to the error stream, and the ranks' ids.
    """
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command(2, *options), **pipes)
    for line in process.stdout:
        if re.match(r"epoch (?!1/)\d+/40: 17/36", line):
            break
    ranks = processes_of(process.pid)
    assert set(ranks) == {0, 1}
    end(process.pid, ranks)
    start = time.monotonic()
    _, errors = process.communicate(timeout=30)
    while not all(map(has_ended, ranks.values())):
        assert time.monotonic() - start < 30
        time.sleep(0.1)
    return process.returncode, errors


@needs_launcher
def test_a_signal_and_a_killed_process_end_all_and_resuming_changes_no_bit(dataset, tmp_path):
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    options = ["--data-dir", dataset, "--output", stopped]
    status, errors = stop_after_an_epoch(
        lambda launched, _: os.kill(launched, signal.SIGTERM), *options, "--epochs", 40
    )
    assert status != 0
    lines = said(errors)
    # mpirun kills a second after SIGTERM, which may be too soon for the line on a busy machine.
    assert NAME == "jittor" and not lines or len(lines) == 1 and "resume with: " in lines[0], errors
    status, errors = stop_after_an_epoch(
        lambda _, ranks: os.kill(ranks[1], signal.SIGKILL), *options, "--epochs", 40, "--resume"
    )
    assert status != 0 and re.search(r"rank\W+1\b", errors), errors
    assert "resume with: " in errors or NAME == "jittor", errors
    epochs = ["--epochs", len(history(stopped)) + 1]
    run(2, *options, *epochs, "--resume")
    run(2, "--data-dir", dataset, "--output", whole, *epochs)
    assert history(stopped) == history(whole)
    ours, theirs = state(stopped), state(whole)
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)


@needs_launcher
def test_what_all_processes_meet_is_one_line(tmp_path):
    result = subprocess.run(
        command(2, "--data-dir", tmp_path / "none"), capture_output=True, text=True
    )
    lines = said(result.stderr)
    assert result.returncode != 0 and len(lines) == 1, result.stderr
    assert "no data set at" in lines[0]


@needs_launcher
def test_memory_that_runs_out_on_one_is_one_line(dataset, tmp_path):
    """Rank 0, which waits for it, does not add that it was interrupted."""
    program = tmp_path / "out_of_memory.py"
    program.write_text(f"""
import sys
sys.path.insert(0, "{ROOT}")
from {NAME}_impl import distributed, train

def fail(*_):
    raise MemoryError

distributed.GRACE = 1
if distributed.RANK > 0:
    train.training_step = fail
train.main()
""")
    options = ["--data-dir", dataset, "--output", tmp_path / "logs"]
    words = command(2, *options, program=program)
    result = subprocess.run(words, capture_output=True, text=True)
    lines = said(result.stderr)
    assert result.returncode != 0 and len(lines) == 1, result.stderr
    assert "out of memory; lower --batch-size (17) (rank 1 of 2 processes)" in lines[0]


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("number", [1, 3])
def test_the_processes_have_each_image_once(dataset, world, number, monkeypatch):
    """Mixed, augmented or not, the parts of all processes are the batches of one."""
    load, Mixup = module("dataset").load, module("augment").Mixup
    train_set, _ = load(dataset, 3, 12, 6, progress=False)
    train_set.mixup = Mixup(num_classes=3)
    with closing(train_set.batches(17, 0, 1)) as batches:
        whole = list(batches)
    monkeypatch.setattr(distributed, "WORLD_SIZE", world)
    counted = [np.zeros(len(images)) for images, _ in whole]
    for rank in range(world):
        monkeypatch.setattr(distributed, "RANK", rank)
        train_set.share = partial(distributed.places_in_batch, number=number)
        for i, (images, targets) in enumerate(train_set.batches(17, 0, 1)):
            count = len(whole[i][0])
            places = distributed.places_in_batch(count, number)
            np.testing.assert_array_equal(images, whole[i][0][places])
            np.testing.assert_array_equal(targets, whole[i][1][places])
            for part in distributed.parts_of(count, number):
                if part.share:
                    counted[i][places[part.rows]] += 1
                    assert part.share == len(part.places) / count
    assert all((count == 1).all() for count in counted)
