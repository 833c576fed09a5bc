"""train.py --export: a checkpoint's weights in a .pth that PyTorch code loads."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from under_test import module, save_weights

ROOT = Path(__file__).resolve().parent.parent
checkpoint, models, weights = (module(name) for name in ("checkpoint", "models", "weights"))


@pytest.fixture
def export(impl):
    def call(*options):
        command = [sys.executable, ROOT / f"{impl.name}_impl" / "train.py", *options]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True)

    return call


@pytest.fixture(scope="module")
def arrays():
    return checkpoint.model_arrays(models.overlock_xxt(num_classes=5, seed=2))


@pytest.fixture
def source(arrays, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(path, arrays, prefix="model.")
    return path


def test_an_untrained_auxiliary_classifier_is_said(export, arrays, tmp_path):
    rest = {key: value for key, value in arrays.items() if not key.startswith("aux_head.")}
    save_weights(tmp_path / "file", rest)
    result = export("--init", tmp_path / "file", "--export", tmp_path / "a.pth")
    assert result.returncode == 0, result.stderr
    assert "has no auxiliary classifier; " in result.stdout


@pytest.mark.parametrize("merge", [False, True])
def test_a_state_dict_with_the_official_keys(impl, export, arrays, source, tmp_path, merge):
    """test_both.py loads what Jittor writes with torch.load."""
    path = tmp_path / "export.pth"
    result = export("--init", source, "--export", path, *["--merge"] * merge)
    assert result.returncode == 0, result.stderr
    assert f"to {path}" in result.stdout
    model = models.overlock_xxt(num_classes=5, seed=2)
    if merge:
        model.reparam()
    expected, actual = checkpoint.model_arrays(model), weights.read_weights(path).arrays
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype and np.array_equal(actual[key], value), key
    if impl.name == "torch":
        state = impl.torch.load(path, weights_only=True)
        deployed = models.overlock_xxt(num_classes=5, deploy=merge)
        deployed.load_state_dict(state, strict=True)


def test_what_is_wrong_is_said(export, source, tmp_path):
    taken = tmp_path / "taken.pth"
    taken.write_text("mine")
    for options, words in (
        (["--export", "a.pth"], "needs the checkpoint to export; give it with --init"),
        (["--init", source, "--merge"], "--merge is for --export alone"),
        (["--init", source, "--export", taken], "exists; give another name"),
        (["--init", source, "--export", tmp_path / "a.npz"], "does not end in .pth"),
        (["--init", source, "--export", tmp_path / "a.onnx"], "onnx_export.py writes ONNX"),
        (["--init", source, "--export", tmp_path / "none" / "a.pth"], "there is no folder"),
        (["--init", tmp_path / "none", "--export", tmp_path / "a.pth"], "no checkpoint at"),
    ):
        result = export(*options)
        lines = [line for line in result.stderr.splitlines() if line.startswith("train.py: error")]
        assert result.returncode == 2 and len(lines) == 1 and words in lines[0], result.stderr
        assert "Traceback" not in result.stderr
    link = tmp_path / "link.pth"
    link.symlink_to("missing.pth")
    assert "exists" in export("--init", source, "--export", link).stderr and link.is_symlink()
    assert taken.read_text() == "mine" and not (tmp_path / "a.pth").exists()
