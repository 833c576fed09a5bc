"""visualize.py: the maps against their definitions, the program as its user runs it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from under_test import module, save_weights

ROOT = Path(__file__).resolve().parent.parent
checkpoint, models = module("checkpoint"), module("models")


@pytest.fixture(scope="module")
def visualize():
    pytest.importorskip("matplotlib")
    return module("visualize")


@pytest.fixture(scope="module")
def model():
    """XXT, its weights and statistics moved so that every part has a say."""
    model = models.overlock_xxt(num_classes=3)
    generator, arrays = np.random.default_rng(0), {}
    for key, value in checkpoint.model_arrays(model).items():
        noise = generator.standard_normal(value.shape) * 0.1
        noise = abs(noise) if key.endswith("running_var") else noise
        keep = key.endswith(("running_mean", "num_batches_tracked"))
        arrays[key] = value if keep else (value + noise).astype(value.dtype)
    checkpoint.load_model(model, arrays, "noise")
    model.eval()
    return model


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).standard_normal((2, 3, 64, 64)).astype(np.float32)


def test_grad_cam_is_its_definition(impl, visualize, model, images):
    """At stage 4, where the gradient is that of the head, by differences of its logits."""
    target = np.array([2, 0])
    logits, cams = visualize.grad_cam(model, images, target)
    shapes = {name: cam.shape[1:] for name, cam in cams.items()}
    assert list(shapes.values()) == [(16, 16), (8, 8), (4, 4), (2, 2), (2, 2)]
    np.testing.assert_allclose(logits, impl.numpy(model(impl.array(images))), rtol=1e-4, atol=1e-4)

    x4 = impl.numpy(visualize.maps_of(model, impl.array(images))["stage 4"][0])
    weights = np.zeros(x4.shape[:2])
    # The mean over a map of the gradient is the derivative along a shift of a whole channel, over
    # its pixels.
    step = 0.05
    for channel in range(x4.shape[1]):
        shifted = []
        for sign in (1, -1):
            moved = x4.copy()
            moved[:, channel] += sign * step
            shifted.append(impl.numpy(model.head(impl.array(moved)))[[0, 1], target, 0, 0])
        weights[:, channel] = (shifted[0] - shifted[1]) / (2 * step) / x4[0, 0].size
    expected = np.maximum((weights[:, :, None, None] * x4).sum(1), 0)
    assert expected.max() > 0
    np.testing.assert_allclose(cams["stage 4"], expected, atol=0.02 * expected.max())


def test_a_function_of_the_logits_chooses_the_class(visualize, model, images):
    logits, cams = visualize.grad_cam(model, images, lambda x: x.argmax(1))
    _, same = visualize.grad_cam(model, images, logits.argmax(1))
    _, other = visualize.grad_cam(model, images, (logits.argmax(1) + 1) % 3)
    assert all(np.array_equal(cams[name], same[name]) for name in cams)
    assert any(not np.allclose(cams[name], other[name]) for name in cams)


def test_receptive_fields_are_absolute_gradients(impl, visualize, model, images):
    """By differences, at a pixel in the middle and at one near the border; over both images."""
    fields = visualize.receptive_fields(model, images)
    assert [field.shape for field in fields.values()] == [(64, 64)] * 5
    middle = {"stage 1": slice(7, 9), "stage 3": slice(1, 3), "overview": slice(0, 2)}

    def scores(batch):
        maps = visualize.maps_of(model, impl.array(batch))
        found = {}
        for name, part in middle.items():
            values = [impl.numpy(x)[:, :, part, part] for x in maps[name]]
            found[name] = sum(x.astype(np.float64).sum((1, 2, 3)) for x in values)
        return found

    step = 0.05
    for y, x in ((31, 30), (20, 33)):
        total = dict.fromkeys(middle, 0.0)
        for colour in range(3):
            moved = [images.copy(), images.copy()]
            for sign, batch in zip((step, -step), moved):
                batch[:, colour, y, x] += sign
            high, low = (scores(batch) for batch in moved)
            for name in middle:
                total[name] += np.abs((high[name] - low[name]) / (2 * step)).sum()
        for name, value in total.items():
            assert fields[name][y, x] == pytest.approx(value, rel=0.1), name


def test_shares_of_the_image(visualize):
    share = visualize.figures.area_share
    point = np.zeros((64, 64))
    point[31:33, 31:33] = 1
    assert share(point, 0.99) == 4 / 64**2
    assert share(np.ones((64, 64)), 0.5) == (46 / 64) ** 2  # the first even side of half the area
    assert share(np.ones((65, 33)), 1.0) == 1
    corner = np.zeros((8, 8))
    corner[0, 0] = 1
    assert share(corner, 0.5) == 1


def test_mixed_kernels_are_what_contmix_applies(impl, visualize, model, images):
    """Kernels times windows of a block's values are the block's ContMix, at every pixel."""
    contmix = module("contmix")
    calls = visualize.contmix_arguments(model, images)
    assert list(calls) == ["sub_blocks3.0", "sub_blocks3.1", "sub_blocks3.2", "sub_blocks4.0"]
    assert visualize.models.contmix is contmix.contmix
    *arguments, value = calls["sub_blocks3.1"]
    _, small, large = map(impl.numpy, contmix.mixed_kernels(*arguments))
    expected, value = impl.numpy(contmix.contmix(*arguments, value)), impl.numpy(value)
    B, heads, H, W, _ = small.shape
    groups = value.reshape(B, 2, heads, -1, H, W)
    for y, x in ((0, 0), (4, 4), (H - 1, 2)):
        outputs = []
        for group, kernel in enumerate((small, large)):
            np.testing.assert_allclose(kernel.sum(-1), 1, rtol=1e-5)
            K = int(kernel.shape[-1] ** 0.5)
            top, left = (np.clip(i - K // 2, 0, n - K) for i, n in ((y, H), (x, W)))
            window = groups[:, group, :, :, top : top + K, left : left + K]
            weights = kernel[:, :, y, x].reshape(B, heads, 1, K, K)
            outputs.append((window * weights).sum((-1, -2)).reshape(B, -1))
        actual = np.concatenate(outputs, axis=1)
        np.testing.assert_allclose(actual, expected[:, :, y, x], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_weights(path, checkpoint.model_arrays(model))
    return path


@pytest.fixture
def run(impl, weights, dataset, tmp_path):
    def call(mode, *options):
        program = ROOT / f"{impl.name}_impl" / "visualize.py"
        common = ["--checkpoint", weights, "--img-size", 64, "--crop-pct", 1]
        command = [sys.executable, program, mode, "--output", tmp_path / "out", *common, *options]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True)

    return call


def test_the_figures_and_their_arrays(impl, visualize, run, dataset, tmp_path):
    from matplotlib.image import imread

    picture = dataset / "val" / "images" / "val_n02_1.JPEG"
    runs = {
        "cam": [picture, dataset / "train" / "n01" / "images", "--target", 1],
        "kernels": [picture, "--pixel", 3, 60, "--block", "sub_blocks4.0"],
    }
    for mode, options in runs.items():
        result = run(mode, *options)
        assert result.returncode == 0 and "Warning" not in result.stderr, result.stderr
        data = np.load(tmp_path / "out" / f"{mode}{impl.suffix}.npz")
        assert len(data["images"]) == (13 if mode == "cam" else 1)
        figure = imread(tmp_path / "out" / f"{mode}{impl.suffix}.png")
        assert min(figure.shape[:2]) > 200 and figure.std() > 0.1
    cam = np.load(tmp_path / "out" / f"cam{impl.suffix}.npz")
    assert (cam["target"] == 1).all() and (cam["true"] == -1).all()
    kernels = np.load(tmp_path / "out" / f"kernels{impl.suffix}.npz")
    assert kernels["small"].shape == (1, 5, 5) and kernels["affinity"].shape == (1, 7, 7)
    left, top, right, bottom = kernels["small window"]
    assert -0.5 <= left < 60 < right <= 63.5 and -0.5 <= top < 3 < bottom <= 63.5


def test_a_backbone_is_enough_without_classes(impl, run, model, dataset, tmp_path):
    arrays = checkpoint.model_arrays(model)
    backbone = {key: value for key, value in arrays.items() if "head." not in key}
    save_weights(tmp_path / "backbone", backbone)
    options = ["--checkpoint", tmp_path / "backbone"]
    picture = dataset / "val" / "images" / "val_n02_1.JPEG"
    assert run("kernels", picture, *options).returncode == 0
    result = run("cam", picture, *options)
    assert result.returncode == 2 and "without a classifier" in result.stderr


def test_bad_input_is_one_line(run, dataset, tmp_path, weights):
    picture = dataset / "val" / "images" / "val_n02_1.JPEG"
    for options, words in (
        (["cam"], "give images, or a data set with --data-dir"),
        (["cam", picture, "--target", "true"], "--target true needs labels"),
        (["cam", picture, "--target", 3], "--target 3 is no class; give predicted, true or 0 to 2"),
        (["kernels", picture, "--block", "blocks1.0"], "give one of sub_blocks3.0"),
        (["kernels", picture, "--pixel", 64, 0], "outside of the 64x64 image"),
        (["erf", "--data-dir", tmp_path / "none"], "no data set at"),
        (["cam", picture, "--output", ROOT / "plot.py"], "plot.py: File exists"),
    ):
        result = run(*options)
        lines = [line for line in result.stderr.splitlines() if line.startswith("visualize.py: ")]
        assert result.returncode == 2 and len(lines) == 1 and words in lines[0], result.stderr
        assert "Traceback" not in result.stderr
