"""TinyImageNet in memory: read once, checked before training, then batches by seed and epoch.

Nothing here depends on a framework: both implementations get the same NumPy arrays, bit by bit.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm
from .errors import InputError

MEAN = np.array((0.485, 0.456, 0.406), np.float32)  # of ImageNet, RGB, pixels in 0..1
STD = np.array((0.229, 0.224, 0.225), np.float32)


class TinyImageNet:
    """One split of the data set.

    `images` (N, H, W, 3) uint8, `labels` (N,) int64, `classes` the WordNet ids in sorted order.
    """

    def __init__(self, paths, labels, classes, progress):
        self.images = decode(paths, progress)
        self.labels = np.array(labels, np.int64)
        self.classes = classes

    def __len__(self):
        return len(self.labels)

    def batches(self, batch_size, seed=None, epoch=None):
        """Yield images (n, 3, H, W) float32, normalised, and labels (n,).

        With a seed: shuffled, half of the images flipped left to right, by NumPy's
        default_rng([seed, epoch]). Without: in order, unflipped. The last batch may be smaller.
        """
        order = np.arange(len(self))
        flip = np.zeros(len(self), bool)
        if seed is not None:
            generator = np.random.default_rng([seed, epoch])
            order = generator.permutation(len(self))
            flip = generator.random(len(self)) < 0.5
        for start in range(0, len(self), batch_size):
            images = self.images[order[start : start + batch_size]]  # (n, H, W, 3)
            flipped = flip[start : start + batch_size]
            images[flipped] = images[flipped, :, ::-1]
            yield normalise(images), self.labels[order[start : start + batch_size]]


def normalise(images):
    """(n, H, W, 3) uint8 -> (n, 3, H, W) float32, where ImageNet has mean 0 and deviation 1."""
    images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))  # (n, H, W, 3) -> (n, 3, H, W)
    scale = (1 / (255 * STD)).reshape(1, 3, 1, 1)  # (3,) -> (1, 3, 1, 1)
    shift = (MEAN / STD).reshape(1, 3, 1, 1)  # (3,) -> (1, 3, 1, 1)
    return images * scale - shift


def load(data_dir, num_classes, train_per_class, val_per_class, progress=True):
    """Read the first `num_classes` classes, in sorted order, of a folder in TinyImageNet's layout.

    Of each class, the first `train_per_class` and `val_per_class` images (by name; as annotated).
    Returns the training split, None for train_per_class=0, and the validation split. Raises
    InputError, naming the file.
    """
    data_dir = Path(data_dir)
    train_dir, val_dir = data_dir / "train", data_dir / "val"
    if not data_dir.is_dir():
        raise InputError(
            f"no data set at {data_dir}; python data/prepare.py downloads it, "
            "--data-dir names another place"
        )
    if not train_dir.is_dir() or not (val_dir / "val_annotations.txt").is_file():
        raise InputError(
            f"{data_dir} is not TinyImageNet: it lacks train/ or val/val_annotations.txt; "
            "python data/prepare.py makes the right layout"
        )
    folders = [p.name for p in train_dir.iterdir() if p.is_dir()]
    available = sorted(name for name in folders if not name.startswith("."))
    if num_classes > len(available):
        has = f"{train_dir} has {len(available)} classes"
        raise InputError(f"{has}, {num_classes} were asked for; lower --num-classes")
    classes = available[:num_classes]

    train_paths, val_paths = [], []
    annotated = read_annotations(val_dir)
    for wnid in classes:
        images = sorted(p for p in (train_dir / wnid / "images").glob("*") if p.is_file())
        what = f"training images in {train_dir / wnid}"
        train_paths.append(take(images, train_per_class, what, "--train-per-class"))
        images = annotated.get(wnid, [])
        what = f"validation images of class {wnid}"
        val_paths.append(take(images, val_per_class, what, "--val-per-class"))
    splits = []
    for paths in (train_paths, val_paths):
        labels = [label for label, images in enumerate(paths) for _ in images]
        paths = [path for images in paths for path in images]
        splits.append(TinyImageNet(paths, labels, classes, progress) if paths else None)
    train, val = splits
    if train and train.images.shape[1:] != val.images.shape[1:]:
        raise InputError(
            f"{data_dir}: training images are {train.images.shape[1:3]} pixels, validation images "
            f"{val.images.shape[1:3]}; python data/prepare.py --verify checks the data set"
        )
    return train, val


def take(images, count, what, option):
    """The first `count` of `images`."""
    if len(images) < count:
        verify = "python data/prepare.py --verify checks the data set"
        remedy = f"lower {option}" if images else verify
        raise InputError(f"{len(images)} {what}, {count} were asked for; {remedy}")
    return images[:count]


def read_annotations(val_dir):
    """{WordNet id: validation images, in the file's order}."""
    path = val_dir / "val_annotations.txt"
    annotated = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(
            f"{path} is not a text file; "
            "python data/prepare.py --zip FILE unpacks the data set again"
        ) from None
    for number, line in enumerate(lines, 1):
        fields = line.split("\t")  # file, class, left, top, right, bottom
        if not line.strip():
            continue
        has_box = len(fields) == 6 and all(f.strip().isdecimal() for f in fields[2:])
        if not has_box or not fields[0] or not fields[1]:
            raise InputError(
                f"{path}, line {number}: expected file, class and box separated by tabs, "
                f"got {line[:60]!r}; mend the line or unpack the data set again"
            )
        annotated.setdefault(fields[1], []).append(val_dir / "images" / fields[0])
    return annotated


def decode_one(path):
    """One image file -> (H, W, 3) uint8; greyscale becomes RGB."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:
        # Missing, truncated, no image: Pillow raises what its decoders happen to raise.
        content = "truncated" if "truncated" in str(error) else "not an image"
        reason = getattr(error, "strerror", None) or content
        raise InputError(
            f"cannot read image {path} ({reason}); replace it, or unpack the data set again "
            "(python data/prepare.py --verify lists every broken file)"
        ) from None


def decode(paths, progress):
    """Read image files -> (N, H, W, 3) uint8; all must have one size."""
    images = None
    pool = ThreadPoolExecutor()  # Pillow decodes outside Python's lock
    try:
        hidden = not progress or not sys.stderr.isatty()
        options = dict(desc="reading images", unit="image", leave=False, disable=hidden)
        bar = tqdm(pool.map(decode_one, paths), total=len(paths), **options)
        for i, image in enumerate(bar):
            if images is None:
                images = np.empty((len(paths), *image.shape), np.uint8)
            if image.shape != images.shape[1:]:
                raise InputError(
                    f"{paths[i]} is {image.shape[1]}x{image.shape[0]} pixels, "
                    f"the images before it are {images.shape[2]}x{images.shape[1]}; resize it"
                )
            images[i] = image
    finally:
        pool.shutdown(cancel_futures=True)  # an error or Ctrl-C does not wait for the rest
    return images
