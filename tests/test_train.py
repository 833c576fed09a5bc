"""train.py as its user runs it: files, resuming after kill -9, bad input, interruption."""

import csv
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file
from under_test import module

train, run_files = module("train"), module("run_files")
read_checkpoint = module("checkpoint").read_checkpoint

ROOT = Path(__file__).resolve().parent.parent
WALL_CLOCK = ("epoch_time", "images_per_second")
SIZES = ["-b", "16", "--num-classes", "3", "--train-per-class", "12", "--val-per-class", "6"]


@pytest.fixture(scope="module")
def command(impl):
    return [sys.executable, str(ROOT / f"{impl.name}_impl" / "train.py")]


def run(command, *options, cwd=None):
    return subprocess.run([*command, *map(str, options)], capture_output=True, text=True, cwd=cwd)


def rows(path):
    with open(path) as f:
        return [
            {key: value for key, value in row.items() if key not in WALL_CLOCK}
            for row in csv.DictReader(f)
        ]


@pytest.fixture(scope="module")
def finished(impl, command, dataset, tmp_path_factory):
    """A run of three epochs, from another working directory."""
    output = tmp_path_factory.mktemp("finished")
    result = run(
        command, *SIZES, "--data-dir", dataset, "--epochs", 3, "--output", output, cwd=output
    )
    assert result.returncode == 0, result.stderr
    return output, result


def one_line(result, *words):
    """Exit status 2 and one line on stderr that holds `words`."""
    # A slow machine takes so long to load the operators that Jittor reports its progress.
    progress = ("jittor_impl:", "Compiling Operators")
    lines = [
        line
        for line in result.stderr.splitlines()
        if line.strip() and not line.startswith(progress)
    ]
    assert result.returncode == 2 and len(lines) == 1, result.stderr
    assert lines[0].startswith("train.py: error: ")
    for word in words:
        assert str(word) in lines[0], lines[0]


def test_files_of_a_run(impl, finished):
    output, result = finished
    with open(output / f"log{impl.suffix}.csv") as f:
        table = list(csv.DictReader(f))
    assert list(table[0])[:6] == [
        "train_loss",
        "train_loss_aux",
        "epoch_time",
        "val_loss",
        "acc_top1",
        "acc_top5",
    ]
    assert [row["epoch"] for row in table] == ["1", "2", "3"]
    for row in table:
        row = {key: float(value) for key, value in row.items()}
        ratio = train.make_parser().get_default("aux_loss_ratio")
        assert row["train_loss"] == pytest.approx(
            row["train_loss_main"] + ratio * row["train_loss_aux"]
        )
        assert 0 <= row["acc_top1"] <= row["acc_top5"] == 1
    text = (output / f"log{impl.suffix}.txt").read_text()
    for words in ("NumPy", "CPU", '"batch_size": 16', "parameters", "n01 n02 n03", "epoch 3/3"):
        assert words in text and words in result.stdout
    model, optimizer, run_info = read_checkpoint(output / f"last{impl.suffix}.safetensors")
    assert run_info["epoch"] == 3 and run_info["step"] == 9 and run_info["args"]["seed"] == 0
    assert len(run_info["history"]) == 3 and len(optimizer) > 100
    best = max(float(row["acc_top1"]) for row in table)
    assert run_info["best_top1"] == best
    assert (
        read_checkpoint(output / f"best{impl.suffix}.safetensors")[2]["history"][-1]["acc_top1"]
        == best
    )
    assert not list(output.glob("*.tmp"))


def test_same_seed_same_numbers(impl, command, dataset, finished, tmp_path):
    result = run(
        command, *SIZES, "--data-dir", dataset, "--epochs", 1, "--output", tmp_path, "--no-progress"
    )
    assert result.returncode == 0, result.stderr
    assert (
        rows(tmp_path / f"log{impl.suffix}.csv") == rows(finished[0] / f"log{impl.suffix}.csv")[:1]
    )


