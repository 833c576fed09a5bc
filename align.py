"""Run both frameworks side by side and print where they part: python align.py, or `make align`.

Each framework runs in a process and an environment of its own and writes an .npz file. The ladder, rung by rung:

    1 weights     parameters and buffers before training: keys, shapes, bits
    2 batches     two epochs of training and validation: bits
    3 forward     the output of every module, in order of execution, in training, in evaluation and in inference
                  (evaluation without gradients, where Jittor merges some of them)
    4 loss        5 gradients
    6 step        every parameter after one AdamW step, and BatchNorm's statistics;
      adamw       the same parameters against AdamW's formula in float64 on the framework's own gradients
    7 steps       the loss of each of --steps training steps

Rungs 1 and 2 are equal or not. For 3 to 6 the reference is the PyTorch model in float64, and the yardstick is how far
the same PyTorch model in float32 is from it: Jittor may be at most ten times as far for one array and three times for
the mean over a rung. (A first AdamW step divides a gradient by its own size, so that a single array after it is a matter
of chance where gradients are small: "step" is judged by its mean, "adamw" array by array.) For rung 7 the yardstick is
PyTorch against PyTorch with every initial weight moved by one unit in the last place, the largest gap of five such runs,
moved in different directions: Jittor's gap may be at most three times that at each step, both averaged over ten steps.
(One such run alone is no yardstick: over a hundred steps one may be sixteen times as far from PyTorch as another.)

Prints a table, writes logs/alignment.csv and logs/alignment.png. Exits with status 1 if a limit is passed and names
the first module that departs.
"""
import argparse
import csv
import hashlib
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent
EPS = float(np.finfo(np.float32).eps)
ARRAY_LIMIT, RUNG_LIMIT, STEP_LIMIT, WINDOW, MOVED_RUNS = 10, 3, 3, 10, 5
STATISTICS = ("running_mean", "running_var")


def make_parser():
    parser = argparse.ArgumentParser(prog="align.py", description="Show that the two frameworks compute the same.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--jittor-python", default=str(ROOT / ".venv-jittor/bin/python"), help="Python of Jittor's environment")
    add("--torch-python", default=str(ROOT / ".venv-torch/bin/python"), help="Python of PyTorch's environment")
    add("--model", default="overlock_xxt", help="variant")
    add("--img-size", type=int, default=64, help="images of another size are repeated or thinned out to this one")
    add("-b", "--batch-size", type=int, default=16, help="images a step")
    add("--steps", type=int, default=100, help="training steps of rung 7")
    add("--seed", type=int, default=0, help="of initial weights and batches")
    add("--data-dir", type=Path, default=ROOT / "data" / "tiny-imagenet-200", help="a folder laid out like TinyImageNet")
    add("--num-classes", type=int, default=20, help="use the first classes in sorted order")
    add("--train-per-class", type=int, default=50, help="training images of each class")
    add("--output", type=Path, default=ROOT / "logs", help="folder for alignment.csv and alignment.png")
    add("--plant-fault", metavar="MODULE", help="lose the residual of this ResDWConv in Jittor, to see the ladder find it")
    add("--write-moved", type=Path, metavar="FILE",
        help="only write the initial weights, each moved by one unit in the last place, for torch_impl/train.py --init")
    add("--worker", nargs=3, metavar=("FRAMEWORK", "TASK", "FILE"), help=argparse.SUPPRESS)
    return parser


class Jittor:
    def __init__(self):
        import models
        import train
        from jittor_setup import jt
        self.jt, self.models, self.train = jt, models, train
        self.defaults = train.make_parser().parse_args([])

    def array(self, images):
        return self.jt.array(images)

    def labels(self, labels):
        return self.jt.array(labels.astype(np.int32))

    def numpy(self, x):
        return x.numpy()

    def build(self, args):
        model = self.models.OverLoCK(**self.models.VARIANTS[args.model], num_classes=args.num_classes, seed=args.seed)
        if args.plant_fault:
            from jittor import nn
            modules = dict(model.named_modules())
            if type(modules.get(args.plant_fault)).__name__ != "ResDWConv":
                sys.exit(f"{args.plant_fault} is not a ResDWConv of {args.model}")
            broken = modules[args.plant_fault]
            broken.execute = lambda x: nn.Conv2d.execute(broken, x)
        return model

    def record(self, module, store):
        run = module.execute

        def execute(*inputs):
            output = run(*inputs)
            store(output)
            return output
        module.execute = execute

    def is_array(self, x):
        return isinstance(x, self.jt.Var)

    def no_grad(self):
        return self.jt.no_grad()

    def gradients(self, loss, parameters):
        return self.jt.grad(loss, parameters)

    def step(self, optimizer, loss):
        optimizer.step(loss)
        self.jt.sync_all()


