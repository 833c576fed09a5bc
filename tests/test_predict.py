"""predict.py as its user runs it: any picture, any checkpoint, names, formats, bad input."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from under_test import module, save_weights

ROOT = Path(__file__).resolve().parent.parent
images, class_names, checkpoint, models = (
    module(name) for name in ("images", "class_names", "checkpoint", "models")
)
InputError = module("errors").InputError
SIZES = ["-b", 16, "--num-classes", 3, "--train-per-class", 12, "--val-per-class", 6]


def run(impl, program, *options, **how):
    command = [sys.executable, ROOT / f"{impl.name}_impl" / program, *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **how)


@pytest.fixture(scope="module")
def trained(impl, dataset, tmp_path_factory):
    """The checkpoint of a short run whose data set has names for its classes."""
    (dataset / "words.txt").write_text("n01\tred apple\nn02\tgreen pear\nn03\tblue sky\nn9\tx\n")
    output = tmp_path_factory.mktemp("trained")
    options = [*SIZES, "--data-dir", dataset, "--epochs", 2, "--lr", 1e-4, "--output", output]
    result = run(impl, "train.py", *options)
    assert result.returncode == 0, result.stderr
    return output / f"last{impl.suffix}.safetensors"


@pytest.fixture
def predict(impl, trained):
    def call(*options, checkpoint=trained, **how):
        return run(impl, "predict.py", *options, "--checkpoint", checkpoint, **how)

    return call


def error_lines(result):
    lines = result.stderr.splitlines()
    assert "Traceback" not in result.stderr, result.stderr
    return [line for line in lines if line.startswith("predict.py: error: ")]


def test_json_agrees_with_evaluation(impl, predict, trained, dataset):
    """Top-1 of --evaluate, from the same images; all classes, whose probabilities sum to 1."""
    result = predict(dataset / "val", "--json", "-b", 4)
    assert result.returncode == 0, result.stderr
    predicted = json.loads(result.stdout)
    assert len(predicted) == 18
    right = 0
    for entry in predicted:
        classes = entry["classes"]
        assert [one["rank"] for one in classes] == [1, 2, 3]
        probabilities = [one["probability"] for one in classes]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=3e-4)
        right += f"_{classes[0]['class']}_" in entry["image"]
    measured = run(
        impl, "train.py", *SIZES, "--data-dir", dataset, "--evaluate", trained, "--no-progress"
    )
    assert f"top-1 {right / 18:.4f}" in measured.stdout, (measured.stdout, right)
    named = {(one["index"], one["class"], one["name"]) for one in predicted[0]["classes"]}
    assert named == {(0, "n01", "red apple"), (1, "n02", "green pear"), (2, "n03", "blue sky")}


def test_text_and_csv_say_what_json_says(predict, dataset):
    picture = dataset / "val" / "images" / "val_n01_0.JPEG"
    (entry,) = json.loads(predict(picture, "--json", "--topk", 2).stdout)
    rows = list(csv.DictReader(io.StringIO(predict(picture, "--csv", "--topk", 2).stdout)))
    assert [row["image"] for row in rows] == [str(picture)] * 2
    for row, one in zip(rows, entry["classes"]):
        assert {key: row[key] for key in one} == {key: str(value) for key, value in one.items()}
    lines = predict(picture, "--topk", 2).stdout.splitlines()
    assert lines[0] == str(picture) and len(lines) == 3
    best = entry["classes"][0]
    assert lines[1].split() == [f"{best['probability']:.4f}", best["class"], *best["name"].split()]


def test_any_checkpoint(impl, predict, dataset, tmp_path):
    """One without a run knows no classes, and images are of 224 pixels; merged, EMA."""
    picture = dataset / "val" / "images" / "val_n01_0.JPEG"
    model = models.overlock_xxt(num_classes=7, seed=3)
    arrays = checkpoint.model_arrays(model)
    weights = tmp_path / "weights.safetensors"
    save_weights(weights, arrays)
    plain = predict(picture, checkpoint=weights)
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.count("class ") == 5
    merged = tmp_path / "merged.pth"
    result = run(impl, "train.py", "--init", weights, "--export", merged, "--merge")
    assert result.returncode == 0, result.stderr
    again = predict(picture, checkpoint=merged)
    assert [line[:8] for line in again.stdout.splitlines()[1:]] == [
        line[:8] for line in plain.stdout.splitlines()[1:]
    ]
    smaller = predict(picture, "--img-size", 64, "--crop-pct", 1, checkpoint=weights)
    assert smaller.returncode == 0 and smaller.stdout != plain.stdout
    backbone = {key: value for key, value in arrays.items() if "head." not in key}
    save_weights(weights, backbone)
    (line,) = error_lines(predict(picture, checkpoint=weights))
    assert "a backbone without a classifier" in line


@pytest.mark.parametrize(
    "options", [["--json", "--csv"], ["--crop-pct", 2], ["--topk", 0], ["--img-size", 10**20]]
)
def test_options_that_make_no_sense(predict, dataset, options):
    result = predict(dataset, *options)
    assert result.returncode == 2 and len(error_lines(result)) == 1


def test_bad_input_is_one_line_each(predict, dataset, tmp_path):
    picture = dataset / "val" / "images" / "val_n01_0.JPEG"
    for options, words in (
        ([tmp_path / "none.jpg"], "no image or folder at"),
        ([""], "no image or folder at ''"),
        ([tmp_path], "no images in"),
        ([picture, "--class-names", tmp_path / "none.txt"], "No such file"),
    ):
        result = predict(*options)
        (line,) = error_lines(result)
        assert words in line and result.returncode == 2 and not result.stdout
    result = predict(picture, checkpoint=tmp_path / "none.pth")
    assert result.returncode == 2 and "no checkpoint at" in error_lines(result)[0]


def test_a_broken_picture_stops_no_other(predict, dataset, tmp_path):
    good = dataset / "val" / "images" / "val_n01_0.JPEG"
    (tmp_path / "a.jpg").write_bytes(good.read_bytes()[:300])
    (tmp_path / "b.jpg").write_bytes(good.read_bytes())
    (tmp_path / "c.png").write_text("text")
    (tmp_path / ".DS_Store").write_text("text")
    result = predict(tmp_path, "--json")
    assert result.returncode == 2
    assert [Path(entry["image"]).name for entry in json.loads(result.stdout)] == ["b.jpg"]
    lines = error_lines(result)
    assert "a.jpg cannot be read" in lines[0] and "c.png cannot be read" in lines[1]
    assert len(lines) == 2


def test_photographs_are_turned_and_of_any_mode(tmp_path):
    """Width, height, EXIF orientation and mode of the file do not matter."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (40, 90, 3)).astype(np.uint8)
    expected = images.read_photo(save(Image.fromarray(pixels), tmp_path / "a.png"), 32, 32, 0.9)
    assert expected.shape == (32, 32, 3) and expected.dtype == np.uint8
    # Orientation 6: the camera was turned, so a viewer turns the picture 90 degrees clockwise.
    turned = Image.fromarray(np.rot90(pixels))
    exif = Image.Exif()
    exif[0x0112] = 6
    actual = images.read_photo(save(turned, tmp_path / "b.png", exif=exif), 32, 32, 0.9)
    assert np.array_equal(actual, expected)
    for mode in ("L", "P", "RGBA", "LA", "1", "CMYK", "I;16"):
        image = Image.fromarray(pixels)
        if mode == "I;16":
            image = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
        else:
            image = image.convert(mode)
        suffix = "jpg" if mode == "CMYK" else "png"
        photo = images.read_photo(save(image, tmp_path / f"c.{suffix}"), 20, 30, 1)
        assert photo.shape == (20, 30, 3) and photo.std() > 1


