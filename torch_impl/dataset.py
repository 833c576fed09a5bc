"""The data set: found and checked before training, then batches by seed and epoch.

TinyImageNet, or images in class folders. Those of one size are kept in memory as they are; with
--img-size, photographs of any size are cropped anew in each epoch. Nothing here depends on a
framework: both implementations get the same NumPy arrays, bit by bit.
"""

import os
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from .errors import InputError
from .images import (
    SUFFIXES,
    centre_crop,
    count_bytes,
    decode,
    decode_each,
    decode_one,
    images_in,
    listed,
    normalise,
    size,
)
from .loader import Loader

PREPARE = Path(__file__).resolve().parent.parent / "data" / "prepare.py"
# TinyImageNet's part in the published experiment: classes, training and validation images of each.
PUBLISHED = 20, 500, 50
# What is drawn by (seed, epoch, image or batch, one of these); the order of images by seed, epoch.
TRANSFORM, ERASING, MIXUP = 1, 2, 3


def shuffled(count, seed, epoch, hflip):
    """The order of `count` images in an epoch, and which are flipped left to right.

    By NumPy's default_rng([seed, epoch]); in order, unflipped, without a seed.
    """
    if seed is None:
        return np.arange(count), np.zeros(count, bool)
    generator, flip = np.random.default_rng([seed, epoch]), np.zeros(count, bool)
    order = generator.permutation(count)
    flip[order] = generator.random(count) < hflip
    return order, flip


class Crops(NamedTuple):
    """How photographs of any size become images of one size, and who reads them."""

    img_size: int  # their side
    crop_pct: float  # in evaluation: the share of the resized image that is cut out
    transform: object  # augment.TrainTransform of training images; None: as in evaluation
    workers: int  # processes that read them
    cache_bytes: int  # memory in which decoded photographs may be kept


class TinyImageNet:
    """One split of the data set, in memory.

    `images` (N, H, W, 3) uint8, `labels` (N,) int64, `classes` the names of the class folders
    (TinyImageNet: WordNet ids) in sorted order. In training images are flipped with probability
    `hflip`, and `mixup`, an augment.Mixup, mixes batches, if it is set. share(n) are the places, in
    order, of the images that this process computes of a batch of n.
    """

    hflip, mixup, transform, share = 0.5, None, None, np.arange

    def __init__(self, paths, labels, classes, progress):
        self.images = decode(paths, progress)
        self.labels = np.array(labels, np.int64)
        self.classes = classes

    def __len__(self):
        return len(self.labels)

    @property
    def image_shape(self):
        return self.images.shape[1:]

    def batches(self, batch_size, seed=None, epoch=None):
        """Yield images (n, 3, H, W) float32, normalised, and labels (n,) or targets (n, classes).

        Those of training with a seed: shuffled, flipped, augmented. Without: in order, as they are.
        What an image looks like depends on seed, epoch and its place in the data set alone. The
        last batch may be smaller. Of each batch only the process's share comes, if it has one.
        """
        order, flip = shuffled(len(self), seed, epoch, self.hflip)
        mixes, places, shares = seed is not None and self.mixup, [], []
        for start in range(0, len(self), batch_size):
            batch = order[start : start + batch_size]
            share = self.share(len(batch))
            # Mixed with the batch reversed: those that are read are their own mirror image.
            read = np.union1d(share, len(batch) - 1 - share) if mixes else share
            if len(share):
                places.append(batch[read])
                shares.append(np.searchsorted(read, share))
        for number, images in enumerate(self.pixels(places, flip, seed, epoch)):
            labels = self.labels[places[number]]
            # As the official training does: mixed as pixels, then normalised, then erased.
            if mixes:
                generator = np.random.default_rng([seed, epoch, number, MIXUP])
                images, labels = self.mixup(images, labels, generator)
            if len(shares[number]) < len(images):
                images, labels = images[shares[number]], labels[shares[number]]
            images = normalise(images)
            if seed is not None and self.transform:
                for image, index in zip(images, places[number][shares[number]].tolist()):
                    generator = np.random.default_rng([seed, epoch, index, ERASING])
                    self.transform.erase(image, generator)
            yield images, labels

    def pixels(self, places, flip, seed, epoch):
        """Yield the images (n, H, W, 3) uint8 at each of `places`, arrays of n indices.

        flip (N,): which are flipped, where no transform is drawn by seed and epoch.
        """
        for place in places:
            images = self.images[place]
            flipped = flip[place]
            images[flipped] = images[flipped, :, ::-1]
            yield images


