"""See what the network sees, in PyTorch: Grad-CAM, effective receptive fields, ContMix's kernels.

    python torch_impl/visualize.py cam photo.jpg folder/ --checkpoint logs/best_torch.safetensors
    python torch_impl/visualize.py erf --checkpoint logs/best_torch.safetensors
    python torch_impl/visualize.py kernels --samples 3 --checkpoint logs/best_torch.safetensors

writes cam_torch.png, erf_torch.png or kernels_torch.png into --output (logs/visual/), and the
arrays that it shows beside it as .npz. jittor_impl/visualize.py is the same program in Jittor;
`python plot.py --visual logs/visual` lays the two over each other.
"""

import io
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

if not __package__:  # run as a file: the folder around it becomes a package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    __package__ = Path(__file__).resolve().parent.name
    __import__(__package__)

from . import figures, models
from .checkpoint import load_whole_model, model_arrays, read_checkpoint, variant_of
from .contmix import contmix, mixed_kernels
from .dataset import Crops, find_classes, load
from .errors import InputError
from .images import centre_crop, normalise, read_photo
from .kernels.device import memory_format
from .predict import class_names, find_images, image_size, softmax
from .program import ArgumentParser, add_device_options, choose_device, number, run_program
from .progress import say
from .run_files import write_atomic
from .train import ROOT, check_classes

FRAMEWORK = "PyTorch"
SUFFIX = "_torch"
VAL_PER_CLASS = 50  # TinyImageNet's, where the checkpoint does not say how many it was measured on


def make_parser():
    parser = ArgumentParser(prog="visualize.py", description=__doc__.partition("\n")[0])
    modes = parser.add_subparsers(dest="mode", metavar="MODE", required=True)
    helps = {
        "cam": "Grad-CAM at the end of each stage and of the Overview-Net",
        "erf": "effective receptive fields, before training and after",
        "kernels": "the kernels that ContMix mixes at a pixel, and its affinities",
    }
    for mode, text in helps.items():
        sub = modes.add_parser(mode, help=text, description=text)
        add, count = sub.add_argument, number(int, 1)
        samples = dict(cam=4, erf=200, kernels=4)[mode]
        if mode != "erf":
            files = "image files and folders (default: --samples of the validation images)"
            add("images", nargs="*", metavar="IMAGE", help=files)
        add("--checkpoint", type=Path, required=True, help="ours, official, timm's")
        add("--use-ema", action="store_true", help="take a checkpoint's averaged weights (EMA)")
        data = "data set of --samples (default: the one that the checkpoint was trained on)"
        add("--data-dir", type=Path, help=data)
        drawn = "how many validation images are drawn (default: %(default)s)"
        add("--samples", type=count, default=samples, help=drawn)
        add("--seed", type=number(int, 0), default=0, help="of the draw (default: 0)")
        add("--class-names", type=Path, metavar="FILE", help="list of class names")
        add(
            "--img-size",
            type=number(int, 1, maximum=8192),
            help="side of what the network sees (default: as trained)",
        )
        add(
            "--crop-pct",
            type=number(float, 0.01, maximum=1),
            help="share of the side that is cut out",
        )
        output = "folder for the figure and its arrays (default: logs/visual)"
        add("--output", type=Path, default=ROOT / "logs" / "visual", help=output)
        add("-b", "--batch-size", type=count, default=16, help="images at a time (default: 16)")
        if mode == "cam":
            target = "whose map: predicted (default), true, or the index of a class"
            add("--target", default="predicted", help=target)
        if mode == "kernels":
            pixel = dict(type=number(int, 0), nargs=2, metavar=("Y", "X"))
            add("--pixel", **pixel, help="of the image (default: its centre)")
            block = "a block of Focus-Net (default: the last of stage 3)"
            add("--block", metavar="NAME", help=block)
        add_device_options(sub)
        add("--no-progress", action="store_true", help="show no progress")
    return parser


def choose_images(model, run, args):
    """The images to look at, (n, H, W, 3) uint8, and their labels (n,), -1 where unknown."""
    height, width, crop_pct = image_size(run, args.img_size, args.crop_pct)
    if vars(args).get("images"):
        paths = find_images(args.images)
        images = [read_photo(path, height, width, crop_pct) for path in paths]
        return np.stack(images), np.full(len(images), -1)
    if not args.data_dir and not run:
        unknown = f"{args.checkpoint} does not say what it was trained on"
        raise InputError(f"{unknown}; give images, or a data set with --data-dir")
    args.data_dir = args.data_dir or Path(run["args"]["data_dir"])
    args.num_classes = model.num_classes or len(find_classes(args.data_dir))  # of a backbone, all
    count = run["args"]["val_per_class"] if run else VAL_PER_CLASS
    photographs = not run or run["args"].get("img_size")  # of any size, and read one by one
    crops = Crops(height, crop_pct, None, 0, 0) if photographs else None
    _, val = load(args.data_dir, args.num_classes, 0, count, not args.no_progress, crops)
    check_classes(run, val, args, args.checkpoint)
    if args.samples > len(val):
        raise InputError(f"{args.data_dir} has {len(val)} validation images; lower --samples")
    chosen = np.random.default_rng(args.seed).choice(len(val), args.samples, replace=False)
    if crops:
        images = [val.read(index) for index in chosen]
    else:
        images = [centre_crop(image, height, width, crop_pct) for image in val.images[chosen]]
    return np.stack(images), val.labels[chosen]


