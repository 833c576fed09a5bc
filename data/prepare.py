"""Prepare the images that train.py reads: TinyImageNet, or a small drawn set in the same layout.

    python data/prepare.py             download TinyImageNet and unpack it to data/tiny-imagenet-200
    python data/prepare.py --zip FILE  the same from an archive that is here already
    python data/prepare.py --sample    draw a small set to data/sample; needs no network
    python data/prepare.py --verify    decode every image and check every list

--verify takes whatever data set train.py takes, see docs/install.md. The others make the layout of
the official archive; the columns of its lists are separated by tabs:

    wnids.txt                          class id
    words.txt                          class id, name
    train/<wnid>/<wnid>_boxes.txt      file, left, top, right, bottom
    train/<wnid>/images/*.JPEG         64x64, RGB or greyscale
    val/val_annotations.txt            file, class id, left, top, right, bottom
    val/images/*.JPEG
"""

import argparse
import glob
import hashlib
import http.client
import os
import shutil
import stat
import sys
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))
from jittor_impl import dataset  # noqa: E402  # no framework: torch_impl has the same files
from jittor_impl.errors import InputError  # noqa: E402
from jittor_impl.images import decode_one, images_in, is_junk, size  # noqa: E402

ROOT = "tiny-imagenet-200"  # the folder inside the archive
URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
SIZE = 64  # pixels a side
CHUNK = 1 << 20  # bytes

# A class is the region where its function is positive, in units of the drawn radius. Every function
# changes by about 1 a unit, so that all edges are equally sharp.
SHAPES = {
    "disc": lambda x, y: 1 - np.hypot(x, y),
    "stripes": lambda x, y: np.minimum(1 - np.hypot(x, y), np.sin(9 * x) / 9),
    "cross": lambda x, y: np.minimum(
        0.3 - np.minimum(abs(x), abs(y)), 1 - np.maximum(abs(x), abs(y))
    ),
    "checkerboard": lambda x, y: np.minimum(1 - np.hypot(x, y), np.sin(7 * x) * np.sin(7 * y) / 7),
    "ring": lambda x, y: 0.2 - abs(np.hypot(x, y) - 0.8),
    "triangle": lambda x, y: 0.5 - np.maximum(y, abs(x) * 0.75**0.5 - y / 2),
    "square": lambda x, y: 0.8 - np.maximum(abs(x), abs(y)),
    "dots": lambda x, y: np.minimum(1 - np.hypot(x, y), (np.cos(9 * x) + np.cos(9 * y) - 0.6) / 9),
    "star": lambda x, y: 0.65 + 0.35 * np.cos(5 * np.arctan2(y, x)) - np.hypot(x, y),
    "crescent": lambda x, y: np.minimum(1 - np.hypot(x, y), np.hypot(x - 0.5, y) - 0.75),
}


@contextmanager
def progress(label, total, unit, start=0):
    """Yield a function that takes the amount just done and moves a bar from `start` to `total`.

    Where stderr is no terminal a bar would only fill a log file:
    there it is one line on stdout at either end.
    """
    if sys.stderr.isatty():
        with tqdm(desc=label, total=total, initial=start, unit=unit, unit_scale=unit == "B") as bar:
            yield bar.update
    else:
        print(f"{label} ...", flush=True)
        yield lambda amount: None
        print(f"{label}: done", flush=True)


def read_rows(folder, name, columns):
    """Read the tab-separated list `name` in `folder`.

    Returns its rows, each a list of `columns` str. Raises ValueError for a missing list, for a row
    of another length, and for a box that is not four whole numbers.
    """
    if not (folder / name).is_file():
        raise ValueError(f"{name} is missing")
    with (folder / name).open(encoding="utf-8-sig", errors="replace") as file:
        rows = [line.rstrip("\n").split("\t") for line in file if line.strip()]
    for number, row in enumerate(rows, 1):
        box = row[-4:] if columns > 4 else []
        if len(row) != columns or not all(value.isdecimal() for value in box):
            raise ValueError(f"{name} is malformed in line {number}")
    return rows


