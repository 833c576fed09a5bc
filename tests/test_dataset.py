"""Reading TinyImageNet and data sets like it: layouts, checks, batches."""

import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from under_test import module

InputError = module("errors").InputError
reader = module("dataset")
TinyImageNet, load = reader.TinyImageNet, reader.load
MEAN, STD = module("images").MEAN, module("images").STD


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


# What people's folders hold besides


def images(folder):
    return sorted(path for path in folder.iterdir() if path.suffix == ".JPEG")


def sort_validation(root, inner="", below=""):
    """Move the validation images to root/val/<inner>/<class>/<below>, as many scripts do."""
    for path in images(root / "val" / "images"):
        folder = root / "val" / inner / path.name.split("_")[1] / below
        folder.mkdir(parents=True, exist_ok=True)
        path.rename(folder / path.name)


def assert_same(splits, expected):
    for split, other in zip(splits, expected):
        assert split.classes == other.classes and np.array_equal(split.labels, other.labels)
        assert np.array_equal(split.images, other.images)


def save(path, pixels, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize(
    "junk",
    [
        *(".DS_Store", "Thumbs.db", "THUMBS.DB", "desktop.ini", "._n01_0.JPEG", "notes.txt"),
        *(".ipynb_checkpoints/n01_0.JPEG", "__MACOSX/n01_0.JPEG", "@eaDir/n01_0.JPEG"),
    ],
)
def test_stray_files_are_no_images_and_no_classes(dataset, broken, junk, sort):
    if sort:
        sort_validation(broken)
    for folder in [broken, *(path for path in broken.rglob("*") if path.is_dir())]:
        (folder / junk).parent.mkdir(exist_ok=True)
        (folder / junk).write_bytes(b"no image")
    assert_same(load(broken, 3, 12, 6), load(dataset, 3, 12, 6))
    with pytest.raises(InputError, match="has 3 classes"):
        load(broken, 4, 1, 1)


@pytest.mark.parametrize("annotations", [True, False])
@pytest.mark.parametrize("inner", ["", "images"])
@pytest.mark.parametrize("below", ["", "images"])
def test_validation_images_in_class_folders(dataset, broken, annotations, inner, below):
    sort_validation(broken, inner, below)
    (broken / "val" / "images").mkdir(exist_ok=True)  # scripts leave it, empty
    if not annotations:
        (broken / "val" / "val_annotations.txt").unlink()
    # The annotations of `dataset` are in the order of the names.
    assert_same(load(broken, 3, 12, 6), load(dataset, 3, 12, 6))


def test_annotated_images_that_lie_flat_come_as_annotated(dataset, broken):
    path = broken / "val" / "val_annotations.txt"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    expected = load(dataset, 3, 12, 6)[1].images.reshape(3, 6, 64, 64, 3)[:, ::-1]
    for flat in (False, True):
        if flat:  # right below val/
            for image in images(broken / "val" / "images"):
                image.rename(broken / "val" / image.name)
        val = load(broken, 3, 12, 6)[1]
        assert np.array_equal(val.images.reshape(expected.shape), expected)


def test_any_data_set_in_class_folders(tmp_path):
    """Names in Chinese and with spaces, all suffixes in any case, sizes that are not square."""
    classes = ["a cat", "dog.v2", "狗 二"]
    names = ["1.JPG", "2.Jpeg", "3.png", "4.BMP", "图 5.WebP"]
    for split, folder in enumerate(("train", "val")):
        for label, wnid in enumerate(classes):
            for i, name in reversed(list(enumerate(names))):
                path = tmp_path / "my data" / folder / wnid / name
                save(path, np.full((24, 40, 3), 100 * split + 30 * label + 5 * i, np.uint8))
    train, val = load(tmp_path / "my data", 3, 5, 4)
    assert train.classes == classes and val.images.shape == (12, 24, 40, 3)
    expected = [30 * label + 5 * i for label in range(3) for i in range(5)]
    assert abs(train.images.mean((1, 2, 3)) - expected).max() < 2
    expected = [100 + 30 * label + 5 * i for label in range(3) for i in range(4)]
    assert abs(val.images.mean((1, 2, 3)) - expected).max() < 2


def test_links_to_folders_and_images_are_followed(dataset, broken):
    def link(path, target):
        path.rename(target)
        path.symlink_to(target)

    link(broken / "train" / "n01" / "images" / "n01_3.JPEG", broken / "image")
    link(broken / "train" / "n02", broken / "class")
    link(broken / "train", broken / "linked train")
    link(broken / "val", broken / "linked val")
    assert_same(load(broken, 3, 12, 6), load(dataset, 3, 12, 6))


@pytest.mark.parametrize("name", ["train/n02", "train/n01/images/n01_3.JPEG"])
def test_link_that_leads_nowhere_is_named(broken, name):
    path = broken / name
    path.rename(broken / "elsewhere")
    path.symlink_to(broken / "gone")
    with pytest.raises(InputError, match=re.escape(str(path))):
        load(broken, 2, 12, 6)


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_annotations_written_on_windows(dataset, broken, bom, end):
    path = broken / "val" / "val_annotations.txt"
    path.write_bytes(bom + path.read_bytes().replace(b"\n", end) + end)
    assert_same(load(broken, 3, 12, 6), load(dataset, 3, 12, 6))


def test_annotations_in_another_encoding(broken):
    path = broken / "val" / "val_annotations.txt"
    path.write_text(path.read_text(), encoding="utf-16")
    with pytest.raises(InputError, match="val_annotations.txt is not .* UTF-8; save it"):
        load(broken, 3, 12, 6)


def test_class_name_in_another_encoding(broken):
    name = b"\xb9\xb7"  # GBK, as of an archive from a Chinese Windows
    os.mkdir(os.path.join(os.fsencode(broken / "train"), name))
    with pytest.raises(InputError, match="not UTF-8; rename") as caught:
        load(broken, 3, 12, 6)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("inner", ["", "images"])
def test_validation_class_folder_that_is_missing(broken, inner):
    sort_validation(broken, inner)
    shutil.rmtree(broken / "val" / inner / "n02")
    assert load(broken, 1, 12, 6)[1].classes == ["n01"]
    with pytest.raises(InputError, match="n02 is missing: .*; add it") as caught:
        load(broken, 3, 12, 6)
    assert str(broken / "val" / inner / "n02") in str(caught.value)


def test_validation_images_without_annotations_and_class_folders(broken):
    (broken / "val" / "val_annotations.txt").unlink()
    with pytest.raises(InputError, match="val_annotations.txt is missing, .*val/n01; add either"):
        load(broken, 3, 12, 6)


def test_training_images_without_class_folders(broken):
    shutil.rmtree(broken / "train")
    save(broken / "train" / "1.png", noise(0, 64, 64, 3))
    with pytest.raises(InputError, match="train has no class folders; sort"):
        load(broken, 3, 12, 6)


@pytest.mark.parametrize(
    "mode, suffix",
    [
        *(("L", "png"), ("L", "JPEG"), ("1", "png"), ("P", "png"), ("RGBA", "png"), ("LA", "png")),
        *(("RGBA", "webp"), ("CMYK", "JPEG"), ("P", "bmp"), ("RGB", "png")),
    ],
)
def test_images_of_any_mode_become_rgb_as_pillow_converts_them(broken, mode, suffix):
    """As the loaders of timm and torchvision do."""
    (broken / "train" / "n01" / "images" / "n01_0.JPEG").unlink()
    path = broken / "train" / "n01" / "images" / f"n01_0.{suffix}"
    save(path, noise(0, 64, 64, 4 if mode in ("RGBA", "LA") else 3), mode)
    with Image.open(path) as image:
        assert image.mode == mode
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(load(broken, 1, 12, 6)[0].images[0], expected)


@pytest.mark.filterwarnings("error")
def test_palette_with_transparency_becomes_rgb(broken):
    path = broken / "train" / "n01" / "images" / "n01_0.png"
    palette = Image.fromarray(noise(0, 64, 64, 3)).quantize(16)
    palette.save(path, transparency=bytes(range(0, 256, 16)))
    path.rename(path.with_suffix(".JPEG"))
    assert np.array_equal(load(broken, 1, 12, 6)[0].images[0], np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("mode, format", [("I;16", "PNG"), ("I;16B", "TIFF"), ("I", "TIFF")])
def test_16_bit_images_are_scaled_to_8_bits(broken, mode, format):
    ramp = np.arange(64 * 64).reshape(64, 64) * 16
    path = broken / "train" / "n01" / "images" / "n01_0.JPEG"
    types = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}
    Image.fromarray(ramp.astype(types[mode])).save(path, format)
    with Image.open(path) as image:
        assert image.mode == mode
    image = load(broken, 1, 12, 6)[0].images[0]
    assert np.array_equal(image, np.repeat((ramp // 256)[..., None], 3, axis=2))


# Advice, followed


def follow(message):
    """Run the command that a message ends with in a shell, as its reader would."""
    command = str(message).split(": ")[-1]
    return subprocess.run(command, shell=True, capture_output=True, text=True)


@pytest.fixture(params=["tiny", "a folder with 'quotes' 和 spaces"])
def own(broken, request, monkeypatch):
    """The data set under a name of the user's, who works in another folder."""
    monkeypatch.chdir(broken.parent)
    return broken.rename(broken.parent / request.param).relative_to(broken.parent)


@pytest.mark.parametrize("sort", [False, True])
def test_advice_on_a_broken_image_lists_every_one(own, sort):
    if sort:
        sort_validation(own)
    paths = [
        *images(own / "train" / "n01" / "images")[2:4],
        list(own.glob("val/**/*n03_1.JPEG"))[0],
    ]
    for path in paths:
        path.write_bytes(path.read_bytes()[:1200])
    with pytest.raises(InputError, match="truncated.*; replace it") as caught:
        load(own, 3, 12, 6)
    result = follow(caught.value)
    assert result.returncode == 2 and "3 broken" in result.stdout
    assert [str(path) in line for path, line in zip(paths, result.stderr.splitlines())] == [
        True
    ] * 3
    for path in paths:
        shutil.copy(own / "train" / "n01" / "images" / "n01_9.JPEG", path)
    load(own, 3, 12, 6)
    assert follow(caught.value).returncode == 0


def test_advice_on_sizes_lists_every_other_size(own):
    odd = own / "train" / "n02" / "images" / "n02_3.JPEG", own / "val" / "images" / "val_n03_1.JPEG"
    for path in odd:
        Image.open(path).resize((32, 48)).save(path)
    with pytest.raises(InputError, match="n02_3.JPEG is 32x48 pixels, .* 64x64; resize") as caught:
        load(own, 3, 12, 6)
    result = follow(caught.value)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 2
    assert all(f"{path} is 32x48 pixels" in result.stderr for path in odd)


def test_advice_on_splits_of_two_sizes_lists_the_smaller_split(own):
    for path in images(own / "val" / "images"):
        Image.open(path).resize((32, 48)).save(path)
    said = "training images are 64x64 pixels, validation images 32x48; resize"
    with pytest.raises(InputError, match=said) as caught:
        load(own, 3, 12, 6)
    result = follow(caught.value)
    assert result.returncode == 2 and result.stderr.count("is 32x48 pixels") == 18


@pytest.mark.parametrize("split", ["train", "val"])
def test_advice_on_a_class_without_images_counts_each_class(own, split):
    sort_validation(own)
    for path in (own / split / "n02").rglob("*.JPEG"):
        path.rename(path.with_suffix(".tif"))
    with pytest.raises(InputError, match=r"0 .* of class n02, .* \.webp\)") as caught:
        load(own, 3, 12, 6)
    result = follow(caught.value)
    counts = {"train": "n02  train    0  val   6", "val": "n02  train   12  val   0"}
    assert result.returncode == 2 and counts[split] in result.stdout
    assert "n02" in result.stderr


def test_advice_on_an_annotated_image_that_is_missing_lists_every_one(own):
    for name in ("val_n01_2.JPEG", "val_n03_4.JPEG"):
        (own / "val" / "images" / name).unlink()
    with pytest.raises(InputError, match="val_n01_2.JPEG") as caught:
        load(own, 3, 12, 6)
    result = follow(caught.value)
    assert "'val_n01_2.JPEG', 'val_n03_4.JPEG'" in result.stderr and result.returncode == 2


def test_advice_on_numbers_names_the_largest_that_works(broken):
    """Class folders of other data sets have unequal numbers of images."""
    sort_validation(broken)
    for path in [*images(broken / "train" / "n01" / "images")[9:], *broken.glob("val/n02/*_[45]*")]:
        path.unlink()
    for path in images(broken / "train" / "n03" / "images")[7:]:
        path.unlink()
    options = {"--num-classes": 20, "--train-per-class": 500, "--val-per-class": 50}
    for _ in options:
        with pytest.raises(InputError) as caught:
            load(broken, *options.values())
        option, value = re.search(r"; lower (--\S+) to (\d+)$", str(caught.value)).groups()
        options[option] = int(value)
    assert list(options.values()) == [3, 7, 4]
    load(broken, *options.values())


@pytest.mark.parametrize("given", [".", "tiny/train"])
@pytest.mark.parametrize("inside", [False, True])
def test_folder_above_or_below_the_data_set(broken, given, inside, monkeypatch):
    if inside:
        monkeypatch.chdir(broken.parent / given)
    with pytest.raises(InputError, match="lacks train/ and val/; give") as caught:
        load("." if inside else broken.parent / given, 3, 12, 6)
    load(str(caught.value).split(": ")[-1], 3, 12, 6)


def test_archive_given_as_folder(tmp_path):
    (tmp_path / "tiny.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match="tiny.zip .*lacks train/ and val/; give the folder"):
        load(tmp_path / "tiny.zip", 3, 12, 6)


def test_a_copy_without_prepare_does_not_advise_it(broken, monkeypatch):
    monkeypatch.setattr(reader, "PREPARE", broken / "data" / "prepare.py")
    (broken / "train" / "n01" / "images" / "n01_3.JPEG").write_bytes(b"")
    with pytest.raises(InputError, match="not an image.; replace it$"):
        load(broken, 3, 12, 6)
