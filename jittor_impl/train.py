"""Train OverLoCK in Jittor, on TinyImageNet or on images of your own.

`python jittor_impl/train.py -b 64` is the published experiment. It writes log.csv, log.txt,
last.safetensors and best.safetensors into --output (logs/). torch_impl/train.py is the same program
in PyTorch: the same options, weights, batches and files.
"""

import argparse
import json
import platform
import shlex
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

if not __package__:  # run as a file: the folder around it becomes a package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    __package__ = Path(__file__).resolve().parent.name
    __import__(__package__)

from . import models
from .aligned.collectives import launch_command, sum_gradients
from .aligned.functions import constant, cross_entropy
from .aligned.optim import AdamW
from .aligned.start import jt
from .checkpoint import (
    load_model,
    load_optimizer,
    model_arrays,
    read_checkpoint,
    save_checkpoint,
    trainable,
)
from .dataset import PUBLISHED, Crops, find_classes, is_tiny_imagenet, load
from .distributed import (
    RANK,
    own_places,
    parts_of,
    places_in_batch,
    start_processes,
    synchronise,
    take,
    total,
    wait_for_all,
)
from .ema import ModelEma
from .errors import InputError
from .export import export
from .loader import default_cache
from .program import ArgumentParser, add_device_options, choose_device, number, run_program
from .progress import Progress, say
from .recipe import (
    TINY,
    add_recipe_options,
    choose_recipe,
    images_per_step,
    learning_rate,
    mixup,
    parameter_groups,
    recipe,
    settle_recipe,
    total_epochs,
    train_transform,
)
from .resume import check_resumable, check_same_data, option_words
from .run_files import OthersRunFiles, RunFiles, epoch_line
from .weights import is_merged

ROOT = Path(__file__).resolve().parent.parent
FRAMEWORK = "Jittor"
SUFFIX = ""


