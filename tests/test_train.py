"""train.py as its user runs it: files, resuming after kill -9, bad input, interruption."""

import csv
import errno
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
from under_test import DEVICE, cpu_only, module

train, run_files = module("train"), module("run_files")
read_checkpoint = module("checkpoint").read_checkpoint

ROOT = Path(__file__).resolve().parent.parent
WALL_CLOCK = ("epoch_time", "images_per_second")
SIZES = ["-b", "16", "--num-classes", "3", "--train-per-class", "12", "--val-per-class", "6"]


@pytest.fixture(scope="module")
def command(impl):
    return [sys.executable, str(ROOT / f"{impl.name}_impl" / "train.py")]


def run(command, *options, **how):
    return subprocess.run([*command, *map(str, options)], capture_output=True, text=True, **how)


def rows(path):
    """The rows of a log.csv without the times in them."""
    with open(path) as f:
        table = list(csv.DictReader(f))
    return [{key: value for key, value in row.items() if key not in WALL_CLOCK} for row in table]


@pytest.fixture(scope="module")
def finished(impl, command, dataset, tmp_path_factory):
    """A run of three epochs, from another working directory."""
    output = tmp_path_factory.mktemp("finished")
    options = [*SIZES, "--data-dir", dataset, "--epochs", 3, "--output", output]
    result = run(command, *options, cwd=output)
    assert result.returncode == 0, result.stderr
    return output, result


def one_line(result, *words):
    """Exit status 2 and one line on stderr that holds `words`."""
    # A slow machine takes so long to load the operators that Jittor reports its progress.
    progress = ("jittor_impl:", "Compiling Operators")
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(progress)]
    assert result.returncode == 2 and len(lines) == 1, result.stderr
    assert lines[0].startswith("train.py: error: ")
    for word in words:
        assert str(word) in lines[0], lines[0]


def test_files_of_a_run(impl, finished):
    output, result = finished
    with open(output / f"log{impl.suffix}.csv") as f:
        table = list(csv.DictReader(f))
    columns = ["train_loss", "train_loss_aux", "epoch_time", "val_loss", "acc_top1", "acc_top5"]
    assert list(table[0])[:6] == columns
    assert [row["epoch"] for row in table] == ["1", "2", "3"]
    ratio = train.make_parser().get_default("aux_loss_ratio")
    for row in table:
        row = {key: float(value) for key, value in row.items()}
        loss = row["train_loss_main"] + ratio * row["train_loss_aux"]
        assert row["train_loss"] == pytest.approx(loss)
        assert 0 <= row["acc_top1"] <= row["acc_top5"] == 1
    text = (output / f"log{impl.suffix}.txt").read_text()
    assert ("; CPU, " in text) == (DEVICE == "cpu")
    for words in ("NumPy", '"batch_size": 16', "parameters", "n01 n02 n03", "epoch 3/3"):
        assert words in text and words in result.stdout
    model, optimizer, run_info, _ = read_checkpoint(output / f"last{impl.suffix}.safetensors")
    assert run_info["epoch"] == 3 and run_info["step"] == 9 and run_info["args"]["seed"] == 0
    assert len(run_info["history"]) == 3 and len(optimizer) > 100
    best = max(float(row["acc_top1"]) for row in table)
    assert run_info["best_top1"] == best
    _, _, run_info, _ = read_checkpoint(output / f"best{impl.suffix}.safetensors")
    assert run_info["history"][-1]["acc_top1"] == best
    assert not list(output.glob("*.tmp"))


# Sums are added in the order in which a GPU's threads come.
bit_for_bit = cpu_only("no bit repeats on a GPU")


@bit_for_bit
def test_same_seed_same_numbers(impl, command, dataset, finished, tmp_path):
    options = [*SIZES, "--data-dir", dataset, "--epochs", 1, "--output", tmp_path, "--no-progress"]
    result = run(command, *options)
    assert result.returncode == 0, result.stderr
    expected = rows(finished[0] / f"log{impl.suffix}.csv")[:1]
    assert rows(tmp_path / f"log{impl.suffix}.csv") == expected