def test_kill_and_resume_gives_the_numbers_of_an_unbroken_run(
    impl, command, dataset, finished, tmp_path
):
    options = [*SIZES, "--data-dir", dataset, "--epochs", 3, "--output", tmp_path]
    process = subprocess.Popen([*command, *map(str, options)], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch 2/3") and "images," in line:  # in the middle of the second epoch
            process.kill()
            break
    process.wait()
    assert len(rows(tmp_path / f"log{impl.suffix}.csv")) == 1
    # The worst moment: the last checkpoint is new, CSV and text log are not yet, and a temporary
    # file is half written.
    for name in ("csv", "txt"):
        path = tmp_path / f"log{impl.suffix}.{name}"
        lines = path.read_text().splitlines(True)
        path.write_text(
            "".join(line for line in lines if not line.startswith(("epoch 1/", "1", "2", "3")))
        )
    (tmp_path / f"last{impl.suffix}.safetensors.tmp").write_bytes(b"half")

    result = run(command, *options, "--resume")
    assert result.returncode == 0, result.stderr
    expected = finished[0]
    assert rows(tmp_path / f"log{impl.suffix}.csv") == rows(expected / f"log{impl.suffix}.csv")
    resumed, unbroken = (
        read_checkpoint(folder / f"last{impl.suffix}.safetensors")
        for folder in (tmp_path, expected)
    )
    for actual, wanted in zip(resumed[:2], unbroken[:2]):
        assert actual.keys() == wanted.keys()
        assert all(np.array_equal(actual[key], wanted[key]) for key in wanted)
    text = (tmp_path / f"log{impl.suffix}.txt").read_text()
    assert "resumed from" in text and all(
        text.count(f"epoch {epoch}/3: train loss") == 1 for epoch in (1, 2, 3)
    )


def interrupt_after(command, options, line_start, group=False):
    """Start a run, press Ctrl-C after a line of output; group: as
    a terminal does, to the compilers too.
    """
    process = subprocess.Popen(
        [*command, *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if line.startswith(line_start):
            break
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT) if group else process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    lines = [line for line in stderr.splitlines() if line.startswith("train.py:")]
    assert process.returncode == 130 and len(lines) == 1 and "Traceback" not in stderr, stderr
    return lines[0]


def test_interrupt_says_how_to_resume(impl, command, dataset, finished, tmp_path):
    options = [*SIZES, "--data-dir", dataset, "--output", tmp_path, "--seed", 1]
    source = finished[0] / f"last{impl.suffix}.safetensors"
    line = interrupt_after(
        command, [*options, "--epochs", 500, "--init", source], "epoch 1/500: train loss"
    )
    words = shlex.split(line.partition("resume with: ")[2])
    assert "--init" not in words
    # Not the rows of log.csv: Ctrl-C may come between the checkpoint, which counts, and the log,
    # which is made again from it.
    done = read_checkpoint(tmp_path / f"last{impl.suffix}.safetensors")[2]["epoch"]
    words[words.index("--epochs") + 1] = str(done + 1)
    result = subprocess.run(
        words, capture_output=True, text=True
    )  # the very command that was printed
    assert result.returncode == 0, result.stderr
    assert len(rows(tmp_path / f"log{impl.suffix}.csv")) == done + 1


def test_interrupt_between_checkpoint_and_log(impl, command, dataset, tmp_path):
    """The epoch is in the checkpoint, so it counts, and the resumed run logs it."""
    code = """
import os, signal, sys
sys.argv.pop(0)
folder = os.path.dirname(sys.argv[0])
sys.path.insert(0, os.path.dirname(folder))
train = __import__(os.path.basename(folder) + ".train").train
save_checkpoint = train.save_checkpoint
def save_and_interrupt(path, *others):
    save_checkpoint(path, *others)
    if path.name.startswith("last"):
        os.kill(os.getpid(), signal.SIGINT)
train.save_checkpoint = save_and_interrupt
train.main()
"""
    options = [*SIZES, "--data-dir", dataset, "--output", tmp_path, "--epochs", 2, "--no-progress"]
    result = run([command[0], "-c", code, command[1]], *options)
    assert result.returncode == 130 and "resume with: " in result.stderr, result.stderr
    assert not rows(tmp_path / f"log{impl.suffix}.csv")
    words = shlex.split(result.stderr.partition("resume with: ")[2])
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [row["epoch"] for row in rows(tmp_path / f"log{impl.suffix}.csv")] == ["1", "2"]


def test_interrupt_before_the_first_epoch_ends(impl, command, dataset, tmp_path):
    # A larger model in small steps: an epoch of XXT ends within the half second that
    # interrupt_after waits.
    options = [
        *SIZES,
        "-b",
        2,
        "--model",
        "overlock_xt",
        "--data-dir",
        dataset,
        "--epochs",
        500,
        "--output",
        tmp_path,
    ]
    assert "no epoch was finished" in interrupt_after(command, options, "overlock_xt", group=True)


def test_an_earlier_run_is_set_aside(impl, command, dataset, tmp_path):
    (tmp_path / f"log{impl.suffix}.csv").write_text("a finished run")
    result = run(command, *SIZES, "--data-dir", dataset, "--epochs", 1, "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "previous-1" / f"log{impl.suffix}.csv").read_text() == "a finished run"
    assert len(rows(tmp_path / f"log{impl.suffix}.csv")) == 1


def test_the_runs_of_a_pair_are_set_aside_together(tmp_path):
    files, other = (run_files.RunFiles(tmp_path, suffix) for suffix in ("", "_torch"))
    for round, started in enumerate(((files, other), (other, files), (files,))):
        for run_files in started:
            run_files.csv.write_text(str(round))
            run_files.set_aside()
    assert {
        str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*csv")
    } == {
        f"previous-1/{files.csv.name}": "0",
        f"previous-1/{other.csv.name}": "0",
        f"previous-2/{files.csv.name}": "1",
        f"previous-2/{other.csv.name}": "1",
        f"previous-3/{files.csv.name}": "2",
    }


def test_evaluate_repeats_the_numbers_of_the_log(impl, command, dataset, finished):
    output, _ = finished
    result = run(
        command,
        *SIZES,
        "--data-dir",
        dataset,
        "--evaluate",
        output / f"last{impl.suffix}.safetensors",
    )
    last = rows(output / f"log{impl.suffix}.csv")[-1]
    assert (
        f"val loss {float(last['val_loss']):.4f}, top-1 {float(last['acc_top1']):.4f}"
        in result.stdout
    )


def test_init_keeps_the_classifier_of_another_size(impl, command, dataset, finished, tmp_path):
    checkpoint = finished[0] / f"last{impl.suffix}.safetensors"
    result = run(
        command,
        "--num-classes",
        2,
        "--train-per-class",
        4,
        "--val-per-class",
        2,
        "--epochs",
        1,
        "--data-dir",
        dataset,
        "--init",
        checkpoint,
        "--output",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert (
        "left at their initial values: head.4.weight, head.4.bias, aux_head.2.weight, aux_head.2.bias"
        in result.stdout
    )
    assert [row["epoch"] for row in rows(tmp_path / f"log{impl.suffix}.csv")] == [
        "1"
    ]  # a history of its own


def snapshot(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize(
    "batch_size, words",
    [(16, ("the loss is", "epoch 1, step")), (36, ("the validation loss is", "epoch 1, step 1"))],
)
def test_loss_that_is_not_finite_stops_the_run(
    impl, command, dataset, finished, tmp_path, batch_size, words
):
    """In the middle of an epoch, and in its last step, which only the validation loss can tell."""
    source = finished[0] / f"last{impl.suffix}.safetensors"
    result = run(
        command,
        *SIZES,
        "-b",
        batch_size,
        "--data-dir",
        dataset,
        "--init",
        source,
        "--lr",
        1e30,
        "--output",
        tmp_path,
    )
    one_line(result, *words, "start anew with a lower --lr")
    assert "--init" not in result.stderr  # there is no checkpoint to go on from
    assert (
        not list(tmp_path.glob("*.safetensors"))
        and len(rows(tmp_path / f"log{impl.suffix}.csv")) == 0
    )


def test_resuming_elsewhere_overwrites_no_other_run(impl, command, dataset, finished, tmp_path):
    (tmp_path / f"log{impl.suffix}.csv").write_text("another run")
    source = finished[0] / f"last{impl.suffix}.safetensors"
    before = snapshot(finished[0])
    result = run(
        command,
        *SIZES,
        "--data-dir",
        dataset,
        "--epochs",
        4,
        "--resume",
        source,
        "--output",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "previous-1" / f"log{impl.suffix}.csv").read_text() == "another run"
    assert len(rows(tmp_path / f"log{impl.suffix}.csv")) == 4 and snapshot(finished[0]) == before


def test_full_disk_is_one_line_and_keeps_the_checkpoint(impl, command, dataset, finished, tmp_path):
    for path in finished[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    checkpoint = tmp_path / f"last{impl.suffix}.safetensors"
    limit = (
        "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10**7, 10**7)); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    options = [*SIZES, "--data-dir", dataset, "--epochs", 5, "--output", tmp_path, "--resume"]
    result = run([sys.executable, "-c", limit, *command], *options)
    one_line(result, checkpoint.parent)
    assert checkpoint.read_bytes() == (finished[0] / checkpoint.name).read_bytes() and not list(
        tmp_path.glob("*.tmp")
    )


@pytest.mark.parametrize(
    "option, value",
    [
        ("--batch-size", "0"),
        ("--epochs", "0"),
        ("--epochs", "two"),
        ("--lr", "-1"),
        ("--lr", "inf"),
        ("--lr", "nan"),
        ("--seed", "-1"),
        ("--model", "overlock_xxl"),
        ("--foo", "1"),
    ],
)
def test_bad_option(command, option, value):
    one_line(run(command, option, value), option)


def test_bad_data(impl, command, dataset, tmp_path):
    one_line(
        run(command, "--data-dir", tmp_path / "absent", "--output", tmp_path / "out"),
        tmp_path / "absent",
        "prepare.py",
    )
    one_line(run(command, "--data-dir", dataset, "--output", tmp_path / "out"), "--num-classes")
    assert not list((tmp_path / "out").glob("*"))


def test_device_that_is_not_there(impl, command, dataset, tmp_path):
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    options = [*SIZES, "--data-dir", dataset, "--output", tmp_path, "--device", "cuda"]
    result = subprocess.run(
        [*command, *map(str, options)], capture_output=True, text=True, env=hidden
    )
    one_line(result, "--device cpu")


def test_natten_without_cuda_does_not_run_on_a_gpu(impl, monkeypatch):
    """There it returns memory as it was, without an exception."""
    if impl.name != "torch":
        pytest.skip("only torch_impl can use NATTEN")
    backend = impl.module("kernels.backend")
    monkeypatch.setattr(backend, "_backend", "auto")
    has_cuda = backend.natten_has_cuda.__wrapped__  # which does not remember
    monkeypatch.setattr(backend, "natten_has_cuda", has_cuda)
    monkeypatch.setattr(backend, "natten_na2d_av", len)
    natten = SimpleNamespace(has_cuda=lambda: False)
    monkeypatch.setattr(backend, "natten", natten, raising=False)
    monkeypatch.setattr(impl.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(impl.torch.cuda, "get_device_name", lambda: "GPU")
    args = train.make_parser().parse_args(["--na2d", "natten", "--device", "cuda"])
    with pytest.raises(train.InputError, match="NATTEN was built without CUDA"):
        train.run_training(args, run_files.RunFiles(args.output, impl.suffix))


def test_natten_that_is_not_installed(impl, monkeypatch):
    if impl.name != "torch":
        pytest.skip("only torch_impl can use NATTEN")
    monkeypatch.setattr(impl.module("kernels.backend"), "natten_na2d_av", None)
    args = train.make_parser().parse_args(["--na2d", "natten"])
    with pytest.raises(train.InputError, match="pip install .*natten=="):
        train.run_training(args, run_files.RunFiles(args.output, impl.suffix))


def test_data_of_another_kind_is_not_resumed(impl, command, dataset, finished, tmp_path):
    shutil.copytree(dataset, tmp_path / "data")
    (tmp_path / "data" / "train" / "n03").rename(tmp_path / "data" / "train" / "n04")
    annotations = tmp_path / "data" / "val" / "val_annotations.txt"
    annotations.write_text(annotations.read_text().replace("\tn03\t", "\tn04\t"))
    source = finished[0] / f"last{impl.suffix}.safetensors"
    one_line(
        run(
            command,
            *SIZES,
            "--data-dir",
            tmp_path / "data",
            "--epochs",
            4,
            "--resume",
            source,
            "--output",
            tmp_path / "out",
        ),
        source,
        "other classes",
        "--data-dir",
    )


def test_last_batch_too_small_for_batch_norm(impl):
    data = object.__new__(module("dataset").TinyImageNet)
    data.images, data.labels = np.zeros((33, 32, 32, 3), np.uint8), np.zeros(33, np.int64)
    with pytest.raises(train.InputError, match="--batch-size"):
        train.check_last_batch(data, 16)
    train.check_last_batch(data, 15)
    data.images = np.zeros((33, 64, 64, 3), np.uint8)
    train.check_last_batch(data, 16)


def test_output_that_cannot_be_written(command, dataset, tmp_path):
    (tmp_path / "file").write_text("")
    one_line(
        run(command, *SIZES, "--data-dir", dataset, "--output", tmp_path / "file"),
        tmp_path / "file",
        "--output",
    )


def test_bad_checkpoints(impl, command, dataset, finished, tmp_path):
    good = finished[0] / f"last{impl.suffix}.safetensors"
    options = [*SIZES, "--data-dir", dataset, "--output", tmp_path / "out"]
    truncated, text, pth = (
        tmp_path / "truncated.safetensors",
        tmp_path / "text.safetensors",
        tmp_path / "truncated.pth",
    )
    truncated.write_bytes(good.read_bytes()[:-1000])
    text.write_text("not a checkpoint")
    pth.write_bytes(b"PK\3\4 half an archive")
    for path in (truncated, text, pth, tmp_path / "absent.safetensors"):
        one_line(run(command, *options, "--init", path), path)
    one_line(
        run(command, *options, "--evaluate", good, "--num-classes", 2), good, "--num-classes 3"
    )
    one_line(
        run(command, *options, "--evaluate", good, "--model", "overlock_xt"),
        good,
        "another model",
        "--model",
    )
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": np.zeros(3, np.float32)}, foreign)
    one_line(run(command, *options, "--init", foreign), foreign, "not a checkpoint of train.py")
    arrays = {f"model.{key}": value for key, value in read_checkpoint(good)[0].items()}
    save_file(arrays, foreign, metadata={"run": "[1, 2]"})
    one_line(run(command, *options, "--resume", foreign), foreign)
    save_file(arrays, foreign)
    one_line(run(command, *options, "--resume", foreign), foreign, "--init")
    one_line(run(command, *options, "--resume"), "nothing to resume")
    one_line(run(command, *options, "--init", "x" * 300), "check the path")
    assert snapshot(finished[0])[Path(good.name)] == good.read_bytes() and not list(
        (tmp_path / "out").glob("*")
    )
    one_line(run(command, *options, "--resume", good, "--epochs", 9, "--seed", 1), "--seed 0")
    one_line(run(command, *options, "--resume", good, "--epochs", 3), "--epochs")
    one_line(run(command, *options, "--resume", good, "--init", good), "exclude")


def test_drawn_sample_is_learned_above_chance(impl, command, tmp_path):
    """What `make demo` shows: three epochs on the drawn sample, five classes, chance 0.2."""
    sample = tmp_path / "sample"
    subprocess.run(
        [sys.executable, ROOT / "data" / "prepare.py", "--sample", "--output", sample],
        check=True,
        capture_output=True,
    )
    result = run(
        command,
        "-b",
        16,
        "--num-classes",
        5,
        "--train-per-class",
        64,
        "--val-per-class",
        16,
        "--epochs",
        3,
        "--data-dir",
        sample,
        "--output",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    top1 = [float(row["acc_top1"]) for row in rows(tmp_path / f"log{impl.suffix}.csv")]
    # 80 images: chance is 16 right, and 28 or more happen by chance in one run of a thousand.
    assert max(top1) >= 28 / 80 and max(top1) < 1, top1