def save(image, path, **options):
    image.save(path, **options)
    return path


def test_a_strip_and_damaged_exif_are_pictures(tmp_path):
    """A strip of a pixel's width would be enlarged to gigabytes before its centre is cut out."""
    strip = np.zeros((60000, 1, 3), np.uint8)
    strip[30000:] = 200
    photo = images.read_photo(save(Image.fromarray(strip), tmp_path / "a.png"), 224, 224, 0.925)
    assert photo.shape == (224, 224, 3) and abs(int(photo.mean()) - 100) <= 1
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    damaged = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\xff\xff\0\0"
    path = save(Image.fromarray(pixels), tmp_path / "b.jpg", exif=damaged)
    assert images.read_photo(path, 32, 32, 1).shape == (32, 32, 3)


def test_each_orientation_is_pillows(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = save(Image.fromarray(pixels), tmp_path / "a.png", exif=exif)
        with Image.open(path) as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        assert np.array_equal(images.decode_one(path, upright=True), expected)


def test_folders_that_link_to_folders_around_them(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "picture.png").touch()
        (tmp_path / name / "up").symlink_to(tmp_path)
    found = images.images_below(tmp_path)
    assert [path.parent.name for path in found] == ["a", "b"]


def test_names_of_other_data_are_not_taken(predict, trained, dataset, tmp_path):
    """A list that was given and fits nothing is refused; one that was found is left alone."""
    picture = dataset / "val" / "images" / "val_n01_0.JPEG"
    other = tmp_path / "names.txt"
    other.write_text("n01440764 tench\nn01443537 goldfish\nn01484850 shark\n")
    (line,) = error_lines(predict(picture, "--class-names", other))
    assert "names none of the checkpoint's classes, such as n01" in line
    ours = (dataset / "words.txt").read_text()
    try:
        for text in (other.read_text(), "two\nlines\n", "\xff"):
            (dataset / "words.txt").write_text(text, encoding="latin-1")
            (entry,) = json.loads(predict(picture, "--json").stdout)
            assert {(one["class"], one["name"]) for one in entry["classes"]} == {
                ("n01", None),
                ("n02", None),
                ("n03", None),
            }
    finally:
        (dataset / "words.txt").write_text(ours)


def test_checkpoints_that_give_no_answer(predict, dataset, tmp_path):
    picture = dataset / "val" / "images" / "val_n01_0.JPEG"
    arrays = checkpoint.model_arrays(models.overlock_xxt(num_classes=3))
    grey = arrays["patch_embed1.0.weight"][:, :1]
    short = {key: value for key, value in arrays.items() if key != "blocks1.0.dwconv.bias"}
    for content, words in (
        (arrays | {"head.4.bias": np.full(3, np.nan, np.float32)}, "its run diverged"),
        (arrays | {"patch_embed1.0.weight": grey}, "takes images of 1 channels; give one for RGB"),
        (short, "the file is damaged; give another one"),
        (arrays | {"head.4.bias": np.zeros((), np.float32)}, "without a classifier"),
    ):
        save_weights(tmp_path / "file", content)
        result = predict(picture, checkpoint=tmp_path / "file")
        (line,) = error_lines(result)
        assert words in line and result.returncode == 2


def test_a_full_disk_is_named(impl, trained, dataset):
    program = ROOT / f"{impl.name}_impl" / "predict.py"
    words = [sys.executable, program, dataset / "val", "--checkpoint", trained, "--json"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(list(map(str, words)), stdout=full, stderr=-1, text=True)
    (line,) = error_lines(result)
    assert "standard output: No space left on device; make room" in line
    assert result.returncode == 2


IDS = ["n01440764", "n01443537", "n01484850"]


@pytest.mark.parametrize(
    "content, classes, expected",
    [
        ("n01443537\tgoldfish\nn01440764\ttench\nn9\tother\n", IDS[:2], ["tench", "goldfish"]),
        ("\ufeffn01440764 tench, Tinca\r\nn01443537 fish\r\n", None, ["tench, Tinca", "fish"]),
        ("tench\ngoldfish, carp\n", None, ["tench", "goldfish, carp"]),
        ("n01440764\nn01443537\n", None, ["n01440764", "n01443537"]),
        ('{"0": ["n01440764", "tench"], "1": ["n01443537", "fish"]}', None, ["tench", "fish"]),
        ('{"0": "tench", "1": "金鱼"}', None, ["tench", "金鱼"]),
        ('["tench", "fish"]', IDS[:2], ["tench", "fish"]),
    ],
)
def test_lists_of_class_names(tmp_path, content, classes, expected):
    path = tmp_path / "names"
    path.write_text(content, encoding="utf-8")
    ids, names = class_names.read_class_names(path, classes, 2)
    assert names == expected
    assert ids in (IDS[:2], None) and (ids or classes is None)


@pytest.mark.parametrize(
    "content, words",
    [
        ("tench\n", "names 1 classes and the checkpoint has 2"),
        ('{"a": 1}', "no JSON that lists class names"),
        ("[3", "no JSON that lists class names"),
        (b"\xff\xfe", "not a text file in UTF-8"),
    ],
)
def test_lists_that_do_not_fit(tmp_path, content, words):
    path = tmp_path / "names"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=words):
        class_names.read_class_names(path, None, 2)