def survey(folder):
    """What train.py finds in `folder`, without opening an image.

    Returns (train, val, flat): {class: paths of its images} for training and for validation, and
    the folder where the validation images lie flat, None where they lie in class folders. Raises
    InputError where train.py does.
    """
    classes = dataset.find_classes(folder)
    train = {name: dataset.images_of(folder / "train" / name) for name in classes}
    place, annotated = dataset.find_validation(folder / "val", classes)
    if annotated is None:
        val = {path.name: dataset.images_of(path) for path in dataset.class_folders(place)}
        return train, {name: paths for name, paths in val.items() if paths}, None
    return train, {name: [place / file for file in annotated[name]] for name in annotated}, place


def some(names):
    """The first of a set of names, for a message."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, sorted(names)[:5])) + more


def check_wnids(folder, train):
    """Raise ValueError unless wnids.txt has the classes of train/."""
    wnids = [row[0] for row in read_rows(folder, "wnids.txt", 1)]
    odd = train.keys() ^ set(wnids)
    if odd:
        raise ValueError(f"wnids.txt and train/ disagree about class {some(odd)}")
    if len(wnids) > len(train):
        raise ValueError("wnids.txt repeats a line")


def check_words(folder, train):
    """Raise ValueError unless words.txt has each class; the official one has many more."""
    odd = train.keys() - {row[0] for row in read_rows(folder, "words.txt", 2)}
    if odd:
        raise ValueError(f"words.txt lacks class {some(odd)}")


def check_boxes(folder, wnid, images):
    """Raise ValueError unless all that the list of boxes names is among the paths `images`."""
    name = f"train/{wnid}/{wnid}_boxes.txt"
    lost = {row[0] for row in read_rows(folder, name, 5)} - {path.name for path in images}
    if lost:
        raise ValueError(f"{name} names {some(lost)}, which is missing")


def check_annotations(val, flat):
    """Raise ValueError unless val_annotations.txt has each image once; arguments as of survey()."""
    named = [path.name for paths in val.values() for path in paths]
    odd = {path.name for path in images_in(flat)} ^ set(named)
    if odd:
        raise ValueError(f"val_annotations.txt and {flat} disagree about {some(odd)}")
    if len(named) > len(set(named)):
        raise ValueError("val_annotations.txt repeats a line")


def check_classes(train, val, flat):
    """Raise ValueError unless each class has images in both splits; arguments as of survey()."""
    empty = {name for name, paths in train.items() if not paths}
    if empty:
        raise ValueError(f"there are no training images of class {some(empty)}")
    odd = train.keys() ^ val.keys()
    if odd:
        where = "val_annotations.txt" if flat else "val/"
        raise ValueError(f"train/ and {where} disagree about class {some(odd)}")


def problems(folder, found, complete=False):
    """Yield (what is wrong, what to do) where lists and images do not fit; `found` by survey().

    Lists that train.py does not read may be missing, unless the set has to be `complete`.
    """
    train, val, flat = found
    checks = [("wnids.txt", check_wnids, folder, train), ("words.txt", check_words, folder, train)]
    for wnid, images in train.items():
        checks.append((f"train/{wnid}/{wnid}_boxes.txt", check_boxes, folder, wnid, images))
    for name, check, *arguments in checks:
        if complete or (folder / name).exists():
            try:
                check(*arguments)
            except ValueError as error:
                yield str(error), "mend the list, or delete it: train.py does not read it"
    checks = [(check_annotations, val, flat)] if flat else []
    checks.append((check_classes, train, val, flat))
    for check, *arguments in checks:
        try:
            check(*arguments)
        except ValueError as error:
            yield str(error), "add or remove what differs"


def check_complete(folder):
    """Return survey(folder). Raises ValueError unless all lists are there and fit."""
    try:
        found = survey(folder)
    except InputError as error:
        # The folder may be staging()'s, whose name tells nobody anything.
        raise ValueError(str(error).replace(f"{folder}/", "")) from None
    for wrong, _ in problems(folder, found, complete=True):
        raise ValueError(wrong)
    return found


def summary(folder, train, val):
    """One line that says what lies in `folder`; `train` and `val` as from survey()."""
    training, validation = (sum(map(len, split.values())) for split in (train, val))
    return f"{folder}: {len(train)} classes, {training} training, {validation} validation images"


@contextmanager
def staging(target):
    """Yield a new folder beside `target`, renamed to it once it is filled and complete.

    So nothing unfinished ever bears the final name, whatever stops a run; the next run removes what
    a killed one left.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.part-*"):
        shutil.rmtree(leftover)
    folder = target.with_name(f".{target.name}.part-{os.getpid()}")
    folder.mkdir()
    try:
        yield folder
        check_complete(folder)
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_member(member):
    """Whether to unpack the ZipInfo `member`: not what systems leave in archives.

    Raises InputError unless it is a folder or a plain file, and lies inside ROOT, on every system.
    """
    name = member.filename
    parts = name.removesuffix("/").split("/")
    junk = any(map(is_junk, parts))
    portable = all(part.strip(" .") for part in parts) and not set("\\:") & set(name)
    inside = portable and (junk or parts[0] == ROOT and (len(parts) > 1 or member.is_dir()))
    kind = stat.S_IFMT(member.external_attr >> 16)
    # zipfile cuts a name at a NUL byte, and on Windows it turns backslashes:
    # a name that it changed is a trick.
    plain = name == member.orig_filename and kind in (0, stat.S_IFREG, stat.S_IFDIR)
    if not inside or not plain:
        raise InputError(
            f"the archive holds {member.orig_filename!r}, which is not a plain file "
            f"inside {ROOT}/; nothing was unpacked, use the official archive"
        )
    return not junk


