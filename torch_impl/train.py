"""Train OverLoCK on TinyImageNet in PyTorch. `python torch_impl/train.py -b 64` is the published experiment.

Writes log_torch.csv, log_torch.txt, last_torch.safetensors and best_torch.safetensors into --output (logs/).
jittor_impl/train.py is the same program in Jittor: the same options, weights, batches and files.
"""
import argparse
import json
import platform
import shlex
import signal
import sys
import time
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

import models
import ops
from checkpoint import load_model, load_optimizer, read_checkpoint, save_checkpoint, trainable, write_atomic
from dataset import InputError, load
from progress import Progress, say

ROOT = Path(__file__).resolve().parent.parent
FRAMEWORK = "PyTorch"
SUFFIX = "_torch"
COLUMNS = ("train_loss", "train_loss_aux", "epoch_time", "val_loss", "acc_top1", "acc_top5",
           "train_loss_main", "images_per_second", "epoch")
# A resumed run continues the stopped one only if these are the same.
RUN_ARGUMENTS = ("model", "num_classes", "train_per_class", "val_per_class", "batch_size", "aux_loss_ratio", "lr",
                 "weight_decay", "seed")


class ArgumentParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def number(kind, minimum, exclusive=False):
    """An argparse type: `kind` (int or float), at least `minimum`, or above it if exclusive."""
    def parse(text):
        value = kind(text)
        if not minimum <= value < float("inf") or exclusive and value == minimum:
            bound = f"{'above' if exclusive else 'at least'} {minimum}"
            raise argparse.ArgumentTypeError(f"must be a {'' if kind is int else 'finite '}number {bound}, got {text}")
        return value
    parse.__name__ = "whole number" if kind is int else "number"  # argparse says "invalid whole number value"
    return parse


def make_parser():
    parser = ArgumentParser(prog="train.py", description=f"Train OverLoCK on TinyImageNet in {FRAMEWORK}.",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("-b", "--batch-size", type=number(int, 1), default=64, help="images per step")
    add("--aux-loss-ratio", type=number(float, 0), default=0.4, help="weight of the auxiliary loss")
    add("--epochs", type=number(int, 1), default=20, help="epochs in all, those before --resume included")
    add("--lr", type=number(float, 0, exclusive=True), default=1e-3, help="learning rate of AdamW, constant")
    add("--weight-decay", type=number(float, 0), default=0.01, help="weight decay of AdamW")
    add("--model", choices=sorted(models.VARIANTS), default="overlock_xxt", help="variant")
    add("--data-dir", type=Path, default=ROOT / "data" / "tiny-imagenet-200", help="a folder laid out like TinyImageNet")
    add("--num-classes", type=number(int, 1), default=20, help="use the first classes in sorted order")
    add("--train-per-class", type=number(int, 1), default=500, help="training images of each class")
    add("--val-per-class", type=number(int, 1), default=50, help="validation images of each class")
    add("--seed", type=number(int, 0), default=0, help="of initial weights, order of images and flips")
    add("--output", type=Path, default=ROOT / "logs", help="folder for logs and checkpoints")
    add("--init", type=Path, metavar="CHECKPOINT", help="start from these weights: ours, or an official .pth")
    add("--resume", type=Path, metavar="CHECKPOINT", nargs="?", const=Path(),
        help=f"continue a stopped run, by default from last{SUFFIX}.safetensors in --output")
    add("--evaluate", type=Path, metavar="CHECKPOINT", help="only measure this checkpoint on the validation images")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes the GPU if there is one")
    add("--no-progress", action="store_true", help="print one line per epoch and nothing between")
    add("--na2d", choices=ops.BACKENDS, default="auto",
        help="who computes na2d_av: NATTEN, our dense product, our Triton kernels, or auto: on a GPU NATTEN if built for it, "
        "else Triton for large maps; else dense")
    return parser


def parse_args():
    parser = make_parser()
    args = parser.parse_args()
    if sum(option is not None for option in (args.init, args.resume, args.evaluate)) > 1:
        parser.error("--init, --resume and --evaluate exclude one another; give one of them")
    return args


def resume_command(args):
    """The command that continues the run of `args` after it was stopped."""
    parser, words = make_parser(), [sys.executable, sys.argv[0]]
    for name, value in vars(args).items():
        if name in ("init", "resume", "evaluate") or value == parser.get_default(name):
            continue
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return shlex.join([*words, "--resume"])


def choose_device(args):
    """Settle args.device. Returns its name for the log."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("PyTorch sees no CUDA GPU; give --device cpu")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def make_optimizer(model, args):
    """AdamW with every hyper-parameter spelled out: the frameworks' defaults differ."""
    parameters = list(trainable(model).values())
    return torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=args.weight_decay,
                             foreach=True)