@pytest.fixture(scope="module")
def resumed(impl, command, dataset, tmp_path_factory):
    """The folder of the run of `finished`, killed in its second epoch and resumed."""
    output = tmp_path_factory.mktemp("resumed")
    options = [*SIZES, "--data-dir", dataset, "--epochs", 3, "--output", output]
    process = subprocess.Popen([*command, *map(str, options)], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch 2/3") and "images," in line:  # in the middle of the second epoch
            process.kill()
            break
    process.wait()
    assert len(rows(output / f"log{impl.suffix}.csv")) == 1
    # The worst moment: the last checkpoint is new, the CSV and the text log are not yet, and a
    # temporary file is half written.
    of_epochs = ("epoch 1/", "1", "2", "3")
    for name in ("csv", "txt"):
        path = output / f"log{impl.suffix}.{name}"
        lines = path.read_text().splitlines(True)
        path.write_text("".join(line for line in lines if not line.startswith(of_epochs)))
    (output / f"last{impl.suffix}.safetensors.tmp").write_bytes(b"half")
    result = run(command, *options, "--resume")
    assert result.returncode == 0, result.stderr
    return output


def test_kill_and_resume_gives_the_epochs_of_an_unbroken_run(impl, resumed):
    table = rows(resumed / f"log{impl.suffix}.csv")
    assert [row["epoch"] for row in table] == ["1", "2", "3"]
    assert all(np.isfinite(float(value)) for row in table for value in row.values())
    text = (resumed / f"log{impl.suffix}.txt").read_text()
    assert "resumed from" in text
    assert all(text.count(f"epoch {epoch}/3: train loss") == 1 for epoch in (1, 2, 3))


@bit_for_bit
def test_kill_and_resume_gives_the_numbers_of_an_unbroken_run(impl, resumed, finished):
    expected = finished[0]
    assert rows(resumed / f"log{impl.suffix}.csv") == rows(expected / f"log{impl.suffix}.csv")
    last = f"last{impl.suffix}.safetensors"
    actual, unbroken = read_checkpoint(resumed / last), read_checkpoint(expected / last)
    for ours, wanted in zip(actual[:2], unbroken[:2]):
        assert ours.keys() == wanted.keys()
        assert all(np.array_equal(ours[key], wanted[key]) for key in wanted)


def start_until(words, line_start, **options):
    """Start a program and return its process after a line of its output."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, **options)
    for line in process.stdout:
        if line.startswith(line_start):
            break
    return process


def interrupt_after(command, options, line_start, number=signal.SIGINT, group=False):
    """Start a run, send it the signal after a line of output, return what train.py says of it.

    With `group` the compilers are interrupted too, as by a terminal.
    """
    words = [*command, *map(str, options)]
    process = start_until(words, line_start, stderr=subprocess.PIPE, start_new_session=True)
    time.sleep(0.5)
    os.killpg(process.pid, number) if group else process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    lines = [line for line in stderr.splitlines() if line.startswith("train.py:")]
    assert process.returncode == 128 + number and len(lines) == 1, stderr
    assert "Traceback" not in stderr, stderr
    return lines[0]


# How a program in a string imports the train.py that is its first argument.
IMPORT_TRAIN = """
import os, signal, sys
sys.argv.pop(0)
folder = os.path.dirname(sys.argv[0])
sys.path.insert(0, os.path.dirname(folder))
train = __import__(os.path.basename(folder) + ".train").train
"""


def test_interrupt_says_how_to_resume(impl, command, dataset, finished, tmp_path):
    options = [*SIZES, "--data-dir", dataset, "--output", tmp_path, "--seed", 1]
    source = finished[0] / f"last{impl.suffix}.safetensors"
    options += ["--epochs", 500, "--init", source]
    line = interrupt_after(command, options, "epoch 1/500: train loss")
    words = shlex.split(line.partition("resume with: ")[2])
    assert "--init" not in words
    # Not by the rows of log.csv: Ctrl-C may come between the checkpoint, which counts, and the log,
    # which is made again from it.
    done = read_checkpoint(tmp_path / f"last{impl.suffix}.safetensors")[2]["epoch"]
    words[words.index("--epochs") + 1] = str(done + 1)
    result = subprocess.run(words, capture_output=True, text=True)  # the very command printed
    assert result.returncode == 0, result.stderr
    assert len(rows(tmp_path / f"log{impl.suffix}.csv")) == done + 1


def test_interrupt_between_checkpoint_and_log(impl, command, dataset, tmp_path):
    """The epoch is in the checkpoint, so it counts, and the resumed run logs it."""
    code = f"""
{IMPORT_TRAIN}
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
    # A larger model in small steps: XXT's epoch would end while interrupt_after waits.
    options = [*SIZES, "-b", 2, "--model", "overlock_xt", "--epochs", 500]
    options += ["--data-dir", dataset, "--output", tmp_path]
    assert "no epoch was finished" in interrupt_after(command, options, "overlock_xt", group=True)


def test_sigterm_ends_a_run_as_ctrl_c_does(impl, command, dataset, tmp_path):
    """A job that a scheduler stops and starts again needs one command: --resume auto."""
    options = [*SIZES, "--data-dir", dataset, "--output", tmp_path, "--resume", "auto"]
    endless = [*options, "--epochs", 500]
    line = interrupt_after(command, endless, "epoch 1/500: train loss", signal.SIGTERM)
    assert "resume with: " in line and not (tmp_path / f".lock{impl.suffix}").exists()
    done = read_checkpoint(tmp_path / f"last{impl.suffix}.safetensors").run["epoch"]
    result = run(command, *options, "--epochs", done + 1)
    assert result.returncode == 0 and f"after epoch {done}" in result.stdout, result.stderr


def test_two_runs_in_one_folder_exclude_each_other(impl, command, dataset, tmp_path):
    options = [*SIZES, "--data-dir", dataset, "--output", tmp_path]
    words = [*command, *map(str, options), "--epochs", "500"]
    process = start_until(words, "epoch 1/500: train loss")
    try:
        second = run(command, *options)
        one_line(second, tmp_path, f"process {process.pid} on ", "another --output")
        assert not (tmp_path / "previous-1").exists()
    finally:
        process.kill()
        process.communicate()
    # The lock died with its process.
    result = run(command, *options, "--epochs", 1)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "previous-1" / f"log{impl.suffix}.csv").exists()