def unpack(archive_file, target):
    """Unpack a TinyImageNet archive to the new folder `target`.

    Raises InputError, and leaves nothing behind, if the archive is damaged, is incomplete or
    reaches outside `target`.
    """
    try:
        with zipfile.ZipFile(archive_file) as archive:
            members = [member for member in archive.infolist() if check_member(member)]
            files = [member for member in members if not member.is_dir()]
            with staging(target) as folder, progress("unpacking", len(files), "file") as advance:
                for member in files:
                    path = folder.joinpath(*member.filename.split("/")[1:])
                    path.parent.mkdir(parents=True, exist_ok=True)
                    # "x" refuses a second member of the same name.
                    with archive.open(member) as source, path.open("xb") as copy:
                        shutil.copyfileobj(source, copy)
                    advance(1)
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"cannot unpack {archive_file} to {target} ({error}); "
            "check both paths and the free space"
        ) from error
    except Exception as error:
        # What check_complete() raises, and whatever zipfile raises: that depends on the damage.
        raise InputError(
            f"{archive_file} is damaged or no archive of TinyImageNet ({error}); "
            "use the official archive"
        ) from error


def md5(path):
    """The md5 sum of a file in hexadecimal digits."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_chunks(response):
    """Yield the body of an HTTP response in pieces. Raises InputError if it ends early."""
    try:
        while chunk := response.read(CHUNK):
            yield chunk
        if response.length:  # what was announced and has not come; read() itself is silent about it
            raise http.client.IncompleteRead(b"", response.length)
    except (OSError, http.client.HTTPException) as error:
        raise InputError(
            f"the download broke off ({error}); run the same command again to go on"
        ) from error


def download(part):
    """Append to the file `part` what it lacks of URL.

    Raises InputError if the server does not deliver it.
    """
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(URL, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except (OSError, http.client.HTTPException) as error:
        status = error.code if isinstance(error, urllib.error.HTTPError) else None
        if status == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing lies beyond what is here; its md5 sum will tell whether it is right
        raise InputError(
            f"cannot download {URL} ({error}); fetch it on another machine (248,100,043 bytes, "
            f"md5 {MD5}) and give it with --zip FILE, or draw a small set with --sample"
        ) from error
    # A server that ignores Range answers 200 and sends the file from its beginning.
    start = have if response.status == http.client.PARTIAL_CONTENT else 0
    total = start + response.length if response.length else None
    with (
        response,
        part.open("ab" if start else "wb") as file,
        progress("downloading", total, "B", start) as advance,
    ):
        for chunk in read_chunks(response):
            file.write(chunk)
            advance(len(chunk))


def download_and_unpack(target):
    """Make the official data set the new folder `target`.

    Its archive lies beside it until it is unpacked.
    """
    part = target.with_name(f"{ROOT}.zip.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    if not part.exists() or md5(part) != MD5:  # a whole one is left where only unpacking failed
        download(part)
        found = md5(part)
        if found != MD5:
            part.unlink()
            raise InputError(
                f"the download has md5 {found} instead of {MD5} and was removed; run the same "
                "command again, or fetch the archive in another way and give it with --zip FILE"
            )
    unpack(part, target)
    part.unlink()


def draw(shape, rng):
    """Draw one image of a class, a value of SHAPES; the NumPy generator `rng` decides the rest.

    Returns the RGB image and the box of the shape in pixels, both ends included:
    (left, top, right, bottom).
    """
    radius = rng.uniform(16, 26)
    centre_x, centre_y = rng.uniform(radius, SIZE - 1 - radius, size=2)
    y, x = np.mgrid[:SIZE, :SIZE]
    turned = (x - centre_x + 1j * (y - centre_y)) * np.exp(1j * rng.uniform(-0.5, 0.5)) / radius
    inside = np.clip(shape(turned.real, turned.imag) * radius + 0.5, 0, 1)

    # The shape is brighter than its ground in every channel, so that it also shows in a greyscale
    # file; one image in four is inverted. Neither colour nor brightness tells the class.
    ground = rng.uniform(10, 120, size=3)
    contrast = rng.uniform(70, 135, size=3)
    shade = rng.uniform(-0.5, 0.5) * (x - SIZE / 2) + rng.uniform(-0.5, 0.5) * (y - SIZE / 2)
    pixels = ground + inside[..., None] * contrast + shade[..., None]
    if rng.random() < 0.25:
        pixels = 255 - pixels
    pixels += rng.normal(0, rng.uniform(5, 15), size=pixels.shape)

    rows, columns = np.nonzero(inside > 0.5)
    box = columns.min(), rows.min(), columns.max(), rows.max()
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), box


def save_image(path, seed, split, label, number):
    """Draw image `number` of class `label` to the file `path`.

    `split` is 0 for training, 1 for validation. Returns its file name and box as a list of str. It
    does not depend on how many other images are drawn.
    """
    shape = list(SHAPES.values())[label]
    image, box = draw(shape, np.random.default_rng([seed, split, label, number]))
    if number % 16 == 7:  # the real set holds some greyscale files, too
        image = image.convert("L")
    image.save(path, "JPEG", quality=85)
    return [path.name, *map(str, box)]


def write_rows(path, rows):
    """Write lists of str as a tab-separated list."""
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8", newline="\n")


def draw_sample(target, classes, train, val, seed):
    """Draw `classes` classes (at most len(SHAPES)) to the new folder `target`.

    Each has `train` images for training and `val` for validation.
    """
    wnids = [f"n{label:08d}" for label in range(1, classes + 1)]
    with (
        staging(target) as folder,
        progress("drawing", classes * (train + val), "image") as advance,
    ):
        for label, wnid in enumerate(wnids):
            images = folder / "train" / wnid / "images"
            images.mkdir(parents=True)
            boxes = []
            for number in range(train):
                boxes.append(save_image(images / f"{wnid}_{number}.JPEG", seed, 0, label, number))
                advance(1)
            write_rows(folder / "train" / wnid / f"{wnid}_boxes.txt", boxes)

        images = folder / "val" / "images"
        images.mkdir(parents=True)
        annotations = []
        for number in range(val):
            for label, wnid in enumerate(wnids):
                path = images / f"val_{len(annotations)}.JPEG"
                name, *box = save_image(path, seed, 1, label, number)
                annotations.append([name, wnid, *box])
                advance(1)
        write_rows(folder / "val" / "val_annotations.txt", annotations)
        write_rows(folder / "wnids.txt", [[wnid] for wnid in wnids])
        write_rows(folder / "words.txt", zip(wnids, SHAPES))


def report(message):
    """Print an error on stderr, on one line whatever it quotes; spaces in paths stay."""
    print("prepare.py: error:", " ".join(message.splitlines()), file=sys.stderr)


def verify(folder):
    """Decode every image of the data set in `folder` and print the counts of each class.

    Returns the exit status: 2 after a line on stderr for each thing that is wrong, else 0. Raises
    InputError where it is no data set.
    """
    found = train, val, flat = survey(folder)
    wrong = [f"{folder}: {what}; {remedy}" for what, remedy in problems(folder, found)]
    images = [path for paths in train.values() for path in paths]
    images += images_in(flat) if flat else [p for paths in val.values() for p in paths]
    broken, sizes = {}, {}
    with progress("decoding", len(images), "image") as advance:
        for path in images:
            try:
                sizes[path] = size(decode_one(path))
            except InputError as error:
                broken[path] = str(error)
            advance(1)
    vary = len(set(sizes.values())) > 1
    if vary and dataset.is_tiny_imagenet(folder):
        ((usual, _),) = Counter(sizes.values()).most_common(1)
        for path, pixels in sizes.items():
            if pixels != usual:
                broken[path] = f"{path} is {pixels} pixels, most images are {usual}; resize it"
    for message in wrong + [broken[path] for path in images if path in broken]:
        report(message)
    for wnid in train:
        print(f"{wnid}  train {len(train[wnid]):4}  val {len(val.get(wnid, [])):3}")
    print(f"{summary(folder, train, val)}, {len(broken)} broken")
    if vary and not dataset.is_tiny_imagenet(folder):
        print("the images have several sizes: train with --img-size")
    return 2 if wrong or broken else 0


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors leave the way all others do."""

    def error(self, message):
        raise InputError(f"{message}; correct the command (--help lists the options)")