def diverged(what, epoch, step):
    """The InputError of a run whose loss is no longer a number."""
    kept = ", or go on from the checkpoint of the epoch before with --init" if epoch > 1 else ""
    return InputError(f"{what} in epoch {epoch}, step {step}; start anew with a lower --lr{kept}")


def train_one_epoch(model, optimizer, data, args, epoch):
    """One pass over `data`. Returns the means over its images: {"train_loss", "train_loss_aux", "train_loss_main"}."""
    model.train()
    total_main = total_aux = seen = 0
    with Progress(f"epoch {epoch}/{args.epochs}", len(data), not args.no_progress) as progress:
        for step, (images, labels) in enumerate(data.batches(args.batch_size, args.seed, epoch), 1):
            images = torch.from_numpy(images).to(args.device, memory_format=torch.channels_last)
            labels = torch.from_numpy(labels).to(args.device)
            output = model(images)
            main = cross_entropy(output["main"], labels)
            aux = cross_entropy(output["aux"], labels)
            loss = main + args.aux_loss_ratio * aux
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            main, aux = main.item(), aux.item()
            if not np.isfinite(main + aux):
                raise diverged(f"the loss is {main + args.aux_loss_ratio * aux}", epoch, step)
            n = len(labels)
            total_main, total_aux, seen = total_main + main * n, total_aux + aux * n, seen + n
            progress.update(n, main + args.aux_loss_ratio * aux)
    main, aux = total_main / seen, total_aux / seen
    return dict(train_loss=main + args.aux_loss_ratio * aux, train_loss_aux=aux, train_loss_main=main)


@torch.no_grad()
def evaluate(model, data, args):
    """Main head on `data`: {"val_loss": mean cross entropy, "acc_top1", "acc_top5": fractions}."""
    model.eval()
    loss = top1 = top5 = 0
    for images, labels in data.batches(args.batch_size):
        images = torch.from_numpy(images).to(args.device, memory_format=torch.channels_last)
        logits = model(images).cpu().numpy().astype(np.float64)  # (n, classes)
        logits -= logits.max(1, keepdims=True)
        target = logits[np.arange(len(labels)), labels][:, None]  # (n, 1)
        loss += (np.log(np.exp(logits).sum(1)) - target[:, 0]).sum()
        # Written with "not below", so that a NaN never counts as right.
        rank = (~(logits < target)).sum(1)  # (n,), 1 is best
        top1, top5 = top1 + (rank <= 1).sum(), top5 + (rank <= 5).sum()
    return dict(val_loss=float(loss) / len(data), acc_top1=int(top1) / len(data), acc_top5=int(top5) / len(data))


