"""Train OverLoCK on TinyImageNet in PyTorch.

`python torch_impl/train.py -b 64` is the published experiment. It writes log_torch.csv,
log_torch.txt, last_torch.safetensors and best_torch.safetensors into --output (logs/).
jittor_impl/train.py is the same program in Jittor: the same options, weights, batches and files.
"""

import argparse
import json
import platform
import shlex
import sys
import time
from pathlib import Path

import numpy as np

if not __package__:  # run as a file: the folder around it becomes a package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    __package__ = Path(__file__).resolve().parent.name
    __import__(__package__)

import torch
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from . import models
from .checkpoint import load_model, load_optimizer, read_checkpoint, save_checkpoint, trainable
from .dataset import load
from .errors import InputError
from .export import export
from .kernels.device import memory_format
from .program import ArgumentParser, add_device_options, choose_device, number, run_program
from .progress import Progress, say
from .run_files import RunFiles, epoch_line
from .weights import is_merged

ROOT = Path(__file__).resolve().parent.parent
FRAMEWORK = "PyTorch"
SUFFIX = "_torch"
# A resumed run continues the stopped one only if these are the same.
RUN_ARGUMENTS = (
    *("model", "num_classes", "train_per_class", "val_per_class", "batch_size"),
    *("aux_loss_ratio", "lr", "weight_decay", "seed"),
)


