"""torch_impl as ONNX and through torch.export: the same logits, for batches of any size."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from under_test import module, save_weights

ROOT = Path(__file__).resolve().parent.parent
checkpoint, models = module("checkpoint"), module("models")


@pytest.fixture(scope="module")
def model():
    """XXT with statistics as after training, merged."""
    torch.manual_seed(0)
    model = models.overlock_xxt(num_classes=20).eval()
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.add_(torch.rand_like(value))
        elif value.is_floating_point():
            value.add_(0.05 * torch.randn_like(value))
    model.reparam()
    return model


def logits(model, size, count):
    images = torch.from_numpy(np.random.default_rng(size).standard_normal((count, 3, size, size)))
    images = images.float()
    with torch.no_grad():
        return images, model(images)


@pytest.mark.parametrize("size", [64, 224])
def test_onnx_gives_the_same_logits(model, size):
    """64: maps of 4x4 and 2x2 are enlarged, and 9 -> 7 pooling has no operator in ONNX."""
    runtime = pytest.importorskip("onnxruntime")
    onnx_export = module("plugins.onnx_export")
    file = io.BytesIO()
    onnx_export.export_onnx(model, file, (size, size))
    session = runtime.InferenceSession(file.getvalue())
    for count in (1, 2, 5):
        images, expected = logits(model, size, count)
        (actual,) = session.run(None, {"images": images.numpy()})
        assert actual.shape == (count, 20)
        assert np.abs(actual - expected.numpy()).max() <= 1e-5 * max(1, expected.abs().max())


def test_the_program(tmp_path):
    onnx = pytest.importorskip("onnx")
    program, weights, file = ROOT / "torch_impl" / "plugins" / "onnx_export.py", "w", "a.onnx"
    arrays = checkpoint.model_arrays(models.overlock_xxt(num_classes=3))
    save_weights(tmp_path / weights, arrays)

    def run(*options):
        command = [sys.executable, program, *options]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    result = run(weights, file, "--img-size", "96")
    assert result.returncode == 0, result.stderr
    assert f"merged, for images of 96x96 pixels to {file}" in result.stdout
    written = onnx.load(tmp_path / file)
    onnx.checker.check_model(written, full_check=True)
    assert written.opset_import[0].version == 17
    (images,) = written.graph.input
    shape = [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim]
    assert shape == ["batch", 3, 96, 96]
    for options, words in (
        ((weights, file), "exists; give another name"),
        (("none", "b.onnx"), "no checkpoint"),
        ((program, "b.onnx"), "fetch it again"),
    ):
        result = run(*options)
        lines = result.stderr.splitlines()
        assert result.returncode == 2 and len(lines) == 1 and words in lines[0], result.stderr


@pytest.mark.filterwarnings("ignore:Node .* does not reference an nn.Module")
def test_torch_export(model):
    """In a process that computes before and after: no tensor of the tracing is kept."""
    images, _ = logits(model, 64, 2)
    batch = torch.export.Dim("batch", min=1, max=64)
    module("kernels.na2d_av_dense").tile_indices.cache_clear()
    program = torch.export.export(model, (images,), dynamic_shapes={"x": {0: batch}})
    for count in (1, 2, 5):
        images, expected = logits(model, 64, count)
        with torch.no_grad():
            actual = program.module()(images)
        # The exported program's operators are those of the model, but for their decomposition.
        assert (actual - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