class RunFiles:
    """The files of one run in --output."""

    def __init__(self, output):
        self.output = output
        self.csv, self.text = output / f"log{SUFFIX}.csv", output / f"log{SUFFIX}.txt"
        self.last, self.best = output / f"last{SUFFIX}.safetensors", output / f"best{SUFFIX}.safetensors"
        self.started = False  # whether self.last, if it exists, is of the run under way

    def check_writable(self):
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            probe = self.output / f".write{SUFFIX}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InputError(f"cannot write to {self.output} ({error.strerror}); give another --output") from None

    def set_aside(self):
        """Move an earlier run's files to previous-1/, previous-2/, ...: a new run overwrites nothing.

        The other framework's run beside it goes to the same folder, so the pairs stay together.
        """
        files = (self.csv, self.text, self.last, self.best)
        earlier = [path for path in files if path.exists()]
        if earlier:
            folders = (self.output / f"previous-{number}" for number in count(1))
            folder = next(f for f in folders if not any((f / path.name).exists() for path in files))
            folder.mkdir(exist_ok=True)
            for path in earlier:
                path.rename(folder / path.name)
            say(f"the files of an earlier run were moved to {folder}")

    def log(self, line):
        """A line on the screen and in the text log."""
        say(line)
        with open(self.text, "a", encoding="utf-8") as f:
            f.write(line + "\n")

    def log_history(self, history, epochs):
        """Log the epochs that a killed run finished, but had no time to log."""
        text = self.text.read_text(encoding="utf-8") if self.text.exists() else ""
        for row in history:
            if f"epoch {row['epoch']}/" not in text:
                self.log(epoch_line(row, epochs))

    def write_csv(self, history):
        rows = [COLUMNS] + [[repr(row[column]) for column in COLUMNS] for row in history]
        write_atomic(self.csv, "".join(",".join(row) + "\n" for row in rows).encode())


def epoch_line(row, epochs):
    return (f"epoch {row['epoch']}/{epochs}: train loss {row['train_loss']:.4f} (main {row['train_loss_main']:.4f}, "
            f"aux {row['train_loss_aux']:.4f}), val loss {row['val_loss']:.4f}, top-1 {row['acc_top1']:.4f}, "
            f"top-5 {row['acc_top5']:.4f}, {row['epoch_time']:.2f} min, {row['images_per_second']:.0f} images/s")


def check_resumable(run, args, path):
    """Raise InputError unless `args` are those of the run that the checkpoint at `path` belongs to."""
    if not run:
        raise InputError(f"{path} has weights only; use it with --init")
    for name in RUN_ARGUMENTS:
        if run["args"].get(name) != getattr(args, name):
            option = f"--{name.replace('_', '-')} {run['args'].get(name)}"
            raise InputError(f"the run in {path} was started with {option}; give that too, or start anew with --init")
    if run["epoch"] >= args.epochs:
        raise InputError(f"the run in {path} has done its {run['epoch']} epochs; give a larger --epochs to go on")