class ImageFolder(TinyImageNet):
    """One split of photographs of any size, cropped when they are needed, as `crops` says.

    Without a transform training images are cut as validation images are, and flipped.
    `cached`: whether they are decoded now, and not whenever they are needed.
    """

    def __init__(self, paths, labels, classes, progress, crops, cached):
        self.labels = np.array(labels, np.int64)
        self.classes = classes
        self.crops, self.transform = crops, crops.transform
        self.photos = list(decode_each(paths, progress, upright=True)) if cached else paths
        self.loader = Loader(self.read, self.image_shape, crops.workers)

    @property
    def image_shape(self):
        return self.crops.img_size, self.crops.img_size, 3

    def read(self, index, seed=None, epoch=None, flipped=False):
        """The image at `index` as it is in an epoch, or in evaluation, (H, W, 3) uint8."""
        photo = self.photos[index]
        photo = photo if isinstance(photo, np.ndarray) else decode_one(photo, upright=True)
        if seed is not None and self.transform:
            generator = np.random.default_rng([seed, epoch, index, TRANSFORM])
            return self.transform.augment(photo, generator)
        image = centre_crop(photo, self.crops.img_size, self.crops.img_size, self.crops.crop_pct)
        return image[:, ::-1] if flipped else image

    def pixels(self, places, flip, seed, epoch):
        """Yield the images (n, H, W, 3) uint8 at each of `places`, arrays of n indices.

        flip (N,): which are flipped, where no transform is drawn by seed and epoch.
        """
        return self.loader.batches(
            [[(index, seed, epoch, flip[index]) for index in place.tolist()] for place in places]
        )


def is_tiny_imagenet(data_dir):
    """Whether a folder has TinyImageNet's lists, not class folders alone."""
    lists = data_dir / "wnids.txt", data_dir / "val" / "val_annotations.txt"
    return any(path.exists() for path in lists)


def load(data_dir, num_classes, train_per_class, val_per_class, progress=True, crops=None):
    """Read the first `num_classes` classes, in sorted order, of a folder with train/ and val/.

    Of each class, the first `train_per_class` and `val_per_class` images, None for all: by name, or
    as annotated where validation images lie flat. Without `crops` all must have one size. Returns
    the training split, None for train_per_class=0, and the validation split. Raises InputError,
    naming the file.
    """
    data_dir = Path(data_dir)
    train_dir, val_dir = data_dir / "train", data_dir / "val"
    available = find_classes(data_dir)
    if num_classes > len(available):
        has = f"{train_dir} has {len(available)} classes"
        raise InputError(
            f"{has}, {num_classes} were asked for; lower --num-classes to {len(available)}"
        )
    classes = available[:num_classes]

    training = {name: images_of(train_dir / name) for name in classes}
    folder, annotated = find_validation(val_dir, classes)
    if annotated is None:
        for name in classes:
            if not (folder / name).is_dir():
                raise InputError(
                    f"{folder / name} is missing: each class of {train_dir} needs such a folder "
                    "with its validation images; add it"
                )
        validation = {name: images_of(folder / name) for name in classes}
    else:
        validation = {name: [folder / file for file in annotated.get(name, ())] for name in classes}
    check_counts(training, train_per_class, f"training images in {train_dir}", "train", data_dir)
    check_counts(validation, val_per_class, f"validation images in {val_dir}", "val", data_dir)

    splits, room = [], crops.cache_bytes if crops else 0
    try:
        for images_by_class, count in ((training, train_per_class), (validation, val_per_class)):
            taken = [images[:count] for images in images_by_class.values()]
            paths = [path for images in taken for path in images]
            labels = [label for label, images in enumerate(taken) for _ in images]
            if not paths:
                splits.append(None)
            elif crops is None:
                splits.append(TinyImageNet(paths, labels, classes, progress))
            else:
                needed = count_bytes(paths)
                cached = needed <= room
                room -= needed if cached else 0
                splits.append(ImageFolder(paths, labels, classes, progress, crops, cached))
        train, val = splits
        if train and train.image_shape != val.image_shape:
            raise InputError(
                f"{data_dir}: training images are {size(train.images[0])} pixels, validation "
                f"images {size(val.images[0])}; resize them to one size, or give --img-size"
            )
    except InputError as error:
        raise InputError(f"{error}{advice('to check every file', data_dir, '--verify')}") from None
    return train, val


