"""Reading TinyImageNet: layout, checks, batches."""

import shutil

import numpy as np
import pytest
from PIL import Image
from under_test import module

InputError = module("errors").InputError
reader = module("dataset")
MEAN, STD, TinyImageNet, load = reader.MEAN, reader.STD, reader.TinyImageNet, reader.load


@pytest.fixture
def broken(dataset, tmp_path):
    """A copy of the data set, to be damaged."""
    shutil.copytree(dataset, tmp_path / "tiny")
    return tmp_path / "tiny"


def test_first_classes_in_sorted_order(dataset):
    train, val = load(dataset, 2, 5, 3)
    assert train.classes == ["n01", "n02"] and len(train) == 10 and len(val) == 6
    assert train.images.dtype == np.uint8 and train.images.shape == (10, 64, 64, 3)
    path = sorted((dataset / "train" / "n01" / "images").iterdir())[0]
    assert np.array_equal(train.images[0], np.asarray(Image.open(path).convert("RGB")))
    assert train.labels.tolist() == [0] * 5 + [1] * 5 and val.labels.tolist() == [0, 0, 0, 1, 1, 1]
    annotated = np.asarray(Image.open(dataset / "val" / "images" / "val_n02_0.JPEG"))
    assert np.array_equal(val.images[3], annotated)


def test_greyscale_files_become_rgb(dataset):
    train, _ = load(dataset, 3, 12, 6)
    grey = train.images[24]  # the first image of n03
    assert grey.shape == (64, 64, 3)
    assert (grey[..., 0] == grey[..., 1]).all() and (grey[..., 0] == grey[..., 2]).all()


def test_batches_are_a_formula_of_seed_and_epoch(dataset):
    train, val = load(dataset, 3, 12, 6)
    generator = np.random.default_rng([7, 2])
    order = generator.permutation(36)
    flip = generator.random(36) < 0.5
    batches = list(train.batches(16, seed=7, epoch=2))
    sizes = [len(labels) for _, labels in batches]
    assert sizes == [16, 16, 4]  # no batch is dropped, the last is smaller
    images = np.concatenate([images for images, _ in batches])
    assert images.dtype == np.float32 and images.shape == (36, 3, 64, 64)
    for position, (index, flipped) in enumerate(zip(order, flip)):
        pixels = train.images[index][:, ::-1] if flipped else train.images[index]
        expected = (pixels / 255 - MEAN) / STD
        assert np.abs(images[position] - expected.transpose(2, 0, 1)).max() < 1e-5
    assert np.array_equal(np.concatenate([labels for _, labels in batches]), train.labels[order])
    next_epoch = np.concatenate([images for images, _ in train.batches(16, seed=7, epoch=3)])
    assert not np.array_equal(images, next_epoch)
    again = np.concatenate([images for images, _ in train.batches(16, seed=7, epoch=2)])
    assert np.array_equal(images, again)  # a batch does not change the images in memory
    assert np.array_equal(np.concatenate([labels for _, labels in val.batches(5)]), val.labels)


def test_no_data(tmp_path):
    with pytest.raises(InputError, match="prepare.py"):
        load(tmp_path / "absent", 2, 1, 1)


def test_another_folder(tmp_path):
    with pytest.raises(InputError, match="not TinyImageNet"):
        load(tmp_path, 2, 1, 1)


@pytest.mark.parametrize(
    "numbers, option",
    [
        ((4, 1, 1), "--num-classes"),
        ((3, 13, 1), "--train-per-class"),
        ((3, 1, 7), "--val-per-class"),
    ],
)
def test_more_than_there_is(dataset, numbers, option):
    with pytest.raises(InputError, match=option):
        load(dataset, *numbers)


def test_class_without_images(broken):
    shutil.rmtree(broken / "train" / "n02" / "images")
    (broken / "train" / "n02" / "images").mkdir()
    with pytest.raises(InputError, match="0 training images in .*n02"):
        load(broken, 3, 1, 1)


# (content of the file, what is said of it); None: its first 1200 bytes
BROKEN_IMAGES = [(b"not an image", "not an image"), (b"", "not an image"), (None, "truncated")]


@pytest.mark.parametrize("content, reason", BROKEN_IMAGES)
def test_broken_image_is_named(broken, content, reason):
    path = broken / "val" / "images" / "val_n01_2.JPEG"
    path.write_bytes(path.read_bytes()[:1200] if content is None else content)
    with pytest.raises(InputError, match=reason) as caught:
        load(broken, 3, 12, 6)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_annotated_image_that_is_missing(broken):
    (broken / "val" / "images" / "val_n01_2.JPEG").unlink()
    with pytest.raises(InputError, match="val_n01_2.JPEG.*No such file"):
        load(broken, 3, 12, 6)


@pytest.mark.parametrize(
    "line",
    ["val_n01_2.JPEG n01 0 0 63 63", "val_n01_2.JPEG\tn01", "val_n01_2.JPEG\tn01\t0\t0\t63\tx"],
)
def test_malformed_annotation_line(broken, line):
    path = broken / "val" / "val_annotations.txt"
    lines = path.read_text().splitlines()
    lines[4] = line
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match="val_annotations.txt, line 5"):
        load(broken, 3, 12, 6)


def test_evaluation_reads_no_training_images(broken):
    (broken / "train" / "n01" / "images" / "n01_3.JPEG").write_text("broken")
    train, val = load(broken, 3, 0, 6)
    assert train is None and len(val) == 18


def test_damaged_image_of_another_format(broken):
    """Pillow's decoders raise more than OSError."""
    path = broken / "train" / "n01" / "images" / "n01_3.JPEG"
    Image.open(path).save(path, format="PNG")
    data = bytearray(path.read_bytes())
    data[40:60] = bytes(20)
    path.write_bytes(data)
    with pytest.raises(InputError, match="n01_3.JPEG"):
        load(broken, 3, 12, 6)


def test_loading_costs_at_most_5_percent_of_a_training_step():
    """XXT, batch 64, 64x64; the best of several, so that a busy machine does not decide."""
    import time

    train, model = module("train"), module("models").overlock_xxt(num_classes=20)
    data = object.__new__(TinyImageNet)
    generator = np.random.default_rng(0)
    data.images = generator.integers(0, 256, (640, 64, 64, 3)).astype(np.uint8)
    data.labels = np.zeros(640, np.int64)
    loading = []
    for epoch in range(5):
        start = time.perf_counter()
        batches = list(data.batches(64, seed=0, epoch=epoch))
        loading.append((time.perf_counter() - start) / len(batches))
    args = train.make_parser().parse_args(["--device", "cpu"])
    optimizer, training = train.make_optimizer(model, args), []
    model.train()
    for images, labels in batches[:5]:
        start = time.perf_counter()
        train.training_step(model, optimizer, images, labels, args)
        training.append(time.perf_counter() - start)
    assert min(loading) <= 0.05 * min(training), (min(loading), min(training))


def test_images_of_two_sizes(broken):
    path = broken / "train" / "n01" / "images" / "n01_3.JPEG"
    Image.open(path).resize((32, 64)).save(path)
    with pytest.raises(InputError, match="n01_3.JPEG is 32x64"):
        load(broken, 3, 12, 6)
