"""align.py on a pair that it does not know: each kind of fault is planted, and found by name.

It runs beside PyTorch and starts Jittor in the environment that JITTOR_PYTHON names.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
NETS = ROOT / "tests" / "ports"


@pytest.fixture
def align(tmp_path):
    if "JITTOR_PYTHON" not in os.environ:
        pytest.skip("JITTOR_PYTHON is not set; `make test` sets it")

    def run(*options, fault=None):
        pythons = ["--jittor-python", os.environ["JITTOR_PYTHON"], "--torch-python", sys.executable]
        nets = [
            "--jittor",
            f"{NETS / 'jittor_net.py'}:net",
            "--torch",
            f"{NETS / 'torch_net.py'}:net",
        ]
        size = ["--input", "4,3,18,18", "--steps", "0", "--output", str(tmp_path)]
        if fault:
            options = (*options, "--jittor-kwargs", f'{{"fault": "{fault}"}}')
        command = [sys.executable, str(ROOT / "align.py"), *pythons, *nets, *size, *options]
        return subprocess.run(command, capture_output=True, text=True)

    return run


def test_a_port_without_faults(align, tmp_path):
    result = align("--aligned", "--steps", "3")
    assert result.returncode == 0, result.stdout + result.stderr
    table = (tmp_path / "alignment.csv").read_text()
    for row in ("forward,evaluation block.norm,", "forward,training the model,", "steps,step 3,"):
        assert row in table, table


def test_jittors_own_layers(align):
    """Three departures in one run: pooling, weight decay, running variance."""
    result = align()
    assert result.returncode == 1, result.stdout + result.stderr
    for sentence in (
        "In the forward pass they first depart at evaluation windows: windows of equal size",
        ": weight decay 0, PyTorch's is 0.01.",
        "at block.norm.running_var: the biased running variance, (n - 1) / n of PyTorch's at n = ",
    ):
        assert sentence in result.stdout, result.stdout


FAULTS = {
    "residual": "at evaluation block: a lost residual: the difference is the input of ",
    "epsilon": "at evaluation block.norm: another epsilon: it adds 0.001 to the variance",
    "layer epsilon": "at evaluation norm: another epsilon: it adds 0.01 to the variance",
    "unbiased": "at training block.norm: the unbiased variance, a mean over n - 1 = 1295 values",
    "forward": "at evaluation local: its class defines `forward`, but Jittor calls `execute`",
    "pooling": "at evaluation pool: another pooling window",
    "frozen": "fc.weight is frozen in Jittor, a frozen parameter",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault(align, fault):
    result = align("--aligned", fault=fault)
    assert result.returncode == 1 and FAULTS[fault] in result.stdout, result.stdout + result.stderr
    if fault == "pooling":
        assert "kernel_size is 3 in Jittor, 2 in PyTorch" in result.stdout, result.stdout
    if fault == "frozen":
        assert "Another dropout: drop drops 0.2, drop 0.1." in result.stdout, result.stdout


def test_keys_of_another_name(align, tmp_path):
    result = align("--aligned", fault="name")
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "Jittor lacks fc.weight (5, 8); the nearest left is head.weight" in result.stderr
    (tmp_path / "map").write_text("# the classifier\n^fc\\. -> head.\n")
    result = align("--aligned", "--map", str(tmp_path / "map"), fault="name")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "options, message",
    [
        (["--input", "2,3,x"], "--input 2,3,x is neither a shape"),
        (["--kwargs", "[1]"], "--kwargs [1] is not JSON like"),
        (["--map", "/nowhere"], "cannot read /nowhere"),
        (["--torch", "nothing:net"], "No module named 'nothing'"),
        (["--torch", "torchvision.models:resnet0"], "torchvision.models has no resnet0"),
        (["--jittor-loss", "x:y"], "--jittor-loss and --torch-loss go together"),
    ],
)
def test_what_the_user_may_get_wrong(align, options, message):
    result = align(*options)
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert "Traceback" not in result.stderr, result.stderr


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
