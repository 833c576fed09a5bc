"""align.py on a pair that it does not know: each kind of fault is planted, and found by name.

It runs beside PyTorch and starts Jittor in the environment that JITTOR_PYTHON names. To start a
framework costs seconds: all faults are planted in one process, beside one of PyTorch.
"""

import os
import re
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import align
from tools.align import ports

NETS = Path(__file__).resolve().parent / "ports"
INPUT = "--input", "4,3,18,18"  # of the small net


@pytest.fixture(scope="module")
def words():
    """align.py's arguments for the small net and its port, less those of a test."""
    if "JITTOR_PYTHON" not in os.environ:
        pytest.skip("JITTOR_PYTHON is not set; `make test` sets it")
    pythons = [f"--jittor-python={os.environ['JITTOR_PYTHON']}", f"--torch-python={sys.executable}"]
    nets = [f"--{name}={NETS / name}_net.py:net" for name in ("jittor", "torch")]
    return [*pythons, *nets, "--steps=0"]


@pytest.fixture
def run(words, tmp_path, monkeypatch, capsys):
    """run(*options) -> the status of align.py, what it printed, its one line of an error."""

    def run(*options):
        options = options if "--input" in options else (*options, *INPUT)
        command = ["align.py", *words, f"--output={tmp_path}", *options]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        with pytest.raises(SystemExit) as ended:
            align.main()
        return ended.value.code, *capsys.readouterr()

    return run


# {what is planted: its sentence in the verdict}
FAULTS = {
    "residual": "at evaluation block: a lost residual: the difference is the input of ",
    "epsilon": "at evaluation block.norm: another epsilon: it adds 0.001 to the variance",
    "layer epsilon": "at evaluation norm: another epsilon: it adds 0.01 to the variance",
    "unbiased": "at training block.norm: the unbiased variance, a mean over n - 1 = 1295 values",
    "forward": "at evaluation local: its class defines `forward`, but Jittor calls `execute`",
    "pooling": "at evaluation pool: another pooling window",
    "factor": "at evaluation local: it is 0.5 times PyTorch's",
    "gradient": "at norm.weight: it is 2 times PyTorch's, a sum for a mean or the reverse",
    "momentum": "at block.norm.running_mean: another momentum, 0.2 for 0.1",
    "frozen": "fc.weight is frozen in Jittor, a frozen parameter",
    "rate": "it goes 2 times as far: another learning rate",
    "decay": "weight decay 0.1, PyTorch's is 0.01",
}
# What else the verdict says there.
FURTHER = {
    "pooling": "kernel_size is 3 in Jittor, 2 in PyTorch",
    "frozen": "Another dropout: drop drops 0.2, drop 0.1.",
}


@pytest.fixture(scope="module")
def verdicts(words, tmp_path_factory):
    """{what is planted: (the checks that depart, the sentences)}, and some ports without a fault.

    "none" is that of the net, "map" of one with another key and the map that renames it, "stock"
    of the net with Jittor's own layers.
    """
    folder = tmp_path_factory.mktemp("pairs")
    keys = folder / "map"
    keys.write_text("# the classifier\n^fc\\. -> head.\n")
    args = align.make_parser().parse_args([*words, *INPUT, "--aligned"])
    jobs = {fault: dict(kwargs={"fault": fault}) for fault in FAULTS}
    for fault in ("rate", "decay"):
        jobs[fault] = dict(optimizer=f"{NETS / 'jittor_net.py'}:other_{fault}")
    jobs |= {"none": {}, "stock": dict(aligned=False)}
    jobs["map"] = dict(kwargs={"fault": "name"}, map=str(keys))
    torch, jittor = ports.run_torch(args, folder), ports.jobs(args, folder)["jittor"]
    todo = [{**jittor, "output": str(folder / f"{f}.npz"), **job} for f, job in jobs.items()]
    found = {}
    for fault, arrays in zip(jobs, ports.run_jobs(args, "jittor", todo, folder)):
        of_pair = Namespace(**{**vars(args), "map": jobs[fault].get("map")})
        _, _, departures, sentences, _ = ports.verdict(of_pair, {**torch, "jittor": arrays})
        found[fault] = list(departures), "\n".join(sentences)
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault(verdicts, fault):
    departures, sentences = verdicts[fault]
    assert departures and FAULTS[fault] in sentences, sentences
    assert FURTHER.get(fault, "") in sentences, sentences


@pytest.mark.parametrize("port", ["none", "map"])
def test_a_port_without_faults(verdicts, port):
    assert verdicts[port] == ([], "")


def test_jittors_own_layers(verdicts):
    """Three departures in one run: pooling, weight decay, running variance."""
    for sentence in (
        "In the forward pass they first depart at evaluation windows: windows of equal size",
        ": weight decay 0, PyTorch's is 0.01.",
        "at block.norm.running_var: the biased running variance, (n - 1) / n of PyTorch's at n = ",
    ):
        assert sentence in verdicts["stock"][1], verdicts["stock"]