def on_device(model, args):
    """The model in evaluation mode, where args.device says."""
    model.eval()
    return model.to(args.device, memory_format=memory_format(args.device))


def to_device(model, images):
    """A NumPy array as a tensor where the model is."""
    return torch.from_numpy(images).to(next(model.parameters()).device)


def batches(images, args):
    """Yield (slice, normalised images) with a progress bar."""
    hidden = args.no_progress or not sys.stderr.isatty()
    with tqdm(total=len(images), desc=args.mode, unit="image", leave=False, disable=hidden) as bar:
        for start in range(0, len(images), args.batch_size):
            part = slice(start, start + args.batch_size)
            yield part, normalise(images[part])
            bar.update(len(images[part]))


def maps_of(model, images):
    """The parts of each map of figures.MAPS: one, or in stage 3 the features and their context."""
    x1, x2, x3, ctx, x4, overview = model.stages(images)
    return dict(zip(figures.MAPS, ((x1,), (x2,), (x3, ctx), (x4,), (overview,))))


def grad_cam(model, images, target):
    """Grad-CAM (arXiv 1610.02391, section 3) at each of figures.MAPS, of the logits of a class.

    Args:
        model: in evaluation mode
        images: (n, 3, H, W)
        target: the class of each image (n,), or a function of the logits that returns it
    Returns:
        logits (n, classes) and {name of a map: (n, h, w)}
    """
    maps = maps_of(model, to_device(model, images))
    logits = model.head(maps["stage 4"][0]).flatten(1)  # (n, classes, 1, 1) -> (n, classes)
    values = logits.detach().cpu().numpy()
    target = target(values) if callable(target) else target
    score = (logits * to_device(model, np.eye(values.shape[1], dtype=np.float32)[target])).sum()
    parts = [part for group in maps.values() for part in group]
    gradients = iter(torch.autograd.grad(score, parts))
    cams = {}
    for name, group in maps.items():
        # The weight of a channel is its gradient's mean over the map, (n, C, 1, 1) (equation 1).
        weighted = [x * next(gradients).mean((2, 3), keepdim=True) for x in group]
        cam = sum(part.sum(1) for part in weighted)  # (n, C, h, w) -> (n, h, w)
        cams[name] = np.maximum(cam.detach().cpu().numpy(), 0)  # (equation 2)
    return values, cams


