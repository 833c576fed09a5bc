"""Classify pictures by a checkpoint, ours or anybody's, in PyTorch.

    python torch_impl/predict.py photo.jpg folder/ --checkpoint logs/best_torch.safetensors

prints the five best classes of each image with their probabilities. jittor_impl/predict.py prints
the same from the same checkpoint.
"""

import csv
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

if not __package__:  # run as a file: the folder around it becomes a package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    __package__ = Path(__file__).resolve().parent.name
    __import__(__package__)

from .checkpoint import load_whole_model, read_checkpoint
from .class_names import read_class_names
from .errors import InputError
from .images import SUFFIXES, images_below, normalise, read_photo
from .kernels.device import memory_format
from .program import ArgumentParser, add_device_options, choose_device, number, run_program
from .progress import say

# Upstream's, for checkpoints that do not say what they were trained on.
IMG_SIZE, CROP_PCT = 224, 0.925


def make_parser():
    parser = ArgumentParser(prog="predict.py", description=__doc__.partition("\n")[0])
    add, count = parser.add_argument, number(int, 1)
    add("images", nargs="+", metavar="IMAGE", help="an image file, or a folder of them")
    checkpoint = "ours, official, timm's: docs/checkpoints.md"
    add("--checkpoint", type=Path, required=True, help=checkpoint)
    add("--use-ema", action="store_true", help="take a checkpoint's averaged weights (EMA)")
    names = (
        "list of class names (default: words.txt of the data that the checkpoint was trained on)"
    )
    add("--class-names", type=Path, metavar="FILE", help=names)
    size = f"side of what the network sees (default: as trained by train.py, else {IMG_SIZE})"
    add("--img-size", type=number(int, 1, maximum=8192), help=size)
    crop = f"share of the side that is cut out (default: as trained by train.py, else {CROP_PCT})"
    add("--crop-pct", type=number(float, 0.01, maximum=1), help=crop)
    add("--topk", type=count, default=5, help="classes to print (default: %(default)s)")
    add("-b", "--batch-size", type=count, default=32, help="images at a time (default: 32)")
    add("--json", action="store_true", help="print JSON")
    add("--csv", action="store_true", help="print CSV")
    add_device_options(parser)
    add("--no-progress", action="store_true", help="show no progress")
    return parser


def parse_args():
    parser = make_parser()
    args = parser.parse_args()
    if args.json and args.csv:
        parser.error("--json and --csv exclude one another; give one of them")
    return args


def find_images(paths):
    """The image files among `paths` and below the folders among them. Raises InputError."""
    images = []
    for text in paths:
        path = Path(text)
        if not text or not path.exists():  # Path("") would be the current folder
            raise InputError(f"no image or folder at {text or repr(text)}; check the path")
        found = images_below(path) if path.is_dir() else [path]
        if not found:
            raise InputError(f"no images in {path} (images end in {' '.join(SUFFIXES)})")
        images += found
    return images


def image_size(run, img_size=None, crop_pct=None):
    """(height, width, crop_pct) of the images that the network takes; `run` of its checkpoint."""
    height, width, crop = IMG_SIZE, IMG_SIZE, CROP_PCT
    if run:
        height, width, _ = run["data"]["image_shape"]
        # Images of one size are not cut.
        crop = run["args"]["crop_pct"] if run["args"].get("img_size") else 1
    if img_size:
        height = width = img_size
    return height, width, crop_pct or crop


def class_names(run, count, args):
    """Ids and names of the `count` classes, each None if it is not known."""
    classes = run["data"]["classes"] if run else None
    if args.class_names:
        return read_class_names(args.class_names, classes, count)
    try:
        path = Path(run["args"]["data_dir"]) / "words.txt" if run else None
        ids, names = read_class_names(path, classes, count) if path else (classes, None)
    except (InputError, OSError):
        return classes, None
    # A folder given by a relative path may be another one today: its list names these ids or none.
    return (classes, names) if ids == classes and names != classes else (classes, None)


@torch.no_grad()
def probabilities(model, images, args):
    """uint8 images (n, H, W, 3) -> (n, classes) float64."""
    images = torch.from_numpy(normalise(images)).to(args.device)
    logits = model(images).cpu().numpy().astype(np.float64)  # (n, classes)
    if not np.isfinite(logits).all():
        what = "computes numbers that are not finite: its run diverged"
        raise InputError(f"{args.checkpoint} {what}; give another one")
    return softmax(logits)


def softmax(logits):
    """(n, classes) -> (n, classes)"""
    exp = np.exp(logits - logits.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)


def best_classes(row, ids, names, topk):
    """The best classes of an image, best first, from its probabilities `row` (classes,)."""
    best = np.argsort(-row, kind="stable")[:topk].tolist()
    return [
        {
            "rank": rank,
            "index": index,
            "class": ids[index] if ids else None,
            "name": names[index] if names else None,
            "probability": round(row[index].item(), 4),
        }
        for rank, index in enumerate(best, 1)
    ]


def read_or_report(path, size):
    """The image at `path`, None after a line on stderr if it cannot be read."""
    try:
        return read_photo(path, *size)
    except InputError as error:
        say(f"predict.py: error: {error}", sys.stderr)


def predictions(model, paths, size, args):
    """Yield (path, probabilities) of each image, of one that cannot be read (path, None)."""
    hidden = args.no_progress or not sys.stderr.isatty()
    bar = tqdm(total=len(paths), desc="predicting", unit="image", leave=False, disable=hidden)
    with bar, ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), args.batch_size):
            batch = paths[start : start + args.batch_size]
            images = list(pool.map(lambda path: read_or_report(path, size), batch))
            known = [image for image in images if image is not None]
            rows = iter(probabilities(model, np.stack(known), args) if known else ())
            for path, image in zip(batch, images):
                yield path, None if image is None else next(rows)
            bar.update(len(batch))


def write_text(results):
    for path, classes in results:
        lines = [str(path)]
        for entry in classes:
            known = [entry["class"], entry["name"]]
            named = "  ".join(text for text in known if text) or f"class {entry['index']}"
            lines.append(f"  {entry['probability']:.4f}  {named}")
        say("\n".join(lines))


def write_csv(results):
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("image", "rank", "index", "class", "name", "probability"))
    for path, classes in results:
        writer.writerows((path, *entry.values()) for entry in classes)


def write_json(results):
    content = [{"image": str(path), "classes": classes} for path, classes in results]
    is_utf8 = "utf" in sys.stdout.encoding.lower()
    print(json.dumps(content, indent=2, ensure_ascii=not is_utf8))


def predict(args):
    """Print the best classes of each image. Exits with status 2 if one could not be read."""
    choose_device(args)
    paths = find_images(args.images)
    arrays, _, run, notes = read_checkpoint(args.checkpoint, args.use_ema)
    model, _ = load_whole_model(arrays, args.checkpoint)
    model.to(args.device, memory_format=memory_format(args.device))
    ids, names = class_names(run, model.num_classes, args)
    size = image_size(run, args.img_size, args.crop_pct)
    for note in notes:
        say(note, sys.stderr)
    model.eval()
    model.reparam()
    unread = []

    def results():
        for path, row in predictions(model, paths, size, args):
            if row is None:
                unread.append(path)
            else:
                yield path, best_classes(row, ids, names, args.topk)

    write = write_json if args.json else write_csv if args.csv else write_text
    write(results())
    if unread:
        sys.exit(2)


def main():
    args = parse_args()
    run_program("predict.py", predict, args)


if __name__ == "__main__":
    main()