def test_memory_that_runs_out_is_one_line(impl, command, dataset, tmp_path):
    code = f"""
{IMPORT_TRAIN}
def fail(*_):
    raise ERROR
train.training_step = fail
train.main()
"""
    options = [*SIZES, "--data-dir", dataset, "--output", tmp_path, "--no-progress"]
    for error in (
        "MemoryError()",
        "RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB')",
        "RuntimeError('[enforce fail at alloc_cpu.cpp:83] . DefaultCPUAllocator: "
        "can\\'t allocate memory: you tried to allocate 40 bytes.')",
    ):
        words = [command[0], "-c", code.replace("ERROR", error), command[1]]
        one_line(run(words, *options), "out of memory; lower --batch-size")


# How Jittor, PyTorch, cuBLAS and cuDNN say it of a GPU, and what is something else.
MEMORY = [
    ("Unable to alloc cuda device memory for size 1073741824", True),
    ("GPU memory is overflow, please reduce your batch_size or data size!", True),
    ("CUDA error at x.cc:25 code=2( cudaErrorMemoryAllocation ) cudaMalloc(&ptr, size)", True),
    ("CUDA error at x.cc:36 code=3( CUBLAS_STATUS_ALLOC_FAILED ) cublasCreate(&handle)", True),
    ("CUDA error at x.cc:31 code=1003( CUDNN_STATUS_ALLOC_FAILED ) cudnnCreate(&handle)", True),
    ("CUDA kernel adamw_kernel did not start: out of memory", True),
    ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB", True),
    ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
    ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", True),
    ("CUDA error: an illegal memory access was encountered", False),
    ("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED", False),
]


@pytest.mark.parametrize("text, is_memory", MEMORY)
def test_memory_of_a_gpu_that_runs_out_is_known(text, is_memory):
    assert module("errors").is_out_of_memory(RuntimeError(text)) == is_memory