def test_layers_with_every_option(run, tmp_path):
    """Convolutions and interpolations of every kind, aligned's beside PyTorch's.

    With two inputs, one of them integers and the other in a file with the targets of a loss of
    one's own, an output that is a dict of lists, and another optimizer.
    """
    generator = np.random.default_rng(0)
    x = generator.standard_normal((2, 6, 9, 12)).astype(np.float32)
    np.savez(tmp_path / "input.npz", x=x, target=np.array([3, 0]))
    grids = {name: f"{NETS / name}_grid.py" for name in ("jittor", "torch")}
    options = [f"--{name}={grid}:Grid" for name, grid in grids.items()]
    options += [f"--{name}-loss={grid}:loss" for name, grid in grids.items()]
    options += [f"--{name}-optimizer={grid}:sgd" for name, grid in grids.items()]
    inputs = ["--input", tmp_path / "input.npz", "--input", "2,7:10"]
    code, out, err = run("--aligned", "--steps", "3", *options, *inputs)
    assert code == 0, out + err
    table = (tmp_path / "alignment.csv").read_text()
    rows = ["forward,evaluation convs.10,", "forward,training resizes.6,", "steps,step 3,"]
    rows += ["forward,training the model[maps][1][6],", "gradients,convs.3.bias,"]
    for row in rows:
        assert row in table, table
    assert "adamw" not in table


def test_keys_of_another_name(run):
    code, _, error = run("--aligned", "--jittor-kwargs", '{"fault": "name"}')
    assert code == 2 and error.startswith("align.py: error: jittor failed: the weights do not fit")
    assert "Jittor lacks fc.weight (5, 8); the nearest left is head.weight" in error


@pytest.mark.parametrize(
    "options, message",
    [
        (["--input", "2,3,x"], "--input 2,3,x is neither a shape"),
        (["--input", "/nowhere.npz"], "cannot read /nowhere.npz"),
        (["--kwargs", "[1]"], "--kwargs [1] is not JSON like"),
        (["--map", "/nowhere"], "cannot read /nowhere"),
        (["--jittor-loss", "x:y"], "--jittor-loss and --torch-loss go together"),
        (["--torch", "torch.nn:Nothing"], "torch failed: torch.nn has no Nothing"),
    ],
)
def test_what_the_user_may_get_wrong(run, options, message):
    code, _, error = run(*options)
    assert code == 2 and message in error and error.count("\n") == 1, error


@pytest.mark.parametrize(
    "spec, message",
    [
        ("nothing:net", "No module named 'nothing'; give file.py:function"),
        ("nothing.py:net", "there is no file nothing.py"),
        ("net", "net is not module:function"),
    ],
)
def test_a_model_that_is_not_there(spec, message):
    from tools.align.names import UserError
    from tools.align.side import resolve

    with pytest.raises(UserError, match=re.escape(message)):
        resolve(spec)


def test_modules_are_matched_by_name_then_by_order_and_shape():
    from tools.align.names import kind, pairs, rename_module

    conv, pool = ("conv", (2, 8, 4, 4)), ("pool", (2, 8, 2, 2))
    jittor = {"stem": conv, "b.conv": conv, "b.pool": pool, "b.pool._layer": pool}
    torch = {"stem": conv, "a.0": conv, "a.1": ("relu", (2, 8, 4, 4)), "a.2": pool}
    assert pairs(jittor, torch) == {"stem": "stem", "a.0": "b.conv", "a.2": "b.pool"}
    assert kind("MaxPool2d") == kind("Pool") == "pool" and kind("BatchNorm2d") == "batchnorm"
    patterns = [(re.compile(r"^layers\.(\d+)\."), r"blocks.\1.")]
    assert rename_module("layers.3", patterns) == "blocks.3"


def test_a_layer_that_draws_is_no_fault():
    from tools.align.side import differing

    one = {"forward/training a": np.ones(3), "forward/training b": np.array([1.0, 0, 2])}
    again = {"forward/training a": np.ones(3), "forward/training b": np.array([0.0, 2, 2])}
    assert differing(one, one) is None and differing(one, again) == "b"


def test_a_gradient_is_measured_by_the_largest_error_of_several_runs():
    """PyTorch's own run may be lucky; a factor of 1.05 is still found, in the mean of them all too.

    A step, whose single arrays have no limit, is judged by its mean, and its line says so.
    """
    from tools.align.compare import compare_arrays, largest_errors, summary

    generator, names = np.random.default_rng(0), "abc"
    values = generator.standard_normal(100)
    exact = {name: generator.permutation(values) for name in names}

    def times(factor):
        return {name: array * factor for name, array in exact.items()}

    def of_gradients(arrays):
        return {f"gradients/{name}": array for name, array in arrays.items()}

    runs = (of_gradients(times(1 + error)) for error in (1e-7, 1e-3, 1e-6))
    largest = largest_errors(runs, {**of_gradients(exact), "step/a": exact["a"]})
    perturbed = {name: largest[f"gradients/{name}"] for name in names}
    assert [errors == pytest.approx((1e-3, 1e-3)) for errors in perturbed.values()] == [True] * 3

    def verdict(check, factor, perturbed=None):
        arrays = times(factor), times(1 + 1e-7), exact, exact
        return summary(check, list(compare_arrays(check, *arrays, perturbed=perturbed)))

    assert verdict("gradients", 1.002, perturbed)[1] is None
    assert verdict("gradients", 1.002)[1] == "a"
    assert verdict("gradients", 1.05, perturbed)[1] == "a"
    line, first = verdict("gradients", 1.005, perturbed)
    assert first == "a" and "the mean is beyond its limit" in line
    line, first = verdict("step", 1 + 1e-7)
    assert first is None and "judged by the mean alone, 0.33 of its limit" in line