class Torch:
    def __init__(self, double, moved=None):
        """moved: None, or the number that says in which directions every weight moves by one unit in the last place."""
        import models
        import torch
        import train
        self.torch, self.models, self.train = torch, models, train
        self.defaults = train.make_parser().parse_args([])
        self.dtype, self.moved = torch.float64 if double else torch.float32, moved

    def array(self, images):
        return self.torch.from_numpy(images).to(self.dtype)

    def labels(self, labels):
        return self.torch.from_numpy(labels)

    def numpy(self, x):
        return x.detach().numpy()

    def build(self, args):
        model = self.models.OverLoCK(**self.models.VARIANTS[args.model], num_classes=args.num_classes, seed=args.seed)
        if self.moved is not None:
            generator = np.random.default_rng([args.seed, self.moved])
            for parameter in model.parameters():
                value = parameter.detach().numpy()
                direction = np.where(generator.random(value.shape) < 0.5, np.float32(-np.inf), np.float32(np.inf))
                parameter.data.copy_(self.torch.from_numpy(np.nextafter(value, direction)))
        return model.to(self.dtype)

    def record(self, module, store):
        module.register_forward_hook(lambda _, inputs, output: store(output))

    def is_array(self, x):
        return self.torch.is_tensor(x)

    def no_grad(self):
        return self.torch.no_grad()

    def gradients(self, loss, parameters):
        return self.torch.autograd.grad(loss, parameters, retain_graph=True)

    def step(self, optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def resized(images, side):
    """(n, 3, H, W) -> (n, 3, side, side), each pixel a copy of the nearest one: the same bits everywhere."""
    rows, cols = (np.arange(side) * size // side for size in images.shape[2:])
    return np.ascontiguousarray(images[:, :, rows][:, :, :, cols])


def load_data(args):
    """The training and the validation split."""
    from dataset import load
    return load(args.data_dir, args.num_classes, args.train_per_class, 1, False)


def batches(args, train):
    """Training batches of one epoch after another, images (n, 3, side, side) and labels (n,), and no short ones."""
    epoch = 0
    while True:
        epoch += 1
        for images, labels in train.batches(args.batch_size, args.seed, epoch):
            if len(labels) == args.batch_size:
                yield resized(images, args.img_size), labels


def loss_of(f, output, labels):
    main, aux = (f.train.cross_entropy(output[head], labels) for head in ("main", "aux"))
    return main + f.defaults.aux_loss_ratio * aux


def one_step(f, args):
    """Rungs 1 to 6: {"rung/name": array}, in order of execution."""
    from checkpoint import model_arrays, trainable
    arrays = {}
    model = f.build(args)
    arrays |= {f"weights/{name}": value.copy() for name, value in model_arrays(model).items()}
    train, val = load_data(args)
    for epoch in (1, 2):
        for split, data in (("training", train.batches(args.batch_size, args.seed, epoch)), ("validation", val.batches(args.batch_size))):
            for i, (images, labels) in enumerate(data):
                digest = hashlib.sha256(images.tobytes() + labels.tobytes()).digest()
                arrays[f"batches/{split}, epoch {epoch}, batch {i}"] = np.frombuffer(digest, np.uint8)

    outputs = {}
    for name, module in model.named_modules():
        def store(output, name=name):
            # A block of Focus-Net returns features and overview, the last one no overview, and calls its drop_path twice.
            for i, array in enumerate(output if isinstance(output, (tuple, list)) else [output]):
                if f.is_array(array):
                    key = f"{name}[{i}]" if i else name
                    outputs[f"{key}, second call" if key in outputs else key] = array
        if name:
            f.record(module, store)
    images, labels = next(batches(args, train))
    images, labels = f.array(images), f.labels(labels)
    model.eval()
    for mode in ("evaluation", "inference"):
        with f.no_grad() if mode == "inference" else nullcontext():
            model(images)
        arrays |= {f"forward/{mode} {name}": f.numpy(value) for name, value in outputs.items()}
        outputs.clear()
    model.train()
    loss = loss_of(f, model(images), labels)
    arrays |= {f"forward/training {name}": f.numpy(value) for name, value in outputs.items()}
    arrays["loss/total"] = f.numpy(loss).reshape(1)
    parameters = trainable(model)
    gradients = f.gradients(loss, list(parameters.values()))
    arrays |= {f"gradients/{name}": f.numpy(value) for name, value in zip(parameters, gradients)}
    optimizer = f.train.make_optimizer(model, f.defaults)
    f.step(optimizer, loss)
    arrays |= {f"step/{name}": value for name, value in model_arrays(model).items() if not name.endswith("num_batches_tracked")}
    return arrays


def many_steps(f, args):
    """Rung 7: the loss before each step."""
    model = f.build(args)
    model.train()
    train, _ = load_data(args)
    optimizer = f.train.make_optimizer(model, f.defaults)
    losses = []
    for (images, labels), _ in zip(batches(args, train), range(args.steps)):
        loss = loss_of(f, model(f.array(images)), f.labels(labels))
        f.step(optimizer, loss)
        losses.append(loss.item())
    return {"losses": np.array(losses)}


def worker(args):
    framework, task, path = args.worker
    sys.path.insert(0, str(ROOT / ("jittor_impl" if framework == "jittor" else "torch_impl")))
    if task == "write":
        from checkpoint import model_arrays
        from safetensors.numpy import save_file
        arrays = model_arrays(Torch(double=False, moved=0).build(args))
        return save_file({f"model.{name}": np.ascontiguousarray(a).reshape(a.shape) for name, a in arrays.items()}, path)
    if task == "moved":
        losses = [many_steps(Torch(double=False, moved=run), args)["losses"] for run in range(MOVED_RUNS)]
        return np.savez(path, losses=np.array(losses))  # (runs, steps)
    f = Jittor() if framework == "jittor" else Torch(double=framework == "torch64")
    np.savez(path, **(one_step(f, args) if task == "one" else many_steps(f, args)))


def run_worker(args, framework, task, path):
    """Run a worker in the environment of `framework`; it writes `path`."""
    options = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in
               ("model", "img_size", "batch_size", "steps", "seed", "data_dir", "num_classes", "train_per_class")]
    if args.plant_fault and framework == "jittor":
        options.append(f"--plant-fault={args.plant_fault}")
    python = args.jittor_python if framework == "jittor" else args.torch_python
    try:
        result = subprocess.run([python, __file__, *options, "--worker", framework, task, path], capture_output=True, text=True)
    except OSError:
        fail(f"no Python at {python}; run `make environments`, or give --jittor-python and --torch-python")
    if result.returncode != 0:
        fail(f"{framework} failed: {(result.stderr.strip() or 'no message').splitlines()[-1]}")


def results_of(args, framework, task, folder):
    """What a worker measured, {name: array}."""
    path = folder / f"{framework}-{task}.npz"
    run_worker(args, framework, task, path)
    with np.load(path) as arrays:
        return dict(arrays)


def fail(message):
    print(f"align.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def relative_errors(actual, reference, floor):
    """(maximum, mean) of |actual - reference|, relative to those of |reference|, or to `floor` if that is larger."""
    difference, size = np.abs(actual.astype(np.float64) - reference), np.abs(reference)
    return difference.max() / max(size.max(), floor), difference.mean() / max(size.mean(), floor)


def compare_bits(rung, jittor, torch):
    """Rows of rungs 1 and 2."""
    for name in [*torch, *(name for name in jittor if name not in torch)]:
        same = (name in jittor and name in torch and jittor[name].dtype == torch[name].dtype
                and np.array_equal(jittor[name], torch[name]))
        yield dict(rung=rung, name=name, ok=same)


def determined(torch, reference):
    """{name: which elements of a parameter's gradient have a sign that float32 can tell}: ten times its error or more."""
    return {name: np.abs(array) > 10 * np.abs(torch[name] - array).max() for name, array in reference.items()}


def adamw(arrays):
    """{name: parameter after a first step of AdamW from the weights and gradients in `arrays`}, in float64."""
    lr, eps, decay = 1e-3, 1e-8, 0.01  # train.py's defaults
    weights = of_rung(arrays, "weights")
    return {name: weights[name] * (1 - lr * decay) - lr * g / (np.abs(g) + eps)
            for name, g in ((name, g.astype(np.float64)) for name, g in of_rung(arrays, "gradients").items())}


def compare_arrays(rung, jittor, torch, reference, torch_reference, keep):
    """Rows of rungs 3 to 6, of the elements to keep: {name: mask}, everything where there is none.

    PyTorch's error is that against `torch_reference`. What Jittor's inference merges into one operator has no counterpart
    and is left out.
    """
    missing = [name for name in reference if name not in jittor and not name.startswith("inference ")]
    yield from (dict(rung=rung, name=f"{name} is missing", ok=False) for name in missing)
    # Some gradients are zero in exact arithmetic, such as that of a bias before BatchNorm: their errors are relative to
    # the gradients at large.
    floor = np.median([np.abs(array).mean() for array in reference.values()])
    for name in (name for name in reference if name in jittor):
        if jittor[name].shape != reference[name].shape:
            yield dict(rung=rung, name=f"{name} has shape {jittor[name].shape}, not {reference[name].shape}", ok=False)
            continue
        kept = keep.get(name, np.ones(reference[name].shape, bool))
        if not kept.any():
            continue
        largest, mean = relative_errors(jittor[name][kept], reference[name][kept], floor)
        torch_largest, torch_mean = relative_errors(torch[name][kept], torch_reference[name][kept], floor)
        # No yardstick is below half a unit in the last place: a float32 array cannot be nearer on the whole.
        limit = ARRAY_LIMIT * max(torch_mean, EPS / 2) if rung != "step" or name.endswith(STATISTICS) else np.inf
        yield dict(rung=rung, name=name, max_error=largest, mean_error=mean, torch_max_error=torch_largest,
                   torch_mean_error=torch_mean, limit=limit, ok=bool(mean <= limit))


def smoothed(gaps):
    """Means over windows of ten steps, (runs, steps) -> (runs, windows); a shorter run is one window."""
    return np.lib.stride_tricks.sliding_window_view(gaps, min(WINDOW, gaps.shape[1]), axis=1).mean(2)


def compare_steps(jittor, torch, moved):
    """Rows of rung 7, one a step; the limit is that of the window that ends there.

    jittor and torch are losses, (steps,), moved those of several runs, (runs, steps).
    """
    gap, chance = (np.abs(runs - torch) / np.abs(torch) for runs in (jittor[None], moved))
    limits = STEP_LIMIT * np.maximum(smoothed(chance).max(0), EPS / 2)
    for i, (ours, limit) in enumerate(zip(smoothed(gap)[0], limits), min(WINDOW, len(torch)) - 1):
        yield dict(rung="steps", name=f"step {i + 1}", max_error=gap[0, i], mean_error=ours, torch_max_error=chance[:, i].max(),
                   torch_mean_error=limit / STEP_LIMIT, limit=limit, ok=bool(ours <= limit))


def of_rung(arrays, rung):
    return {name.partition("/")[2]: value for name, value in arrays.items() if name.startswith(f"{rung}/")}


def summary(rung, rows):
    """One line of the table, and whether the rung holds."""
    failed = [row for row in rows if not row["ok"]]
    if rung in ("weights", "batches"):
        text = f"{len(rows)} arrays, {len(rows) - len(failed)} equal bit by bit"
    else:
        measured = [row for row in rows if "mean_error" in row]
        if not measured:
            return f"{rung:9} FAILED, nothing to compare", "everything"
        worst = max(measured, key=lambda row: row["mean_error"] / row["limit"])
        mean, torch_mean = (np.mean([row[key] for row in measured]) for key in ("mean_error", "torch_mean_error"))
        text = (f"{len(rows):4} | max {max(row['max_error'] for row in measured):.1e}  mean {mean:.1e} | yardstick: "
                f"max {max(row['torch_max_error'] for row in measured):.1e}  mean {torch_mean:.1e} | nearest to its limit: "
                f"{worst['name']}, {worst['mean_error'] / worst['limit']:.2f} of it")
        if rung != "steps" and mean > RUNG_LIMIT * max(torch_mean, EPS / 2):
            failed = failed or [worst]
    verdict = "ok" if not failed else f"FAILED, {len(failed)} beyond the limit, the first is {failed[0]['name']}"
    return f"{rung:9} {text} | {verdict}", failed[0]["name"] if failed else None


def draw(rows, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    forward = [row for row in rows if row["rung"] == "forward" and "mean_error" in row and row["name"].startswith("training")]
    steps = [row for row in rows if row["rung"] == "steps"]
    for axes, numbers, shown, ours, theirs, label in (
            (left, range(len(forward)), forward, "mean_error", "torch_mean_error", "PyTorch in float32"),
            (right, [int(row["name"].split()[1]) for row in steps], steps, "max_error", "torch_max_error",
             f"PyTorch, weights moved by one unit in the last place, largest of {MOVED_RUNS}")):
        axes.plot(numbers, [row[theirs] for row in shown], color="#f0ad30", linewidth=2.5, label=label)
        axes.plot(numbers, [row[ours] for row in shown], color="#00466e", linewidth=1, label="Jittor")
        axes.set_yscale("log")
        axes.legend()
    left.set(title="Every module in order of execution", xlabel="module", ylabel="mean error relative to PyTorch in float64")
    right.set(title="Training step after training step", xlabel="step", ylabel="relative gap of the loss to PyTorch")
    figure.savefig(path, dpi=150)


def main():
    parser = make_parser()
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    if args.steps < 1 or args.batch_size < 2 or args.img_size < 32:
        parser.error("--steps must be at least 1, --batch-size 2, --img-size 32")
    if args.batch_size > args.num_classes * args.train_per_class:
        parser.error("--batch-size is larger than the training set, --num-classes times --train-per-class images")
    if args.write_moved:
        return run_worker(args, "torch", "write", args.write_moved)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "alignment.csv").touch()
    except OSError as error:
        fail(f"cannot write to {args.output} ({error.strerror}); give another --output")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        jittor, torch, reference = (results_of(args, name, "one", folder) for name in ("jittor", "torch", "torch64"))
        runs = [results_of(args, *task, folder)["losses"] for task in (("jittor", "many"), ("torch", "many"), ("torch", "moved"))]
    print(f"{args.model}, {args.img_size}x{args.img_size}, batch {args.batch_size}, seed {args.seed}; errors are relative")
    rows, departures = [], []
    for rung in ("weights", "batches", "forward", "loss", "gradients", "step", "adamw", "steps"):
        ours, theirs, exact = (of_rung(arrays, rung) for arrays in (jittor, torch, reference))
        if rung == "steps":
            found = list(compare_steps(*runs))
        elif rung in ("weights", "batches"):
            found = list(compare_bits(rung, ours, theirs))
        elif rung == "adamw":
            formula, torch_formula = adamw(jittor), adamw(torch)
            ours, theirs = ({name: of_rung(arrays, "step")[name] for name in formula} for arrays in (jittor, torch))
            found = list(compare_arrays(rung, ours, theirs, formula, torch_formula, {}))
        else:
            keep = determined(of_rung(torch, "gradients"), of_rung(reference, "gradients")) if rung == "step" else {}
            found = list(compare_arrays(rung, ours, theirs, exact, exact, keep))
        line, first = summary(rung, found)
        print(line, flush=True)
        departures += [f"{rung}: {first}"] if first else []
        rows += found
    with open(args.output / "alignment.csv", "w", newline="") as f:
        columns = ["rung", "name", "max_error", "mean_error", "torch_max_error", "torch_mean_error", "limit", "ok"]
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, args.output / "alignment.png")
    print(f"written: {args.output / 'alignment.csv'}, {args.output / 'alignment.png'}")
    if departures:
        print(f"The frameworks part. They first depart at {departures[0]}")
        sys.exit(1)
    print("The frameworks compute the same, apart by rounding.")


if __name__ == "__main__":
    main()