def at_least(low):
    """An argparse type for whole numbers from `low` on."""

    def number(text):
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is less than {low}")
        return int(text)

    return number


def parse_arguments(argv):
    """Read the command line. Raises InputError if it is wrong."""
    parser = Parser(
        prog="prepare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    task = parser.add_mutually_exclusive_group()
    task.add_argument(
        "--zip", metavar="FILE", type=Path, help="unpack this archive instead of downloading it"
    )
    task.add_argument("--sample", action="store_true", help="draw a small set")
    task.add_argument("--verify", action="store_true", help="check a data set that is there")
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help=f"folder of the data set (default: data/{ROOT}, or data/sample for --sample)",
    )
    parser.add_argument(
        "--sample-classes",
        metavar="N",
        type=int,
        choices=range(2, len(SHAPES) + 1),
        default=5,
        help=f"2 to {len(SHAPES)} classes in the sample (default: %(default)s)",
    )
    parser.add_argument(
        "--sample-train",
        metavar="N",
        type=at_least(1),
        default=64,
        help="training images of each class in the sample (default: %(default)s)",
    )
    parser.add_argument(
        "--sample-val",
        metavar="N",
        type=at_least(1),
        default=16,
        help="validation images of each class in the sample (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=at_least(0),
        default=0,
        help="the same seed draws the same sample (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    for name in ("sample_classes", "sample_train", "sample_val", "seed"):
        if not args.sample and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} needs --sample")
    return args


