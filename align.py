"""Run both frameworks side by side and print where they part: python align.py, or `make align`.

The checks, in this order: weights, batches, forward (every module's output), loss, gradients, step
(one AdamW step), adamw (that step against the formula) and steps (the losses of --steps steps).
With --processes N two more: those steps in N processes of each framework, beside PyTorch's in one.
Prints a table, writes logs/alignment.csv and logs/alignment.png. Exits with status 1 if a limit is
passed, and names the first module that departs. docs/alignment.md says what each check compares,
and where its limit comes from.
"""

import argparse
import hashlib
import sys
import tempfile
from contextlib import nullcontext
from itertools import count, islice
from pathlib import Path

import numpy as np
from tools.align import ports, side
from tools.align.compare import (
    EXACT,
    PERTURBED_RUNS,
    adamw,
    check_output,
    compare_arrays,
    compare_bits,
    compare_steps,
    determined,
    draw,
    largest_errors,
    of_check,
    summary,
    write_table,
)
from tools.align.worker import run_worker
from tools.frameworks import ROOT, Jittor, Torch

CHECKS = ("weights", "batches", "forward", "loss", "gradients", "step", "adamw", "steps")
OPTIONS = ("lr", "eps", "weight_decay")


def make_parser():
    parser = argparse.ArgumentParser(
        prog="align.py",
        description="Show that the two frameworks compute the same.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    for name, framework in (("jittor", "Jittor"), ("torch", "PyTorch")):
        python = str(ROOT / f".venv-{name}/bin/python")
        add(f"--{name}-python", default=python, help=f"Python of {framework}'s environment")
    data_dir = ROOT / "data" / "tiny-imagenet-200"
    add("--model", default="overlock_xxt", help="variant")
    recipe = "train.py's, with all that it turns on: augmentation, clipping, drop path, ..."
    add("--recipe", default="tiny", help=recipe)
    size = "images of another size are repeated or thinned out"
    add("--img-size", type=int, default=64, help=size)
    add("-b", "--batch-size", type=int, default=16, help="images a step")
    add("--steps", type=int, default=100, help="training steps of the last check")
    several = "make those steps in so many processes too, by mpirun and torchrun"
    add("--processes", type=int, default=1, metavar="N", help=several)
    add("--seed", type=int, default=0, help="of initial weights and batches")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="of both, and of the yardstick")
    add("--data-dir", type=Path, default=data_dir, help="a folder laid out like TinyImageNet")
    add("--num-classes", type=int, default=20, help="use the first classes in sorted order")
    add("--train-per-class", type=int, default=50, help="training images of each class")
    add("--output", type=Path, default=ROOT / "logs", help="for alignment.csv and alignment.png")
    fault = "lose the residual of this ResDWConv in Jittor, to see it found"
    add("--plant-fault", metavar="MODULE", help=fault)
    perturbed = (
        "only write the initial weights, each changed by one unit in the last place, "
        "for torch_impl/train.py --init"
    )
    add("--write-perturbed", type=Path, metavar="FILE", help=perturbed)
    ports.add_arguments(parser)
    add("--worker", nargs=3, metavar=("FRAMEWORK", "TASK", "FILE"), help=argparse.SUPPRESS)
    return parser


def training_args(f, args):
    """train.py's arguments for this run: its recipe but for what align.py has options for."""
    names = ("recipe", "model", "num_classes", "seed", "batch_size", "data_dir", "train_per_class")
    words = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    words += ["--val-per-class=1", "--workers=0", "--no-progress"]
    if args.recipe != "tiny":
        words += [f"--img-size={args.img_size}"]
    run_args = f.train_args(*words)
    f.module("recipe").settle_recipe(run_args)
    return run_args


def build(f, args):
    """The model, with a residual lost if that is asked for."""
    model = f.module("train").make_model(training_args(f, args))
    if args.plant_fault:
        broken = dict(model.named_modules()).get(args.plant_fault)
        if type(broken).__name__ != "ResDWConv":
            sys.exit(f"{args.plant_fault} is not a ResDWConv of {args.model}")
        plain = f.module("aligned.nn").Conv2d.execute
        broken.execute = lambda x: plain(broken, x)
    return model


def build_perturbed(f, args, run):
    """PyTorch's model, every weight one unit in the last place up or down, as `run` says."""
    model = build(f, args)
    generator = np.random.default_rng([args.seed, run])
    for parameter in model.parameters():
        value = f.numpy(parameter)
        up = generator.random(value.shape) >= 0.5
        direction = np.where(up, np.float32(np.inf), np.float32(-np.inf))
        parameter.data.copy_(f.torch.from_numpy(np.nextafter(value, direction)))
    return model