def advice(purpose, data_dir, *options):
    """The text "; PURPOSE: COMMAND", a shell command that runs data/prepare.py on `data_dir`.

    It is empty where this folder was copied without data/prepare.py.
    """
    command = [sys.executable, os.path.relpath(PREPARE), *options, "--output", str(data_dir)]
    return f"; {purpose}: {shlex.join(command)}" if PREPARE.is_file() else ""


def images_of(folder):
    """Paths of the images of a class folder, by name: those in its images/, else its own."""
    return images_in(folder / "images") or images_in(folder)


def class_folders(folder):
    """Paths of the folders in `folder`, by name. Raises InputError for one that has no use."""
    for path in listed(folder):
        if path.is_symlink() and not path.exists():
            raise InputError(f"{path} is a link that leads nowhere; mend or remove it")
    folders = [path for path in listed(folder) if path.is_dir()]
    for path in folders:
        try:
            path.name.encode()
        except UnicodeEncodeError:  # unpacked under another encoding; a run's log is in UTF-8
            raise InputError(f"the name of {str(path)!r} is not UTF-8; rename it") from None
    return folders


def find_classes(data_dir):
    """The sorted names of the classes in data_dir/train.

    Raises InputError where there are none, and where train/ or val/ is missing.
    """
    if not data_dir.exists():
        download = advice("to download TinyImageNet to it", data_dir)
        raise InputError(f"no data set at {data_dir}; name its folder with --data-dir{download}")
    lacking = [f"{name}/" for name in ("train", "val") if not (data_dir / name).is_dir()]
    if lacking:
        # One folder too high or too low: archives are often unpacked into one more folder.
        near = [
            path
            for path in (*listed(data_dir), data_dir.resolve().parent)
            if (path / "train").is_dir() and (path / "val").is_dir()
        ]
        place = f": {shlex.quote(str(near[0]))}" if near else ""
        raise InputError(
            f"{data_dir} is not TinyImageNet and not laid out like it: it lacks "
            f"{' and '.join(lacking)}; give the folder that has train/ and val/{place}"
        )
    classes = [path.name for path in class_folders(data_dir / "train")]
    if not classes:
        raise InputError(
            f"{data_dir / 'train'} has no class folders; sort its images into one for each class"
        )
    return classes


def find_validation(val_dir, classes):
    """Where the validation images of `classes` lie: (folder, annotated).

    They lie flat in the folder, and `annotated` is read_annotations()'s; or the folder holds class
    folders, and it is None. Raises InputError where it is neither.
    """
    annotated = read_annotations(val_dir)
    files = {file for names in annotated.values() for file in names}
    for folder in (val_dir / "images", val_dir):
        if not files.isdisjoint(path.name for path in images_in(folder)):
            return folder, annotated
    for folder in (val_dir, val_dir / "images"):
        if any((folder / name).is_dir() for name in classes):
            return folder, None
    lists = "names none of its images" if annotated else "is missing"
    raise InputError(
        f"{val_dir / 'val_annotations.txt'} {lists}, and there are no class folders such as "
        f"{val_dir / classes[0]}; add either"
    )


def check_counts(images, count, what, option, data_dir):
    """Raise InputError unless each class has `count` images; `images` is {class: its images}.

    None for `count`: at least one.
    """
    name = min(images, key=lambda name: len(images[name]))
    have, count = len(images[name]), 1 if count is None else count
    if have < count:
        remedy = f"lower --{option}-per-class to {have}"
        if not have:
            add = f"add some (images end in {' '.join(SUFFIXES)})"
            remedy = add + advice("to count those of each class", data_dir, "--verify")
        raise InputError(f"{have} {what} of class {name}, {count} were asked for; {remedy}")


def read_annotations(val_dir):
    """{class: names of its validation images, in the file's order}; empty without the file."""
    path = val_dir / "val_annotations.txt"
    annotated = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # "-sig": Windows writes a BOM
    except FileNotFoundError:
        return annotated
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a text file in UTF-8; save it as one") from None
    for number, line in enumerate(lines, 1):
        fields = line.split("\t")  # file, class, left, top, right, bottom
        if not line.strip():
            continue
        has_box = len(fields) == 6 and all(f.strip().isdecimal() for f in fields[2:])
        if not has_box or not fields[0] or not fields[1]:
            raise InputError(
                f"{path}, line {number}: expected file, class and box separated by tabs, "
                f"got {line[:60]!r}; mend the line"
            )
        annotated.setdefault(fields[1], []).append(fields[0])
    return annotated