def run(args):
    """Do what the command line asks for; returns the exit status."""
    target = (args.output or DATA / ("sample" if args.sample else ROOT)).resolve()
    if args.verify:
        if not target.is_dir():
            raise InputError(
                f"{target} is missing or no folder; name the folder of a data set with --output, "
                "or leave --verify out to make it"
            )
        return verify(target)
    if target.exists():
        if args.zip or args.sample:
            raise InputError(
                f"{target} exists already; remove it first or name another folder with --output"
            )
        try:
            train, val, _ = check_complete(target)
        except ValueError as error:
            check = dataset.advice("to check it as train.py reads it", target, "--verify")
            raise InputError(
                f"{target} is not a complete TinyImageNet ({error}); move or remove it and run "
                f"the same command again{check}"
            ) from error
        print("already there:", summary(target, train, val))
        return 0
    if args.sample:
        draw_sample(target, args.sample_classes, args.sample_train, args.sample_val, args.seed)
    elif args.zip:
        unpack(args.zip, target)
    else:
        download_and_unpack(target)
    train, val, _ = survey(target)
    print(summary(target, train, val))
    return 0


def main(argv=None):
    """Run the command line; returns the exit status: 0, 2 after an error, 130 after Ctrl-C."""
    sys.stdout.reconfigure(errors="backslashreplace")  # for names that a terminal cannot show
    try:
        return run(parse_arguments(argv))
    except InputError as error:
        report(str(error))
    except OSError as error:
        report(f"{error}; check the path, its permissions and the free space")
    except KeyboardInterrupt:
        report("interrupted; run the same command again")
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