def resized(images, side):
    """(n, 3, H, W) -> (n, 3, side, side), copies of nearest pixels: the same bits everywhere."""
    rows, cols = (np.arange(side) * size // side for size in images.shape[2:])
    return np.ascontiguousarray(images[:, :, rows][:, :, :, cols])


def load_data(f, args):
    """The training and the validation split."""
    return f.module("train").load_data(training_args(f, args), args.train_per_class)


def batches(f, args, train):
    """Training batches of one epoch after another, and no short ones.

    Yields images (n, 3, side, side) and labels (n,), of many processes those of this one.
    """
    for epoch in count(1):
        of_epoch = train.batches(args.batch_size, args.seed, epoch)
        for images, labels in islice(of_epoch, len(train) // args.batch_size):
            labels = labels if labels.ndim == 1 else labels.astype(f.dtype)
            yield resized(images, args.img_size).astype(f.dtype), labels


def first_step(f, args):
    """What all checks but the last compare: {"check/name": array}, modules in execution order."""
    train, checkpoint = f.module("train"), f.module("checkpoint")
    arrays, model = {}, build(f, args)
    weights = checkpoint.model_arrays(model)
    arrays |= {f"weights/{name}": value.copy() for name, value in weights.items()}
    if f.dtype == np.float64:
        model = model.double()
    training, validation = load_data(f, args)
    for epoch in (1, 2):
        splits = {
            "training": training.batches(args.batch_size, args.seed, epoch),
            "validation": validation.batches(args.batch_size),
        }
        for split, data in splits.items():
            for i, (images, labels) in enumerate(data):
                digest = hashlib.sha256(images.tobytes() + labels.tobytes()).digest()
                name = f"batches/{split}, epoch {epoch}, batch {i}"
                arrays[name] = np.frombuffer(digest, np.uint8)

    outputs = {}

    def store_as(name):
        def store(output):
            # A block of Focus-Net returns features and context prior, the last one no prior.
            several = isinstance(output, (tuple, list))
            for i, array in enumerate(output if several else [output]):
                if f.is_array(array):
                    outputs[f"{name}[{i}]" if i else name] = array

        return store

    for name, module in model.named_modules():
        if name:
            f.record(module, store_as(name))

    def take_outputs(mode):
        taken = {f"forward/{mode} {name}": f.numpy(value) for name, value in outputs.items()}
        outputs.clear()
        return taken

    images, labels = next(batches(f, args, training))
    model.eval()
    for mode in ("evaluation", "inference"):
        with f.no_grad() if mode == "inference" else nullcontext():
            model(f.array(images))
        arrays |= take_outputs(mode)
    model.train()
    run_args = training_args(f, args)
    optimizer = train.make_optimizer(model, run_args)
    main, aux = train.training_step(model, optimizer, images, labels, run_args)
    arrays |= take_outputs("training")
    arrays |= loss_and_gradients(f, model, optimizer, main + run_args.aux_loss_ratio * aux)
    for name, value in checkpoint.model_arrays(model).items():
        if not name.endswith("num_batches_tracked"):
            arrays[f"step/{name}"] = value
    if run_args.ema_decay:
        average = train.make_model(run_args)
        average = average.double() if f.dtype == np.float64 else average
        # Half of the way: at the recipe's decay one step moves an average by less than rounding.
        f.module("ema").ModelEma(average, 0.5).update(model)
        for name, value in checkpoint.model_arrays(average).items():
            if not name.endswith("num_batches_tracked"):
                arrays[f"step/averaged {name}"] = value
    for group in optimizer.param_groups:
        options = np.array([group.get(name, getattr(optimizer, name, None)) for name in OPTIONS])
        arrays |= {f"options/{name}": options for name in group["names"]}
    return arrays


def loss_and_gradients(f, model, optimizer, loss):
    """{"check/name": array} of the step that was just made."""
    parameters = f.module("checkpoint").trainable(model)
    gradients = f.step_gradients(optimizer, list(parameters.values()))
    found = {f"gradients/{name}": value for name, value in zip(parameters, gradients)}
    return {"loss/total": np.array([loss])} | found


def many_steps(f, args, model):
    """Losses before each of --steps training steps; loss and gradients of the first step."""
    train, run_args = f.module("train"), training_args(f, args)
    f.module("distributed").synchronise(model)
    model.train()
    training, _ = load_data(f, args)
    optimizer, losses = train.make_optimizer(model, run_args), []
    steps = range(1, args.steps + 1)
    for (images, labels), step in zip(batches(f, args, training), steps):
        n = args.batch_size
        main, aux = train.training_step(model, optimizer, images, labels, run_args, step, n)
        losses.append(main + run_args.aux_loss_ratio * aux)
        if step == 1:
            first = loss_and_gradients(f, model, optimizer, losses[0])
    return np.array(losses), first


def perturbed_runs(f, args, reference):
    """What rounding may do: losses (runs, steps), and the largest errors of the first step."""
    losses = []

    def firsts():
        for run in range(PERTURBED_RUNS):
            found, first = many_steps(f, args, build_perturbed(f, args, run))
            losses.append(found)
            yield first

    errors = largest_errors(firsts(), reference)
    return {"losses": np.array(losses), **errors}


def worker(args):
    """Run in the environment of `framework`: write what the check compares."""
    framework, task, path = args.worker
    if task == "port":
        return side.run(path)
    if framework == "jittor":
        f = Jittor(args.device)
    else:
        f = Torch(args.device, dtype=np.float64 if framework == "torch64" else np.float32)
    if task == "first step":
        return np.savez(path, **first_step(f, args))
    if task == "steps":
        f.module("distributed").start_processes(args.device)
        losses, _ = many_steps(f, args, build(f, args))
        if f.module("distributed").RANK == 0:
            np.savez(path, losses=losses)
        return None
    if task == "perturbed steps":
        with np.load(Path(path).parent / "torch64-first step-1.npz") as reference:
            return np.savez(path, **perturbed_runs(f, args, reference))
    from safetensors.numpy import save_file

    arrays = f.module("checkpoint").model_arrays(build_perturbed(f, args, run=0))
    # safetensors wants contiguous arrays; ascontiguousarray makes a scalar () a vector (1,).
    arrays = {key: np.ascontiguousarray(a).reshape(a.shape) for key, a in arrays.items()}
    save_file({f"model.{key}": value for key, value in arrays.items()}, path)


def run_task(args, framework, task, path, processes=1):
    """Run a worker in the environment of `framework`; it writes `path`."""
    names = ("model", "recipe", "img_size", "batch_size", "steps", "seed", "device", "data_dir")
    names += ("num_classes", "train_per_class")
    options = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    if args.plant_fault and framework == "jittor":
        options.append(f"--plant-fault={args.plant_fault}")
    options += ["--worker", framework, task, path]
    run_worker(args, framework, *options, processes=processes)


def results_of(args, framework, task, folder, processes=1):
    """What a worker measured, {name: array}."""
    path = folder / f"{framework}-{task}-{processes}.npz"
    run_task(args, framework, task, path, processes)
    with np.load(path) as arrays:
        return dict(arrays)


def adamw_of(arrays):
    """{name: parameter after AdamW's first step} from `arrays`, by the options of its group."""
    weights, gradients, options = (of_check(arrays, n) for n in ("weights", "gradients", "options"))
    after = {}
    for name, gradient in gradients.items():
        of_group = dict(zip(OPTIONS, options[name]))
        after |= adamw({name: weights[name]}, {name: gradient}, of_group)
    return after


def compare(check, jittor, torch, reference, perturbed):
    """The rows of a check.

    jittor, torch and reference are as `first_step` returns them, the first two with the "losses" of
    many steps; perturbed is as `perturbed_runs` returns it.
    """
    if check == "steps":
        return compare_steps(*(arrays["losses"] for arrays in (jittor, torch, perturbed)))
    ours, theirs, exact = (of_check(arrays, check) for arrays in (jittor, torch, reference))
    if check in EXACT:
        return compare_bits(check, ours, theirs)
    if check == "adamw":
        formula, torch_formula = map(adamw_of, (jittor, torch))
        ours, theirs = (of_check(arrays, "step") for arrays in (jittor, torch))
        return compare_arrays(check, ours, theirs, formula, torch_formula)
    keep = {}
    if check == "step":
        keep = determined(*(of_check(run, "gradients") for run in (torch, reference, perturbed)))
    return compare_arrays(check, ours, theirs, exact, exact, keep, of_check(perturbed, check))


def main():
    parser = make_parser()
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    if args.jittor or args.torch:
        return ports.main(args)
    if min(args.steps, args.processes) < 1 or args.batch_size < 2 or args.img_size < 32:
        parser.error("--steps and --processes must be at least 1, --batch-size 2, --img-size 32")
    if args.batch_size > args.num_classes * args.train_per_class:
        training_set = "--num-classes times --train-per-class images"
        parser.error(f"--batch-size is larger than the training set, {training_set}")
    if args.write_perturbed:
        return run_task(args, "torch", "write", args.write_perturbed)
    check_output(args.output)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        names = ("jittor", "torch", "torch64")
        jittor, torch, reference = (results_of(args, f, "first step", folder) for f in names)
        jittor |= results_of(args, "jittor", "steps", folder)
        torch |= results_of(args, "torch", "steps", folder)
        perturbed = results_of(args, "torch", "perturbed steps", folder)
        several, n = {}, args.processes
        for name, f in ("Jittor", "jittor"), ("PyTorch", "torch"):
            if n > 1:
                several[f"steps, {n} {name}"] = results_of(args, f, "steps", folder, n)
    size = f"{args.img_size}x{args.img_size}, batch {args.batch_size}, seed {args.seed}"
    print(f"{args.model}, {size}, {args.device.upper()}; errors are relative")
    rows, departures = [], []
    for check in (*CHECKS, *several):
        if check in several:
            losses = (run["losses"] for run in (several[check], torch, perturbed))
            found = list(compare_steps(*losses, check))
        else:
            found = list(compare(check, jittor, torch, reference, perturbed))
        line, first = summary(check, found)
        print(line, flush=True)
        departures += [f"{check}: {first}"] if first else []
        rows += found
    write_table(rows, args.output / "alignment.csv")
    draw(rows, args.output / "alignment.png")
    print(f"written: {args.output / 'alignment.csv'}, {args.output / 'alignment.png'}")
    if departures:
        print(f"The frameworks part. They first depart at {departures[0]}")
        sys.exit(1)
    print("The frameworks compute the same, apart by rounding.")


if __name__ == "__main__":
    main()