def make_parser(defaults=TINY):
    """The options of train.py; `defaults` are those of a recipe."""
    parser = ArgumentParser(
        prog="train.py",
        description=f"Train OverLoCK in {FRAMEWORK}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    count, seed, path = number(int, 1), number(int, 0), dict(type=Path, metavar="CHECKPOINT")
    data_dir = ROOT / "data" / "tiny-imagenet-200"
    global_batch = "images per step, of all processes together"
    add("-b", "--batch-size", type=count, default=64, help=global_batch)
    add("--aux-loss-ratio", type=number(float, 0), default=0.4, help="weight of the auxiliary loss")
    add("--model", choices=sorted(models.VARIANTS), default="overlock_xxt", help="variant")
    folder = "a folder with train/ and val/ of class folders, or TinyImageNet"
    add("--data-dir", type=Path, default=data_dir, help=folder)
    first = "use the first ones; None: all, of TinyImageNet"
    add("--num-classes", type=count, help=f"classes, in sorted order: {first} {PUBLISHED[0]}")
    add("--train-per-class", type=count, help=f"training images of each: {first} {PUBLISHED[1]}")
    add("--val-per-class", type=count, help=f"validation images of each: {first} {PUBLISHED[2]}")
    add("--seed", type=seed, default=0, help="of initial weights, order of images and flips")
    add("--output", type=Path, default=ROOT / "logs", help="folder for logs and checkpoints")
    add("--init", **path, help="start from these weights: ours, official, timm's")
    last = f"last{SUFFIX}.safetensors in --output"
    resume = f"continue a stopped run, by default from {last}; auto: from that if it is there"
    add("--resume", **path, nargs="?", const=Path(), help=resume)
    add("--evaluate", **path, help="only measure this checkpoint on the validation images")
    to_file = "only write the weights of --init to this .pth, with the official names"
    add("--export", type=Path, metavar="FILE", help=to_file)
    add("--merge", action="store_true", help="merge the dilated branches in what --export writes")
    add("--use-ema", action="store_true", help="take a checkpoint's averaged weights (EMA)")
    add_device_options(parser)
    add("--no-progress", action="store_true", help="print one line per epoch and nothing between")
    add_recipe_options(parser)
    parser.set_defaults(**defaults)
    return parser


def parse_args():
    parser = make_parser(choose_recipe())
    args = parser.parse_args()
    if sum(option is not None for option in (args.init, args.resume, args.evaluate)) > 1:
        parser.error("--init, --resume and --evaluate exclude one another; give one of them")
    if args.export and not args.init:
        parser.error("--export needs the checkpoint to export; give it with --init")
    if args.use_ema and args.resume:
        parser.error("--use-ema is not for --resume, which continues from both; leave it out")
    if args.merge and not args.export:
        parser.error("--merge is for --export alone; evaluation and predict.py merge by themselves")
    if args.grad_checkpointing:
        remedy = "leave --grad-checkpointing out; a lower -b with --grad-accumulation helps"
        parser.error(f"Jittor cannot compute blocks again in the backward pass; {remedy}")
    return args


def resume_command(args):
    """The command that continues the run of `args` after it was stopped."""
    parser, words = make_parser(recipe(args.recipe, args.model)), launch_command(sys.argv[0])
    for name, value in vars(args).items():
        is_start = name in ("init", "resume", "evaluate", "use_ema")
        if not is_start and value != parser.get_default(name):
            words += option_words(name, value)
    return shlex.join([*words, "--resume"])


def make_model(args, merged=False):
    """The model of `args`, with its initial weights, on args.device; `merged`: its branches."""
    variant = models.VARIANTS[args.model]
    of_args = dict(num_classes=args.num_classes, seed=args.seed, drop_path_rate=args.drop_path)
    model = models.OverLoCK(**variant, **of_args, deploy=merged)
    return model


def make_optimizer(model, args):
    """AdamW with every hyper-parameter spelled out: the frameworks' defaults differ."""
    numbers = dict(lr=args.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=args.weight_decay)
    parameters = trainable(model)
    groups = parameter_groups({name: p.shape for name, p in parameters.items()}, args)
    for group in groups:
        group["params"] = [parameters[name] for name in group["names"]]
        group["lr"] = args.lr * group["lr_scale"]
    return AdamW(groups, **numbers)


def losses(output, labels, args):
    """The loss that is trained, main + ratio * aux, and both parts of it.

    labels (n,), or targets (n, classes).
    """
    # Jittor indexes with 32 bits.
    labels = jt.array(labels.astype(np.int32) if labels.ndim == 1 else labels)
    main = cross_entropy(output["main"], labels)
    aux = cross_entropy(output["aux"], labels)
    return main + args.aux_loss_ratio * aux, main, aux


def training_step(model, optimizer, images, labels, args, step=1, count=None):
    """One step of AdamW on a batch of NumPy arrays, images (n, 3, H, W) and labels (n,).

    Or targets (n, classes). In args.grad_accumulation parts, one after another; `step`, counted
    from 1, draws the drop path. Of many processes each has its places_in_batch of the `count`
    images. Returns the main and the auxiliary loss before the step, as numbers.
    """
    if args.drop_path:
        model.seed_drop_path(args.seed, step)
    parts = []
    for part in parts_of(count or len(images), args.grad_accumulation):
        take(model, part)
        if parts:  # Jittor is lazy: compute the part before, whose memory this one then takes
            jt.sync_all()
        output = model(constant(images[part.rows]))
        loss, main, aux = losses(output, labels[part.rows], args)
        optimizer.backward(loss * part.share)
        parts.append((main, aux, part.share))
    sum_gradients(optimizer)
    if args.clip_grad:
        optimizer.clip_grad_norm(args.clip_grad)
    optimizer.step()
    jt.sync_all()  # the whole step now, not the forward half at the first item()
    main = sum(main.item() * share for main, _, share in parts)
    aux = sum(aux.item() * share for _, aux, share in parts)
    return total([main, aux]).tolist()


def diverged(what, epoch, step):
    """The InputError of a run whose loss is no longer a number."""
    kept = ", or go on from the checkpoint of the epoch before with --init" if epoch > 1 else ""
    return InputError(f"{what} in epoch {epoch}, step {step}; start anew with a lower --lr{kept}")


def steps_per_epoch(data, args):
    return -(-len(data) // images_per_step(args))


def train_one_epoch(model, optimizer, ema, data, args, epoch):
    """One pass over `data`. Returns the losses' means over its images, as the log names them."""
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(args, epoch) * group["lr_scale"]
    total_main = total_aux = seen = 0
    title = f"epoch {epoch}/{total_epochs(args)}"
    steps_before = (epoch - 1) * steps_per_epoch(data, args)
    batches = closing(data.batches(images_per_step(args), args.seed, epoch))
    with Progress(title, len(data), not args.no_progress) as progress, batches as batches:
        for step, (images, labels) in enumerate(batches, 1):
            n = min(images_per_step(args), len(data) - seen)
            number = steps_before + step
            main, aux = training_step(model, optimizer, images, labels, args, number, n)
            loss = main + args.aux_loss_ratio * aux
            if not np.isfinite(loss):
                raise diverged(f"the loss is {loss}", epoch, step)
            if ema:
                ema.update(model)
            total_main, total_aux, seen = total_main + main * n, total_aux + aux * n, seen + n
            progress.update(n, loss)
    main, aux = total_main / seen, total_aux / seen
    train_loss = main + args.aux_loss_ratio * aux
    return dict(train_loss=train_loss, train_loss_aux=aux, train_loss_main=main)


@jt.no_grad()
def evaluate(model, data, args):
    """Main head on `data`: {"val_loss": mean cross entropy, "acc_top1", "acc_top5": fractions}.

    Loss and ranks in NumPy and float64: both frameworks then measure with the same function.
    """
    model.eval()
    loss = top1 = top5 = 0
    with closing(data.batches(args.batch_size)) as batches:
        for images, labels in batches:
            images = jt.array(images)
            logits = model(images).numpy().astype(np.float64)  # (n, classes)
            logits -= logits.max(1, keepdims=True)
            target = logits[np.arange(len(labels)), labels][:, None]  # (n,) -> (n, 1)
            loss += (np.log(np.exp(logits).sum(1)) - target[:, 0]).sum()
            # Written with "not below", so that a NaN never counts as right.
            rank = (~(logits < target)).sum(1)  # (n,), 1 is best
            top1, top5 = top1 + (rank <= 1).sum(), top5 + (rank <= 5).sum()
    loss, top1, top5 = total([loss, top1, top5]) / len(data)
    return dict(val_loss=float(loss), acc_top1=float(top1), acc_top5=float(top5))


def check_last_batch(train, args):
    """BatchNorm needs two values per channel: refuse a last batch of one pixel at stride 32."""
    pixels = int(np.prod([-(-size // 32) for size in train.image_shape[:2]]))
    last = len(train) % images_per_step(args) or images_per_step(args)
    if last < 2 * args.grad_accumulation and pixels == 1:
        raise InputError(
            "the last batch would be a single small image, too little for BatchNorm; "
            "change --batch-size or --train-per-class"
        )


def settle_data(args):
    """Fill in which classes and images are used where args leave it open; None is all."""
    published = PUBLISHED if is_tiny_imagenet(args.data_dir) else (None, None, None)
    for name, count in zip(("num_classes", "train_per_class", "val_per_class"), published):
        if getattr(args, name) is None:
            setattr(args, name, count)
    if args.num_classes is None:
        args.num_classes = len(find_classes(args.data_dir))


def load_data(args, train_per_class):
    """The training split, None for train_per_class=0, and the validation split."""
    crops, cache = None, args.cache_gib
    if args.img_size is not None:
        cache = default_cache() if cache is None else int(cache * 2**30)
        crops = Crops(args.img_size, args.crop_pct, train_transform(args), args.workers, cache)
    counts = args.num_classes, train_per_class, args.val_per_class
    train, val = load(args.data_dir, *counts, not args.no_progress, crops)
    if train:
        train.hflip, train.mixup = args.hflip, mixup(args)
        train.share = partial(places_in_batch, number=args.grad_accumulation)
    val.share = own_places
    return train, val


def check_classes(run, val, args, path):
    """Raise InputError unless the checkpoint was trained on the classes that it is measured on."""
    if not run:
        taken = f"the first {args.num_classes} of {args.data_dir}, in sorted order"
        return say(f"{path} does not say which classes it was trained on; taken to be {taken}")
    trained = run["data"]["classes"]
    for i, (theirs, ours) in enumerate(zip(trained, val.classes), 1):
        if theirs != ours:
            differs = f"class {i} is {theirs} there and {ours} in {args.data_dir}"
            remedy = f"give the --data-dir that it was trained on, {run['args']['data_dir']}"
            raise InputError(f"{path} was trained on other classes: {differs}; {remedy}")


def evaluate_checkpoint(args):
    """What --evaluate does: say how good the checkpoint is."""
    path = args.evaluate
    arrays, _, run, notes = read_checkpoint(path, args.use_ema)
    if run and args.img_size is None:  # as it was trained
        args.img_size = run["args"].get("img_size")
        if "crop_pct" not in args.given:
            args.crop_pct = run["args"].get("crop_pct", args.crop_pct)
    _, val = load_data(args, train_per_class=0)
    model = make_model(args, is_merged(arrays))
    load_model(model, arrays, path)
    for note in notes:
        say(note)
    check_classes(run, val, args, path)
    result = evaluate(model, val, args)
    say(
        f"{path}: val loss {result['val_loss']:.4f}, top-1 {result['acc_top1']:.4f}, "
        f"top-5 {result['acc_top5']:.4f} on {len(val)} images of {args.num_classes} classes"
    )
    top1, whose = best_top1(run["history"][-1]) if run else (0, "")
    if whose and not args.use_ema:
        say(f"{path}: its run measured top-1 {top1:.4f}{whose}")


def start(args, files, device_name):
    """Everything before the first epoch: data, model, optimizer, logs, by --init or --resume.

    Returns model, optimizer, averaged weights or None, training and validation split, and `run`,
    what checkpoints keep beside the weights; run["history"] are the epochs that are done.
    """
    source = args.resume or args.init
    arrays, moments, run, notes = {}, {}, {}, []
    if source:
        arrays, moments, run, notes = read_checkpoint(source, args.use_ema)
    if args.resume:
        check_resumable(run, args, source)
    train, val = load_data(args, args.train_per_class)
    model = make_model(args, is_merged(arrays))
    kept = load_model(model, arrays, source, keep_classifier=source == args.init) if source else []
    synchronise(model)
    check_last_batch(train, args)
    optimizer, ema = make_optimizer(model, args), None
    if args.ema_decay:
        ema = ModelEma(make_model(args, is_merged(arrays)), args.ema_decay)
        averaged = read_checkpoint(source, use_ema=True).arrays if args.resume else None
        load_model(ema.module, averaged or model_arrays(model), source)
    data = {"classes": train.classes, "image_shape": list(train.image_shape)}
    data["train_images"] = len(train)
    history = []
    if args.resume:
        check_same_data(run["data"], data, args.data_dir, source)
        load_optimizer(optimizer, moments, run["step"], source)
        history = run["history"]
    if not args.resume or source.resolve() != files.last.resolve():
        wait_for_all()  # until each has read what is moved now
        files.set_aside()
    files.started = True

    arguments = json.loads(json.dumps(vars(args), default=str))
    parameters = sum(int(np.prod(p.shape)) for p in trainable(model).values())
    versions = f"NumPy {np.__version__}, Python {platform.python_version()}"
    files.log(f"{FRAMEWORK} {jt.__version__}, {versions}; {device_name}")
    files.log(f"arguments {json.dumps(arguments)}")
    files.log(
        f"{args.model}, {parameters:,} parameters; {len(train)} training and {len(val)} validation "
        f"images of {args.num_classes} classes: {' '.join(train.classes)}"
    )
    for note in notes if source == args.init else ():
        files.log(note)
    if is_merged(arrays) and not args.resume:
        lower = "upstream found the accuracy somewhat lower than from branches"
        files.log(f"{source} has merged branches, and so has this model ({lower})")
    if kept:
        reason = "was trained on other classes" if kept[0] in arrays else "has no classifier"
        names = kept if kept[0] in arrays else dict.fromkeys(key.partition(".")[0] for key in kept)
        files.log(f"{source} {reason}; left at their initial values: {', '.join(names)}")
    if args.resume:
        files.log_history(history, total_epochs(args))
        files.log(f"resumed from {source} after epoch {run['epoch']}")
    files.write_csv(history)
    return model, optimizer, ema, train, val, dict(args=arguments, data=data, history=history)


def fit(model, optimizer, ema, train, val, run, args, files):
    """The epochs left. After each, last.safetensors, the logs and perhaps best.safetensors."""
    history = run["history"]
    best = max(map(best_top1, history), key=lambda best: best[0], default=(-1, ""))
    for epoch in range(len(history) + 1, total_epochs(args) + 1):
        begin = time.perf_counter()
        row = train_one_epoch(model, optimizer, ema, train, args, epoch)
        images_per_second = len(train) / (time.perf_counter() - begin)
        row |= evaluate(model, val, args)
        if ema:
            averaged = evaluate(ema.module, val, args)
            row |= {f"{name}_ema": value for name, value in averaged.items()}
        minutes = (time.perf_counter() - begin) / 60
        row |= dict(epoch_time=minutes, images_per_second=images_per_second, epoch=epoch)
        if not np.isfinite(row["val_loss"]):
            what = f"the validation loss is {row['val_loss']}"
            raise diverged(what, epoch, steps_per_epoch(train, args))
        history.append(row)
        is_best = best_top1(row)[0] > best[0]
        best = best_top1(row) if is_best else best
        step = epoch * steps_per_epoch(train, args)
        state = dict(epoch=epoch, step=step, best_top1=best[0], **run)
        # The last holds the history, so whatever is written after it can be made again from it.
        for path in (files.best, files.last) if is_best else (files.last,):
            if RANK == 0:
                save_checkpoint(path, model, optimizer, ema, state)
        files.write_csv(history)
        files.log(epoch_line(row, total_epochs(args)))
    written = " and ".join(path.name for path in (files.last, files.best) if path.exists())
    files.log(f"best top-1 {best[0]:.4f}{best[1]}; checkpoints {written} in {files.output}")


def best_top1(row):
    """The better top-1 of an epoch, and what the log says if the averaged weights have it."""
    averaged = row.get("acc_top1_ema", -1)
    if averaged > row["acc_top1"]:
        return averaged, " of the averaged weights, which --use-ema takes"
    return row["acc_top1"], ""


def run_training(args, files):
    device_name = choose_device(args)
    start_processes(args.device)
    if args.export:
        return export(args)
    settle_recipe(args)
    settle_data(args)
    if args.evaluate:
        return evaluate_checkpoint(args)
    if args.resume == Path("auto"):
        args.resume = files.last if files.last.exists() else None
    if args.resume == Path():
        args.resume = files.last
        if not files.last.exists():
            remedy = "start without --resume, or with --resume auto"
            raise InputError(f"nothing to resume: {files.last} does not exist; {remedy}")
    files.check_writable()
    with files.locked():
        fit(*start(args, files, device_name), args, files)


def main():
    args = parse_args()
    asked = argparse.Namespace(**vars(args))  # before what is left open is filled in
    files = (OthersRunFiles if RANK else RunFiles)(args.output, SUFFIX)

    def advice():
        if files.started and files.last.exists():
            return f"resume with: {resume_command(asked)}"
        anew = args.resume or args.evaluate
        return "give the same command again" if anew else "no epoch was finished"

    run_program("train.py", lambda args: run_training(args, files), args, advice)


if __name__ == "__main__":
    main()