def check_last_batch(train, batch_size):
    """BatchNorm needs two values per channel: raise InputError if the last batch has one image, and that one pixel."""
    pixels = int(np.prod([-(-size // 32) for size in train.images.shape[1:3]]))  # of the map at stride 32
    if (len(train) - 1) % batch_size == 0 and pixels == 1:
        raise InputError("the last batch would be a single small image, too little for BatchNorm; "
                         "change --batch-size or --train-per-class")


def run_training(args, files):
    device_name = choose_device(args)
    try:
        ops.set_na2d_backend(args.na2d)
        if args.na2d == "triton" and args.device == "cpu":
            raise ValueError("the Triton kernels need a GPU; give --device cuda")
        if args.na2d == "natten" and args.device == "cuda" and not ops.natten_has_cuda():
            raise ValueError("NATTEN was built without CUDA; the README names its wheel for CUDA")
    except ValueError as error:
        raise InputError(f"--na2d {args.na2d}: {error}") from None
    if args.resume == Path():
        args.resume = files.last
        if not files.last.exists():
            raise InputError(f"nothing to resume: {files.last} does not exist; start without --resume")
    source = args.evaluate or args.resume or args.init
    arrays, moments, run = read_checkpoint(source) if source else ({}, {}, {})
    if args.resume:
        check_resumable(run, args, source)
    if not args.evaluate:
        files.check_writable()
    train_per_class = 0 if args.evaluate else args.train_per_class
    train, val = load(args.data_dir, args.num_classes, train_per_class, args.val_per_class, not args.no_progress)

    model = models.OverLoCK(**models.VARIANTS[args.model], num_classes=args.num_classes, seed=args.seed)
    model = model.to(args.device, memory_format=torch.channels_last)
    kept = load_model(model, arrays, source, keep_classifier=source == args.init) if source else []
    if args.evaluate:
        result = evaluate(model, val, args)
        return say(f"{source}: val loss {result['val_loss']:.4f}, top-1 {result['acc_top1']:.4f}, "
                   f"top-5 {result['acc_top5']:.4f} on {len(val)} images of {args.num_classes} classes")
    check_last_batch(train, args.batch_size)
    optimizer = make_optimizer(model, args)
    data = {"classes": train.classes, "image_shape": list(train.images.shape[1:])}
    history = []
    if args.resume:
        if run["data"] != data:
            raise InputError(f"the run in {source} was trained on other classes or image sizes than {args.data_dir} has; "
                             "give the right --data-dir")
        load_optimizer(model, optimizer, moments, run["step"], source)
        history = run["history"]
    if not args.resume or source.resolve() != files.last.resolve():
        files.set_aside()
    files.started = True

    arguments = json.loads(json.dumps(vars(args), default=str))
    parameters = sum(int(np.prod(p.shape)) for p in trainable(model).values())
    files.log(f"{FRAMEWORK} {torch.__version__}, NumPy {np.__version__}, Python {platform.python_version()}; {device_name}")
    files.log(f"arguments {json.dumps(arguments)}")
    files.log(f"{args.model}, {parameters:,} parameters; {len(train)} training and {len(val)} validation images of "
              f"{args.num_classes} classes: {' '.join(train.classes)}")
    if kept:
        files.log(f"{source} was trained on other classes; left at their initial values: {', '.join(kept)}")
    if args.resume:
        files.log_history(history, args.epochs)
        files.log(f"resumed from {source} after epoch {run['epoch']}")
    files.write_csv(history)
    steps_per_epoch = -(-len(train) // args.batch_size)
    best = max((row["acc_top1"] for row in history), default=-1)

    for epoch in range(len(history) + 1, args.epochs + 1):
        start = time.perf_counter()
        row = train_one_epoch(model, optimizer, train, args, epoch)
        images_per_second = len(train) / (time.perf_counter() - start)
        row |= evaluate(model, val, args)
        row |= dict(epoch_time=(time.perf_counter() - start) / 60, images_per_second=images_per_second, epoch=epoch)
        if not np.isfinite(row["val_loss"]):
            raise diverged(f"the validation loss is {row['val_loss']}", epoch, steps_per_epoch)
        history.append(row)
        is_best, best = row["acc_top1"] > best, max(best, row["acc_top1"])
        state = dict(epoch=epoch, step=epoch * steps_per_epoch, best_top1=best, args=arguments, data=data, history=history)
        # The last checkpoint holds the history, so whatever is written after it can be made again from it.
        if is_best:
            save_checkpoint(files.best, model, optimizer, state)
        save_checkpoint(files.last, model, optimizer, state)
        files.write_csv(history)
        files.log(epoch_line(row, args.epochs))
    written = " and ".join(path.name for path in (files.last, files.best) if path.exists())
    files.log(f"best top-1 {best:.4f}; checkpoints {written} in {files.output}")


def main():
    args = parse_args()
    files = RunFiles(args.output)
    interrupted = False

    def on_interrupt(*_):
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        run_training(args, files)
    except InputError as error:
        stop(2, f"error: {error}")
    except OSError as error:
        path = Path(str(error.filename or args.output))
        written = args.output in (path, *path.parents)
        remedy = "make room, or give another --output" if written else "check the path and its permissions"
        stop(2, f"error: {path}: {error.strerror or error}; {remedy}")
    except BaseException:
        # Ctrl-C also reaches a compiler at work, whose failure may come first.
        if not interrupted:
            raise
        if files.started and files.last.exists():
            stop(130, f"interrupted; resume with: {resume_command(args)}")
        again = "give the same command again" if args.resume or args.evaluate else "no epoch was finished"
        stop(130, f"interrupted; {again}")


def stop(status, message):
    """Exit with one line on the terminal's error stream."""
    say("train.py: " + " ".join(message.split()), sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