def receptive_fields(model, images):
    """Effective receptive field (arXiv 1701.04128) of each of figures.MAPS: {name: (H, W)}.

    The absolute gradient of the central pixel's sum over channels, summed over images and colours.
    Of a map of even size the four central pixels are summed.
    """
    images = to_device(model, images).requires_grad_()
    fields = {}
    maps = maps_of(model, images)
    for name, group in maps.items():
        height, width = group[0].shape[2:]
        rows = slice((height - 1) // 2, height // 2 + 1)
        columns = slice((width - 1) // 2, width // 2 + 1)
        score = sum(part[:, :, rows, columns].sum() for part in group)
        (gradient,) = torch.autograd.grad(score, [images], retain_graph=True)  # (n, 3, H, W)
        fields[name] = np.abs(gradient.cpu().numpy().astype(np.float64)).sum((0, 1))
    return fields


@torch.no_grad()
def contmix_arguments(model, images):
    """{name of a block of Focus-Net: the arguments of its contmix} for images (n, 3, H, W)."""
    calls = []

    def record(*arguments):
        calls.append(arguments)
        return contmix(*arguments)

    models.contmix = record
    try:
        model.stages(to_device(model, images))
    finally:
        models.contmix = contmix
    return dict(zip(focus_blocks(model), calls))


def focus_blocks(model):
    stages = ("sub_blocks3", "sub_blocks4")
    return [f"{stage}.{i}" for stage in stages for i in range(len(getattr(model, stage)))]


def show_cam(model, images, labels, run, args):
    """The arrays of cam.npz."""
    if args.target == "true" and (labels < 0).any():
        raise InputError("--target true needs labels, which single images have not; give a class")
    if args.target not in ("predicted", "true"):
        if not args.target.isdecimal() or int(args.target) >= model.num_classes:
            allowed = f"predicted, true or 0 to {model.num_classes - 1}"
            raise InputError(f"--target {args.target} is no class; give {allowed}")
        labels_of_target = np.full(len(images), int(args.target))
    else:
        labels_of_target = labels
    found = []
    for part, batch in batches(images, args):
        target = (lambda x: x.argmax(1)) if args.target == "predicted" else labels_of_target[part]
        found.append(grad_cam(model, batch, target))
    logits = np.concatenate([values for values, _ in found])
    predicted = logits.argmax(1)
    target = predicted if args.target == "predicted" else labels_of_target
    ids, names = class_names(run, model.num_classes, args)
    names = names or ids or [f"class {i}" for i in range(model.num_classes)]
    result = dict(images=images, true=labels, predicted=predicted, target=target, names=names)
    result["probabilities"] = softmax(logits)
    return result | {name: np.concatenate([c[name] for _, c in found]) for name in figures.MAPS}


def show_erf(model, images, labels, run, args):
    """The arrays of erf.npz: of the checkpoint, and of its initial weights."""
    seed = run["args"]["seed"] if run else 0
    variant = models.VARIANTS[variant_of(model_arrays(model))]
    initial = models.OverLoCK(**variant, num_classes=0, seed=seed)
    initial = on_device(initial, args)
    result = {"count": len(images)}
    for when, network in (("initial", initial), ("trained", model)):
        for _, batch in batches(images, args):
            for name, field in receptive_fields(network, batch).items():
                key = f"{when} {name}"
                result[key] = result.get(key, 0) + field / (3 * len(images))
    return result


@torch.no_grad()
def show_kernels(model, images, labels, run, args):
    """The arrays of kernels.npz."""
    height, width = images.shape[1:3]
    y, x = args.pixel or (height // 2, width // 2)
    blocks = focus_blocks(model)
    block = args.block or [name for name in blocks if name.startswith("sub_blocks3")][-1]
    if block not in blocks:
        named = f"give one of {', '.join(blocks)}"
        raise InputError(f"--block {block} is no block of Focus-Net; {named}")
    if y >= height or x >= width:
        raise InputError(f"--pixel {y} {x} is outside of the {height}x{width} image")
    result = dict(images=images, pixel=(y, x), block=block)
    found = []
    for _, batch in batches(images, args):
        *arguments, value = contmix_arguments(model, batch)[block]
        h, w = value.shape[2:]
        row, column = y * h // height, x * w // width
        affinity, small, large = mixed_kernels(*arguments)
        side = int(affinity.shape[3] ** 0.5)
        affinity = affinity[:, :, row * w + column].mean(1)  # (n, heads, S*S) -> (n, S*S)
        entry = {"affinity": affinity.cpu().numpy().reshape(-1, side, side)}
        for name, attn in (("small", small), ("large", large)):
            kernel = attn[:, :, row, column].mean(1).cpu().numpy()  # (n, heads, K*K) -> (n, K*K)
            K = int(kernel.shape[1] ** 0.5)
            entry[name] = kernel.reshape(-1, K, K)
            # The window's first row and column, at the borders shifted; in pixels of the image.
            top, left = (np.clip(i - K // 2, 0, n - K) for i, n in ((row, h), (column, w)))
            edges = np.array([left / w, top / h, (left + K) / w, (top + K) / h])
            result[f"{name} window"] = edges * [width, height, width, height] - 0.5
        found.append(entry)
    return result | {key: np.concatenate([entry[key] for entry in found]) for key in found[0]}


SHOW = {"cam": show_cam, "erf": show_erf, "kernels": show_kernels}


def visualize(args):
    choose_device(args)
    arrays, _, run, notes = read_checkpoint(args.checkpoint, args.use_ema)
    model, _ = load_whole_model(arrays, args.checkpoint, needs_classifier=args.mode == "cam")
    model = on_device(model, args)
    images, labels = choose_images(model, run, args)
    args.output.mkdir(parents=True, exist_ok=True)
    for note in notes:
        say(note)
    data = SHOW[args.mode](model, images, labels, run, args) | {"framework": FRAMEWORK}
    arrays, picture = io.BytesIO(), io.BytesIO()
    np.savez_compressed(arrays, **data)
    figures.DRAW[args.mode](data).savefig(picture, format="png")
    figure, kept = (args.output / f"{args.mode}{SUFFIX}{end}" for end in (".png", ".npz"))
    for path, content in ((kept, arrays), (figure, picture)):
        write_atomic(path, content.getvalue())
    if args.mode == "erf":
        print_shares(data)
    say(f"wrote {figure} and {kept}, {len(images)} images")


def print_shares(data):
    """RepLKNet's table: the share of the image in the square that holds so much of the field."""
    shares = "".join(f"{100 * share:8.0f} %" for share in figures.SHARES)
    say(f"{'':18}{shares}   of the gradient lie in this share of the image")
    for when in ("initial", "trained"):
        for name in figures.MAPS:
            field = data[f"{when} {name}"]
            areas = (figures.area_share(field, share) for share in figures.SHARES)
            areas = "".join(f"{area:10.3f}" for area in areas)
            say(f"{when:8}  {name:8}{areas}")


def main():
    args = make_parser().parse_args()
    run_program("visualize.py", visualize, args)


if __name__ == "__main__":
    main()