def test_memory_that_the_system_refuses_names_no_folder(monkeypatch, capsys):
    """A map of memory or a new process, of which the error has no file."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def body(args):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    args = train.make_parser().parse_args(["--img-size", "4096"])
    with pytest.raises(SystemExit, match="2"):
        module("program").run_program("train.py", body, args)
    says = "out of memory; lower --batch-size (64) or --img-size (4096)\n"
    assert capsys.readouterr().err.endswith(says)


def test_an_earlier_run_is_set_aside(impl, command, dataset, tmp_path):
    (tmp_path / f"log{impl.suffix}.csv").write_text("a finished run")
    result = run(command, *SIZES, "--data-dir", dataset, "--epochs", 1, "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "previous-1" / f"log{impl.suffix}.csv").read_text() == "a finished run"
    assert len(rows(tmp_path / f"log{impl.suffix}.csv")) == 1


def test_the_runs_of_a_pair_are_set_aside_together(tmp_path):
    files, other = (run_files.RunFiles(tmp_path, suffix) for suffix in ("", "_torch"))
    for number, started in enumerate(((files, other), (other, files), (files,))):
        for each in started:
            each.csv.write_text(str(number))
            each.set_aside()
    paths = list(tmp_path.rglob("*csv"))
    assert {str(path.relative_to(tmp_path)): path.read_text() for path in paths} == {
        f"previous-1/{files.csv.name}": "0",
        f"previous-1/{other.csv.name}": "0",
        f"previous-2/{files.csv.name}": "1",
        f"previous-2/{other.csv.name}": "1",
        f"previous-3/{files.csv.name}": "2",
    }


def test_evaluate_repeats_the_numbers_of_the_log(impl, command, dataset, finished):
    output, _ = finished
    checkpoint = output / f"last{impl.suffix}.safetensors"
    result = run(command, *SIZES, "--data-dir", dataset, "--evaluate", checkpoint)
    last = rows(output / f"log{impl.suffix}.csv")[-1]
    loss, top1 = float(last["val_loss"]), float(last["acc_top1"])
    assert f"val loss {loss:.4f}, top-1 {top1:.4f}" in result.stdout


def test_init_keeps_the_classifier_of_another_size(impl, command, dataset, finished, tmp_path):
    checkpoint = finished[0] / f"last{impl.suffix}.safetensors"
    sizes = ["--num-classes", 2, "--train-per-class", 4, "--val-per-class", 2, "--epochs", 1]
    options = ["--data-dir", dataset, "--init", checkpoint, "--output", tmp_path]
    result = run(command, *sizes, *options)
    assert result.returncode == 0, result.stderr
    classifiers = "head.4.weight, head.4.bias, aux_head.2.weight, aux_head.2.bias"
    assert f"left at their initial values: {classifiers}" in result.stdout
    epochs = [row["epoch"] for row in rows(tmp_path / f"log{impl.suffix}.csv")]
    assert epochs == ["1"]  # a history of its own


def snapshot(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


# (batch size, what is said): 36 images are one step.
DIVERGING = [
    (16, ("the loss is", "epoch 1, step")),
    (36, ("the validation loss is", "epoch 1, step 1")),
]


@pytest.mark.parametrize("batch_size, words", DIVERGING)
def test_loss_that_is_not_finite_stops_the_run(
    impl, command, dataset, finished, tmp_path, batch_size, words
):
    """In the middle of an epoch, and in its last step, which only the validation loss can tell."""
    source = finished[0] / f"last{impl.suffix}.safetensors"
    options = [*SIZES, "-b", batch_size, "--init", source, "--lr", 1e30]
    result = run(command, *options, "--data-dir", dataset, "--output", tmp_path)
    one_line(result, *words, "start anew with a lower --lr")
    assert "--init" not in result.stderr  # there is no checkpoint to go on from
    assert not list(tmp_path.glob("*.safetensors"))
    assert len(rows(tmp_path / f"log{impl.suffix}.csv")) == 0


def test_resuming_elsewhere_overwrites_no_other_run(impl, command, dataset, finished, tmp_path):
    (tmp_path / f"log{impl.suffix}.csv").write_text("another run")
    source = finished[0] / f"last{impl.suffix}.safetensors"
    before = snapshot(finished[0])
    options = [*SIZES, "--data-dir", dataset, "--epochs", 4, "--resume", source]
    result = run(command, *options, "--output", tmp_path)
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
    assert checkpoint.read_bytes() == (finished[0] / checkpoint.name).read_bytes()
    assert not list(tmp_path.glob("*.tmp"))


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
    absent, output = tmp_path / "absent", tmp_path / "out"
    result = run(command, "--data-dir", absent, "--output", output)
    one_line(result, absent, "prepare.py")
    result = run(command, "--data-dir", dataset, "--output", output)
    one_line(result, "--num-classes")
    assert not list(output.glob("*"))


def test_device_that_is_not_there(impl, command, dataset, tmp_path):
    options = [*SIZES, "--data-dir", dataset, "--output", tmp_path, "--device", "cuda"]
    result = run(command, *options, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    one_line(result, "--device cpu")


# (what the driver is for, whether PyTorch sees a GPU, its capability, its CUDA, the error of its
# first kernel), what is said
UNUSABLE = [
    ((), False, None, "12.1", None, None),
    ((12, 4), True, (8, 9), "12.1", None, None),
    ((11, 4), False, None, "12.1", None, "driver is for CUDA 11.4, and .* CUDA 12.1; update the"),
    ((12, 4), False, None, "13.0", None, "CUDA 13.0; update the driver, or pip install -r req"),
    ((12, 4), False, None, None, None, "built for CPUs; pip install -r requirements-torch.txt"),
    (
        (13, 0),
        True,
        (12, 0),
        "12.1",
        "no kernel image",
        "an sm_120, .* for sm_80; install PyTorch 2.7",
    ),
    ((13, 0), True, (7, 0), "13.0", "no kernel image", "an sm_70, .* sm_80; pip install -r requ"),
    ((13, 0), True, (9, 0), "13.0", "ECC error\nmore", "cannot compute on GPU: CUDA ECC error$"),
]


@pytest.mark.parametrize("driver, seen, capability, cuda, error, says", UNUSABLE)
def test_a_gpu_that_pytorch_cannot_use_is_named(
    impl, monkeypatch, capsys, driver, seen, capability, cuda, error, says
):
    """With --device cuda it is an error, with auto a line before the CPU is taken."""
    if impl.name != "torch":
        pytest.skip("about PyTorch")
    device, program, torch = impl.module("kernels.device"), impl.module("program"), impl.torch

    def zeros(*_, **__):
        if error:
            raise RuntimeError(f"CUDA {error}")
        return np.zeros(1)

    for user in (device, program):
        monkeypatch.setattr(user, "driver_version", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    for name, value in (
        ("is_available", seen),
        ("get_device_name", "GPU"),
        ("get_device_capability", capability),
        ("get_arch_list", ["sm_80"]),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch, "zeros", zeros)
    for asked in ("auto", "cuda"):
        args = train.make_parser().parse_args(["--device", asked])
        if asked == "cuda" and not (seen and not says):
            with pytest.raises(train.InputError, match=says and says.rstrip("$") or "no CUDA GPU"):
                program.choose_device(args)
            continue
        program.choose_device(args)
        assert args.device == ("cuda" if seen and not says else "cpu")
        err = capsys.readouterr().err
        assert not err if not says else err.count("\n") == 1 and "running on the CPU" in err


def test_what_the_log_says_of_a_gpu(impl, monkeypatch):
    if impl.name != "torch":
        pytest.skip("about PyTorch; test_cuda_setup.py has Jittor's")
    device, program, torch = impl.module("kernels.device"), impl.module("program"), impl.torch
    capability, version = (9, 0), 91300
    monkeypatch.setattr(program, "cuda_problem", lambda: None)
    monkeypatch.setattr(device, "driver_version", lambda: (13, 1))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)

    def choose_device(*options):
        return program.choose_device(train.make_parser().parse_args(options))

    says = (
        "NVIDIA H100, compute capability 9.0, driver for CUDA 13.1, CUDA 13.0, cuDNN 9.13.0, TF32 "
    )
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    try:
        for options, tf32 in (((), "off"), (("--tf32", "on"), "on"), (("--tf32", "off"), "off")):
            backends[1].allow_tf32 = True  # as in NVIDIA's containers
            assert choose_device(*options) == f"{says}{tf32}"
            assert [backend.allow_tf32 for backend in backends] == [tf32 == "on", False]
        version = 8907
        assert "cuDNN 8.9.7, TF32 off" in choose_device()
    finally:
        for backend, value in zip(backends, before):
            backend.allow_tf32 = value
    with pytest.raises(train.InputError, match="--tf32 on needs a GPU of compute capability 8.0"):
        choose_device("--tf32", "on", "--device", "cpu")
    capability = (7, 5)
    with pytest.raises(train.InputError, match="leave it out"):
        choose_device("--tf32", "on")


def test_channels_last_is_for_a_cpu(impl):
    """On a GPU PyTorch would take cuDNN for depthwise convolutions, whatever the others gain."""
    if impl.name != "torch":
        pytest.skip("Jittor's maps are contiguous")
    memory_format, torch = impl.module("kernels.device").memory_format, impl.torch
    assert memory_format("cpu") == memory_format(torch.device("cpu")) == torch.channels_last
    assert memory_format("cuda") == memory_format(torch.device("cuda:1")) == torch.contiguous_format


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
    monkeypatch.setattr(impl.module("program"), "cuda_problem", lambda: None)
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
    options = [*SIZES, "--data-dir", tmp_path / "data", "--epochs", 4, "--resume", source]
    result = run(command, *options, "--output", tmp_path / "out")
    one_line(result, source, "other classes", "--data-dir")


def test_last_batch_too_small_for_batch_norm(impl):
    data = object.__new__(module("dataset").TinyImageNet)
    data.images, data.labels = np.zeros((33, 32, 32, 3), np.uint8), np.zeros(33, np.int64)

    def check(batch_size, accumulation=1):
        args = SimpleNamespace(batch_size=batch_size, grad_accumulation=accumulation)
        train.check_last_batch(data, args)

    for sizes in ((16,), (5, 2)):  # 33 leaves 1; 3, of which the second part has 1
        with pytest.raises(train.InputError, match="--batch-size"):
            check(*sizes)
    check(15)
    data.images = np.zeros((33, 64, 64, 3), np.uint8)
    check(16)


def test_output_that_cannot_be_written(command, dataset, tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    result = run(command, *SIZES, "--data-dir", dataset, "--output", path)
    one_line(result, path, "--output")


@pytest.fixture
def good(impl, finished):
    """The last checkpoint of the finished run."""
    return finished[0] / f"last{impl.suffix}.safetensors"


@pytest.fixture
def refuses(command, dataset, tmp_path):
    """A function: train.py with these options ends in one line that holds `words`."""

    def check(options, *words):
        common = [*SIZES, "--data-dir", dataset, "--output", tmp_path / "out"]
        one_line(run(command, *common, *options), *words)

    return check


@pytest.fixture
def untouched(finished, tmp_path):
    """The test leaves the finished run as it was and writes no file of a run of its own."""
    before = snapshot(finished[0])
    yield
    assert snapshot(finished[0]) == before
    assert not list((tmp_path / "out").glob("*"))


def test_files_that_are_no_checkpoints_are_refused(good, refuses, untouched, tmp_path):
    contents = {
        "truncated.safetensors": good.read_bytes()[:-1000],
        "text.safetensors": b"not a checkpoint",
        "truncated.pth": b"PK\3\4 half an archive",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in (*contents, "absent.safetensors"):
        refuses(["--init", tmp_path / name], tmp_path / name)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": np.zeros(3, np.float32)}, foreign)
    refuses(["--init", foreign], foreign, "not a checkpoint of train.py")
    refuses(["--init", "x" * 300], "check the path")


def test_a_checkpoint_of_another_model_is_refused(good, refuses, untouched):
    refuses(["--evaluate", good, "--num-classes", 2], good, "--num-classes 3")
    refuses(["--evaluate", good, "--model", "overlock_xt"], good, "another model", "--model")


def test_only_a_run_can_be_resumed(good, refuses, untouched, tmp_path):
    weights = {f"model.{key}": value for key, value in read_checkpoint(good)[0].items()}
    foreign = tmp_path / "foreign.safetensors"
    save_file(weights, foreign, metadata={"run": "[1, 2]"})
    refuses(["--resume", foreign], foreign)
    save_file(weights, foreign)
    refuses(["--resume", foreign], foreign, "--init")
    refuses(["--resume"], "nothing to resume")


def test_options_that_contradict_the_resumed_run_are_refused(good, refuses):
    refuses(["--resume", good, "--epochs", 9, "--seed", 1], "--seed 0")
    refuses(["--resume", good, "--epochs", 3], "--epochs")
    refuses(["--resume", good, "--init", good], "exclude")


def test_drawn_sample_is_learned_above_chance(impl, command, tmp_path):
    """What `make demo` shows: three epochs on the drawn sample, five classes, chance 0.2."""
    sample = tmp_path / "sample"
    prepare = [sys.executable, ROOT / "data" / "prepare.py", "--sample", "--output", sample]
    subprocess.run(prepare, check=True, capture_output=True)
    sizes = ["-b", 16, "--num-classes", 5, "--train-per-class", 64, "--val-per-class", 16]
    options = [*sizes, "--epochs", 3, "--data-dir", sample, "--output", tmp_path]
    result = run(command, *options)
    assert result.returncode == 0, result.stderr
    top1 = [float(row["acc_top1"]) for row in rows(tmp_path / f"log{impl.suffix}.csv")]
    # 80 images: chance is 16 right, and 28 or more happen by chance in one run of a thousand.
    assert max(top1) >= 28 / 80 and max(top1) < 1, top1