def make_parser():
    parser = ArgumentParser(
        prog="train.py",
        description=f"Train OverLoCK on TinyImageNet in {FRAMEWORK}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    count, seed, path = number(int, 1), number(int, 0), dict(type=Path, metavar="CHECKPOINT")
    data_dir = ROOT / "data" / "tiny-imagenet-200"
    add("-b", "--batch-size", type=count, default=64, help="images per step")
    add("--aux-loss-ratio", type=number(float, 0), default=0.4, help="weight of the auxiliary loss")
    add("--epochs", type=count, default=20, help="epochs in all, those before --resume included")
    add("--lr", type=number(float, 0, True), default=1e-3, help="learning rate of AdamW, constant")
    add("--weight-decay", type=number(float, 0), default=0.01, help="weight decay of AdamW")
    add("--model", choices=sorted(models.VARIANTS), default="overlock_xxt", help="variant")
    add("--data-dir", type=Path, default=data_dir, help="a folder laid out like TinyImageNet")
    add("--num-classes", type=count, default=20, help="use the first classes in sorted order")
    add("--train-per-class", type=count, default=500, help="training images of each class")
    add("--val-per-class", type=count, default=50, help="validation images of each class")
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
    return parser


def parse_args():
    parser = make_parser()
    args = parser.parse_args()
    if sum(option is not None for option in (args.init, args.resume, args.evaluate)) > 1:
        parser.error("--init, --resume and --evaluate exclude one another; give one of them")
    if args.export and not args.init:
        parser.error("--export needs the checkpoint to export; give it with --init")
    if args.merge and not args.export:
        parser.error("--merge is for --export alone; evaluation and predict.py merge by themselves")
    return args


def resume_command(args):
    """The command that continues the run of `args` after it was stopped."""
    parser, words = make_parser(), [sys.executable, sys.argv[0]]
    for name, value in vars(args).items():
        if name in ("init", "resume", "evaluate") or value == parser.get_default(name):
            continue
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return shlex.join([*words, "--resume"])


def make_model(args, merged=False):
    """The model of `args`, with its initial weights, on args.device; `merged`: its branches."""
    variant = models.VARIANTS[args.model]
    of_args = dict(num_classes=args.num_classes, seed=args.seed)
    model = models.OverLoCK(**variant, **of_args, deploy=merged)
    return model.to(args.device, memory_format=memory_format(args.device))


def make_optimizer(model, args):
    """AdamW with every hyper-parameter spelled out: the frameworks' defaults differ."""
    numbers = dict(lr=args.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=args.weight_decay)
    # foreach: a few operators over all tensors instead of a few for each.
    return AdamW(list(trainable(model).values()), **numbers, foreach=True)


def losses(output, labels, args):
    """The loss that is trained, main + ratio * aux, and both parts of it; labels (n,)."""
    labels = torch.from_numpy(labels).to(args.device)
    main = cross_entropy(output["main"], labels)
    aux = cross_entropy(output["aux"], labels)
    return main + args.aux_loss_ratio * aux, main, aux


def training_step(model, optimizer, images, labels, args):
    """One step of AdamW on a batch of NumPy arrays, images (n, 3, H, W) and labels (n,).

    Returns the main and the auxiliary loss before the step, as numbers.
    """
    images = torch.from_numpy(images).to(args.device)
    loss, main, aux = losses(model(images), labels, args)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return main.item(), aux.item()


def diverged(what, epoch, step):
    """The InputError of a run whose loss is no longer a number."""
    kept = ", or go on from the checkpoint of the epoch before with --init" if epoch > 1 else ""
    return InputError(f"{what} in epoch {epoch}, step {step}; start anew with a lower --lr{kept}")


def train_one_epoch(model, optimizer, data, args, epoch):
    """One pass over `data`. Returns the losses' means over its images, as the log names them."""
    model.train()
    total_main = total_aux = seen = 0
    title = f"epoch {epoch}/{args.epochs}"
    with Progress(title, len(data), not args.no_progress) as progress:
        batches = data.batches(args.batch_size, args.seed, epoch)
        for step, (images, labels) in enumerate(batches, 1):
            main, aux = training_step(model, optimizer, images, labels, args)
            loss = main + args.aux_loss_ratio * aux
            if not np.isfinite(loss):
                raise diverged(f"the loss is {loss}", epoch, step)
            n = len(labels)
            total_main, total_aux, seen = total_main + main * n, total_aux + aux * n, seen + n
            progress.update(n, loss)
    main, aux = total_main / seen, total_aux / seen
    train_loss = main + args.aux_loss_ratio * aux
    return dict(train_loss=train_loss, train_loss_aux=aux, train_loss_main=main)


@torch.no_grad()
def evaluate(model, data, args):
    """Main head on `data`: {"val_loss": mean cross entropy, "acc_top1", "acc_top5": fractions}.

    Loss and ranks in NumPy and float64: both frameworks then measure with the same function.
    """
    model.eval()
    loss = top1 = top5 = 0
    for images, labels in data.batches(args.batch_size):
        images = torch.from_numpy(images).to(args.device)
        logits = model(images).cpu().numpy().astype(np.float64)  # (n, classes)
        logits -= logits.max(1, keepdims=True)
        target = logits[np.arange(len(labels)), labels][:, None]  # (n,) -> (n, 1)
        loss += (np.log(np.exp(logits).sum(1)) - target[:, 0]).sum()
        # Written with "not below", so that a NaN never counts as right.
        rank = (~(logits < target)).sum(1)  # (n,), 1 is best
        top1, top5 = top1 + (rank <= 1).sum(), top5 + (rank <= 5).sum()
    n = len(data)
    return dict(val_loss=float(loss) / n, acc_top1=int(top1) / n, acc_top5=int(top5) / n)


def check_resumable(run, args, path):
    """Raise InputError unless `args` are those of the run that wrote the checkpoint at `path`."""
    if not run:
        raise InputError(f"{path} has weights only; use it with --init")
    for name in RUN_ARGUMENTS:
        if run["args"].get(name) != getattr(args, name):
            started = f"--{name.replace('_', '-')} {run['args'].get(name)}"
            remedy = "give that too, or start anew with --init"
            raise InputError(f"the run in {path} was started with {started}; {remedy}")
    if run["epoch"] >= args.epochs:
        done = f"has done its {run['epoch']} epochs"
        raise InputError(f"the run in {path} {done}; give a larger --epochs to go on")


def check_last_batch(train, batch_size):
    """BatchNorm needs two values per channel: refuse a last batch of one pixel at stride 32."""
    pixels = int(np.prod([-(-size // 32) for size in train.images.shape[1:3]]))
    if (len(train) - 1) % batch_size == 0 and pixels == 1:
        raise InputError(
            "the last batch would be a single small image, too little for BatchNorm; "
            "change --batch-size or --train-per-class"
        )


def load_data(args, train_per_class):
    """The training split, None for train_per_class=0, and the validation split."""
    shown = not args.no_progress
    return load(args.data_dir, args.num_classes, train_per_class, args.val_per_class, shown)


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


def start(args, files, device_name):
    """Everything before the first epoch: data, model, optimizer, logs, by --init or --resume.

    Returns model, optimizer, training and validation split, and `run`, what checkpoints keep beside
    the weights; run["history"] are the epochs that are done.
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
    check_last_batch(train, args.batch_size)
    optimizer = make_optimizer(model, args)
    data = {"classes": train.classes, "image_shape": list(train.images.shape[1:])}
    history = []
    if args.resume:
        if run["data"] != data:
            other = f"other classes or image sizes than {args.data_dir} has"
            remedy = "give the right --data-dir"
            raise InputError(f"the run in {source} was trained on {other}; {remedy}")
        load_optimizer(model, optimizer, moments, run["step"], source)
        history = run["history"]
    if not args.resume or source.resolve() != files.last.resolve():
        files.set_aside()
    files.started = True

    arguments = json.loads(json.dumps(vars(args), default=str))
    parameters = sum(int(np.prod(p.shape)) for p in trainable(model).values())
    versions = f"NumPy {np.__version__}, Python {platform.python_version()}"
    files.log(f"{FRAMEWORK} {torch.__version__}, {versions}; {device_name}")
    files.log(f"arguments {json.dumps(arguments)}")
    files.log(
        f"{args.model}, {parameters:,} parameters; {len(train)} training and {len(val)} validation "
        f"images of {args.num_classes} classes: {' '.join(train.classes)}"
    )
    for note in notes:
        files.log(note)
    if is_merged(arrays) and not args.resume:
        lower = "upstream found the accuracy somewhat lower than from branches"
        files.log(f"{source} has merged branches, and so has this model ({lower})")
    if kept:
        reason = "was trained on other classes" if kept[0] in arrays else "has no classifier"
        names = kept if kept[0] in arrays else dict.fromkeys(key.partition(".")[0] for key in kept)
        files.log(f"{source} {reason}; left at their initial values: {', '.join(names)}")
    if args.resume:
        files.log_history(history, args.epochs)
        files.log(f"resumed from {source} after epoch {run['epoch']}")
    files.write_csv(history)
    return model, optimizer, train, val, dict(args=arguments, data=data, history=history)


def fit(model, optimizer, train, val, run, args, files):
    """The epochs left. After each, last.safetensors, the logs and perhaps best.safetensors."""
    history = run["history"]
    steps_per_epoch = -(-len(train) // args.batch_size)
    best = max((row["acc_top1"] for row in history), default=-1)
    for epoch in range(len(history) + 1, args.epochs + 1):
        begin = time.perf_counter()
        row = train_one_epoch(model, optimizer, train, args, epoch)
        images_per_second = len(train) / (time.perf_counter() - begin)
        row |= evaluate(model, val, args)
        minutes = (time.perf_counter() - begin) / 60
        row |= dict(epoch_time=minutes, images_per_second=images_per_second, epoch=epoch)
        if not np.isfinite(row["val_loss"]):
            what = f"the validation loss is {row['val_loss']}"
            raise diverged(what, epoch, steps_per_epoch)
        history.append(row)
        is_best, best = row["acc_top1"] > best, max(best, row["acc_top1"])
        state = dict(epoch=epoch, step=epoch * steps_per_epoch, best_top1=best, **run)
        if is_best:
            save_checkpoint(files.best, model, optimizer, state)
        # It holds the history, so whatever is written after it can be made again from it.
        save_checkpoint(files.last, model, optimizer, state)
        files.write_csv(history)
        files.log(epoch_line(row, args.epochs))
    written = " and ".join(path.name for path in (files.last, files.best) if path.exists())
    files.log(f"best top-1 {best:.4f}; checkpoints {written} in {files.output}")


def run_training(args, files):
    device_name = choose_device(args)
    if args.evaluate:
        return evaluate_checkpoint(args)
    if args.export:
        return export(args)
    if args.resume == Path("auto"):
        args.resume = files.last if files.last.exists() else None
    if args.resume == Path():
        args.resume = files.last
        if not files.last.exists():
            remedy = "start without --resume, or with --resume auto"
            raise InputError(f"nothing to resume: {files.last} does not exist; {remedy}")
    files.check_writable()
    with files.locked():
        model, optimizer, train, val, run = start(args, files, device_name)
        fit(model, optimizer, train, val, run, args, files)


def main():
    args = parse_args()
    files = RunFiles(args.output, SUFFIX)

    def advice():
        if files.started and files.last.exists():
            return f"resume with: {resume_command(args)}"
        anew = args.resume or args.evaluate
        return "give the same command again" if anew else "no epoch was finished"

    run_program("train.py", lambda args: run_training(args, files), args, advice)


if __name__ == "__main__":
    main()
