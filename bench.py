"""Time both frameworks side by side: python bench.py, or `make bench`.

Every measurement is a process of its own, after warm-up; the implementations take turns
(A B C A B C ...), so that a slow minute of the machine hits all of them. A turn beside which a
fixed matrix product is slow does not count; the ratio has its range over the others. They are
Jittor, PyTorch as requirements-torch.txt pins it, a current one ("current"), and that one with
torch.compile ("compiled", where --compile asks for it): Jittor's ratio is to the fastest of these.
And PyTorch with NATTEN's na2d_av, which is what the official OverLoCK runs, at the larger batch
only: "natten" as pip builds it for a CPU, with no optimisation and for one thread; "natten -O3"
the same source with the compiler flags that it lacks.

Prints a table, writes logs/bench.csv and logs/bench.png.

The floor of a row is what the machine could do at best: its multiply-adds at the matrix rate
measured here, or its bytes at the copy bandwidth measured here, whichever takes longer.

With --device cuda all of it is measured on the GPU, at batches that fill one, and the memory is the
GPU's.
"""

import argparse
import csv
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from tools.frameworks import ROOT, Jittor, Torch

# PyTorch's own na2d_av; on a GPU the choice is between two by the size of the map.
NA2D = {"cpu": "dense", "cuda": "auto"}
# How much longer than at its best a fixed matrix product may take beside a turn that counts.
NOISE = 0.1
# Versions and modes of PyTorch, the same code in each.
TORCHES = ("torch", "current", "compiled")
IMPLEMENTATIONS = ("jittor", *TORCHES, "natten", "natten -O3")
# Merged: after reparam() in both, and with BatchNorms folded into the convolutions before them.
STEPS = ("training step", "inference", "merged inference")
# variant, image side, batch sizes, the larger first
MODELS = {
    "cpu": [("overlock_xxt", 64, (64, 16)), ("overlock_xt", 224, (8, 2))],
    "cuda": [("overlock_xxt", 64, (64, 16)), ("overlock_xt", 224, (128, 64))],
}
# na2d_av: (batch, heads, height, width, dim), kernel; two that XXT uses at 64 pixels, two that XT
# uses at 224 pixels, and two large maps. On a GPU, XT's batch of 8 is that of its models.
WINDOWS = [
    ((64, 2, 9, 9, 24), 9),
    ((64, 4, 7, 7, 16), 7),
    ((8, 8, 14, 14, 16), 13),
    ((8, 12, 7, 7, 14), 7),
    ((1, 8, 56, 56, 16), 13),
    ((1, 2, 200, 320, 16), 13),
]
# depthwise convolution and BatchNorm: (batch, channels, height, width), kernel
MAPS = [
    ((64, 24, 16, 16), 13),
    ((64, 48, 16, 16), 3),
    ((64, 96, 4, 4), 9),
    ((8, 56, 56, 56), 17),
    ((8, 256, 14, 14), 3),
]


def measure(step, seconds, synchronize=lambda: None):
    """Warm up, then repeat `step` for about `seconds`, at least twice; each ends by synchronize().

    Returns the times in seconds.
    """

    def step_and_wait():
        step()
        synchronize()

    start = time.perf_counter()
    step_and_wait()
    if time.perf_counter() - start < seconds:
        step_and_wait()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < end and len(times) < 50:
        start = time.perf_counter()
        step_and_wait()
        times.append(time.perf_counter() - start)
    return times


def random_array(shape):
    import numpy as np

    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@dataclass
class ModelTask:
    """A training step, as train.py makes it, or inference."""

    kind: str
    variant: str
    side: int
    batch: int
    uses_natten: bool
    seconds = 6

    def __str__(self):
        return f"{self.kind}, {self.variant}, {self.side}x{self.side}, batch {self.batch}"

    def step(self, f):
        import numpy as np

        train = f.module("train")
        args = f.train_args("--model", self.variant, "--num-classes", "20")
        model, training = train.make_model(args), self.kind == "training step"
        images = random_array((self.batch, 3, self.side, self.side))
        labels = np.random.default_rng(0).integers(0, args.num_classes, self.batch)
        model.train() if training else model.eval()
        if self.kind == "merged inference":
            model.reparam()
            f.fold_batch_norms(model)
        optimizer = train.make_optimizer(model, args) if training else None
        model = f.prepare(model)
        if not training:
            return lambda: f.run_inference(model, images)
        return lambda: train.training_step(model, optimizer, images, labels, args)

    def work(self):
        """Every tensor in and out once, three times forward for training."""
        models = Torch().module("models")
        model = models.OverLoCK(**models.VARIANTS[self.variant], num_classes=20).eval()
        if self.kind == "merged inference":
            model.reparam()
        sizes = []
        layers = [module for module in model.modules() if not list(module.children())]
        hooks = [m.register_forward_hook(lambda _, i, o: sizes.append(o.numel())) for m in layers]
        products = self.batch * count_products(model, self.side)
        for hook in hooks:
            hook.remove()
        parameters = sum(p.numel() for p in model.parameters())
        bytes_moved = 4 * (parameters + 2 * self.batch * sum(sizes))
        passes = 3 if self.kind == "training step" else 1
        return passes * products, passes * bytes_moved


@dataclass
class LoadingTask:
    """Batches as training takes them from memory: shuffled, flipped, normalised."""

    side: int
    batch: int
    kind = "data loading"
    uses_natten = False
    seconds = 2

    def __str__(self):
        return f"{self.kind}, {self.side}x{self.side}, batch {self.batch}"

    def step(self, f):
        import numpy as np

        data = f.module("dataset").TinyImageNet([], [], [], progress=False)
        shape = (64 * self.batch, self.side, self.side, 3)
        data.images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        data.labels = np.zeros(len(data.images), np.int64)
        batches = iter(())

        def step():
            nonlocal batches
            if next(batches, None) is None:
                batches = data.batches(self.batch, 0, 1)
                next(batches)

        return step

    def work(self):
        return 0, self.batch * 3 * self.side**2 * (1 + 4)  # bytes in, floats out


@dataclass
class PhotographsTask:
    """Photographs of 500x375 pixels in files to batches by the paper's recipe, on two processes.

    Ours in Jittor's column, beside timm's loader with its transforms and Mixup in PyTorch's.
    """

    side: int
    batch: int
    kind = "reading photographs"
    uses_natten = False
    seconds = 6

    def __str__(self):
        return f"{self.kind}, {self.side}x{self.side}, batch {self.batch}"

    def step(self, f):
        self.folder = tempfile.TemporaryDirectory()
        draw_photographs(Path(self.folder.name), 8 * self.batch)
        batches = self.ours(f) if f.name == "jittor" else self.timms()
        return lambda: next(batches)

    def ours(self, f):
        augment, dataset = f.module("augment"), f.module("dataset")
        transform = augment.TrainTransform(self.side)
        crops = dataset.Crops(self.side, 0.925, transform, workers=2, cache_bytes=0)
        data, _ = dataset.load(self.folder.name, 2, None, None, False, crops)
        data.mixup = augment.Mixup(num_classes=2)
        for epoch in itertools.count(1):
            yield from data.batches(self.batch, 0, epoch)

    def timms(self):
        from timm.data import Mixup, create_dataset, create_loader

        data = create_dataset("", self.folder.name, split="train", is_training=True)
        recipe = dict(auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, re_mode="pixel")
        recipe |= dict(interpolation="random", is_training=True, use_prefetcher=False)
        loading = dict(num_workers=2, pin_memory=False, persistent_workers=True)
        size = (3, self.side, self.side)
        loader, mixup = create_loader(data, size, self.batch, **recipe, **loading), Mixup(0.8, 1.0)
        while True:
            yield from itertools.starmap(mixup, loader)

    def work(self):
        return 0, self.batch * 3 * (500 * 375 + self.side**2 * (1 + 4))


def draw_photographs(folder, count):
    """`count` JPEG files in two classes of train/, and one each in val/."""
    import numpy as np
    from PIL import Image

    for split, files in (("train", count // 2), ("val", 1)):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for i in range(files):
                pixels = np.random.default_rng(i).integers(0, 256, (25, 34, 3)).astype(np.uint8)
                photo = Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC)
                photo.save(folder / split / name / f"{i}.jpg", quality=90)


@dataclass
class OperatorTask:
    """An operator, forward and backward."""

    kind: str
    shape: tuple
    kernel: int
    seconds = 2

    def __str__(self):
        shape = "x".join(map(str, self.shape))
        return f"{self.kind}, {shape}" + (f", kernel {self.kernel}" if self.kernel else "")

    @property
    def uses_natten(self):
        return self.kind == "na2d_av"

    def step(self, f):
        if self.kind == "na2d_av":
            na2d_av, value = f.module("ops").na2d_av, f.array(random_array(self.shape))
            attn = f.array(random_array((*self.shape[:4], self.kernel**2)))
            arrays, kernel = (attn, value), self.kernel
            return lambda: f.run_forward_backward(lambda a, v: na2d_av(a, v, kernel), arrays)
        models, x = f.module("models"), f.feature_map(random_array(self.shape))
        channels = self.shape[1]
        if self.kind == "depthwise":
            settings = dict(padding=self.kernel // 2, groups=channels, bias=False)
            conv = f.place(models.Conv2d(channels, channels, self.kernel, **settings))
            return lambda: f.run_forward_backward(lambda x, w: conv(x), (x, conv.weight))
        norm = f.place(models.BatchNorm2d(channels))
        return lambda: f.run_forward_backward(lambda x, w, b: norm(x), (x, norm.weight, norm.bias))

    def work(self):
        size = math.prod(self.shape)
        if self.kind == "batch norm":
            return 8 * size, 4 * 5 * size
        if self.kind == "na2d_av":
            weights = size // self.shape[4] * self.kernel**2
            return 3 * size * self.kernel**2, 4 * (3 * weights + 5 * size)
        # A window's taps that fall on the map, in all pixels together: padding needs no product.
        reach = self.kernel // 2
        taps = [
            sum(min(i + reach, n - 1) - max(i - reach, 0) + 1 for i in range(n))
            for n in self.shape[2:]
        ]
        products = math.prod(self.shape[:2]) * math.prod(taps)
        return 3 * products, 4 * 5 * size


def tasks(device):
    for variant, side, batches in MODELS[device]:
        for batch in batches:
            natten = batch == batches[0]
            yield from (ModelTask(kind, variant, side, batch, natten) for kind in STEPS)
    yield LoadingTask(64, 64)
    yield PhotographsTask(224, 32)
    of_models = {8: MODELS[device][1][2][0]}

    def resized(shape):
        return (of_models.get(shape[0], shape[0]), *shape[1:])

    for shape, kernel in WINDOWS:
        yield OperatorTask("na2d_av", resized(shape), kernel)
    for shape, kernel in MAPS:
        shape = resized(shape)
        yield OperatorTask("depthwise", shape, kernel)
        yield OperatorTask("batch norm", shape, 0)


def find_task(name, device):
    return next(task for task in tasks(device) if str(task) == name)


def adapter(implementation, args):
    """The framework under measurement in this process."""
    options = tuple(args.train_options.split())
    if implementation == "jittor":
        return Jittor(args.device, options)
    na2d = "natten" if implementation.startswith("natten") else NA2D[args.device]
    options = (*options, "--na2d", na2d)
    return Torch(args.device, options, compiles=implementation == "compiled")


def gpu_memory():
    """MiB in use on the machine's GPUs, by whichever process."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return sum(map(float, lines))


def peak_memory():
    """MiB, that of this process on the host."""
    # Not getrusage's ru_maxrss, which begins with that of the parent process.
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def worker(args):
    """Run one measurement in this process and print it as JSON."""
    implementation, name = args.worker
    before = gpu_memory() if args.device == "cuda" else 0
    f, task = adapter(implementation, args), find_task(name, args.device)
    times = measure(task.step(f), task.seconds, f.synchronize)
    # Both frameworks keep what they freed, so at the end a GPU's memory is that at the peak.
    peak = gpu_memory() - before if args.device == "cuda" else peak_memory()
    print("RESULT " + json.dumps({"times": times, "peak": peak, "threads": f.threads()}))


def machine_rates(device):
    """Multiply-adds/s of a large matrix product and bytes/s of a large copy, all cores at work."""
    f = Torch(device)
    side, size = (2048, 2**26) if device == "cpu" else (8192, 2**28)
    a, b = f.torch.randn(2, side, side, device=device)
    products = side**3 / min(measure(lambda: a @ b, 2, f.synchronize))
    source, target = f.torch.randn(2, size, device=device)
    copy = 2 * size * 4 / min(measure(lambda: target.copy_(source), 2, f.synchronize))
    return products, copy


def product_time(device):
    """Median seconds of a fixed matrix product, which tells whether the machine is quiet."""
    f, side = Torch(device), 1024 if device == "cpu" else 8192
    a, b = f.torch.randn(2, side, side, device=device)
    return statistics.median(measure(lambda: a @ b, 0.3, f.synchronize))


def device_name(device):
    return (
        Torch(device).torch.cuda.get_device_name()
        if device == "cuda"
        else f"{os.cpu_count()} cores"
    )


def count_products(model, side):
    """Multiply-adds of one image of side x side.

    Convolutions and matrix products by PyTorch's counter, na2d_av by its definition.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    window_products = 0

    def counted_na2d_av(attn, value, kernel_size):
        nonlocal window_products
        window_products += attn.numel() * value.shape[-1]
        return torch.zeros_like(value)

    contmix = Torch().module("contmix")
    counter = FlopCounterMode(display=False)
    with mock.patch.object(contmix, "na2d_av", counted_na2d_av), torch.no_grad(), counter:
        model(torch.zeros(1, 3, side, side))
    return counter.get_total_flops() / 2 + window_products


def fail(implementation, what, result):
    reason = (result.stderr.strip() or "?").splitlines()[-1]
    sys.exit(f"bench.py: error: {implementation} failed at {what}: {reason}")


def device_options(args):
    return [f"--device={args.device}", f"--train-options={args.train_options}"]


def run_worker(args, python, implementation, task, environment):
    command = [python, __file__, *device_options(args), "--worker", implementation, str(task)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        fail(implementation, task, result)
    return json.loads(lines[0][len("RESULT ") :])


def first_step(args, python, implementation, home):
    """Seconds from the start of a process to the end of its first training step, XXT, batch 64."""
    # JITTOR_HOME would come before HOME.
    environment = {name: value for name, value in os.environ.items() if name != "JITTOR_HOME"}
    command = [python, __file__, *device_options(args), "--first-step", implementation]
    start = time.perf_counter()
    environment["HOME"] = str(home)
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode != 0:
        fail(implementation, "its first step", result)
    return time.perf_counter() - start


def make_parser():
    parser = argparse.ArgumentParser(
        prog="bench.py", description="Time Jittor, PyTorch and PyTorch with NATTEN."
    )
    add = parser.add_argument
    add("--jittor-python", default=str(ROOT / ".venv-jittor/bin/python"))
    add("--torch-python", default=str(ROOT / ".venv-torch/bin/python"))
    current = "another environment with PyTorch (make .venv-current/ready)"
    add("--current-python", default=str(ROOT / ".venv-current/bin/python"), help=current)
    add(
        "--compile", action="store_true", help="also time torch.compile, which compiles for minutes"
    )
    natten = "folder of a NATTEN built with optimisation (make bench)"
    add("--natten-o3", type=Path, default=ROOT / ".natten-o3", help=natten)
    add("--rounds", type=int, default=3, help="times that each implementation takes its turn")
    add("--only", default="", help="only rows whose description contains this")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="what is measured")
    options = "further options of both train.py for the rows of models, in quotes"
    add("--train-options", default="", metavar="OPTIONS", help=options)
    cold = "also time a first step with an empty Jittor cache, which takes minutes"
    add("--cold", action="store_true", help=cold)
    add("--output", type=Path, default=ROOT / "logs")
    add("--worker", nargs=2, metavar=("IMPLEMENTATION", "TASK"), help=argparse.SUPPRESS)
    add("--first-step", metavar="IMPLEMENTATION", help=argparse.SUPPRESS)
    return parser


def find_implementations(args):
    """{implementation: (its Python, its processes' environment)}, of those that are installed."""
    folder = args.natten_o3.resolve()
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    optimised = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    found = {"jittor": (args.jittor_python, None), "torch": (args.torch_python, None)}
    versions = {}
    for name, python in (("torch", args.torch_python), ("current", args.current_python)):
        command = [python, "-c", "import torch; print(torch.__version__)"]
        with suppress(OSError):
            result = subprocess.run(command, capture_output=True, text=True)
            versions |= {name: result.stdout.strip()} if result.returncode == 0 else {}
    print("PyTorch: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    newest = args.torch_python
    if "current" in versions:
        found["current"] = (newest := args.current_python), None
    if args.compile:
        found["compiled"] = newest, None
    code = "import natten; from natten.functional import na2d_av; print(natten.__file__)"
    if args.device == "cuda":
        code += "; assert natten.has_cuda()"
    for name, environment in (("natten", None), ("natten -O3", optimised)):
        command = [args.torch_python, "-c", code]
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        is_other = environment and not Path(result.stdout.strip()).is_relative_to(folder)
        if result.returncode != 0 or is_other:
            print(f"{name} is not installed: this build of the official operator is left out")
        else:
            found[name] = args.torch_python, environment
    return found


def first_steps(args, environments):
    """(name, Jittor's seconds, PyTorch's) of the first steps of a process."""
    names = ("jittor", "torch")
    jittor, torch = (first_step(args, environments[f][0], f, Path.home()) for f in names)
    yield "first training step of a new process", jittor, torch
    if args.cold:
        with tempfile.TemporaryDirectory() as home:
            jittor = first_step(args, environments["jittor"][0], "jittor", home)
        yield "the same with an empty Jittor cache", jittor, torch


def print_row(row, names):
    cells = [f"{row['task']:46}"]
    for name in names:
        time_ms, spread = row[f"{name}_ms"], row[f"{name}_spread_ms"]
        cells.append(f"{'-':>15}" if time_ms == "" else f"{time_ms:9.2f} +-{spread:4.1f}")
    turns = f"({row['ratio_min']:.2f}-{row['ratio_max']:.2f})"
    cells.append(f"{row['jittor_ms'] / row['best_torch_ms']:8.2f} {turns} {row['floor_ms']:8.2f}")
    cells.append(f"{row['jittor_ms'] / row['floor_ms']:8.1f}")
    cells.append(f"{row['jittor_peak_mib']:7.0f} {row['torch_peak_mib']:9.0f}")
    rates = [row[f"{name}_images_per_s"] for name in ("jittor", "torch")]
    if rates[0] != "":
        cells.append(f"  {rates[0]:.0f} / {rates[1]:.0f} images/s")
    print(" ".join(cells), flush=True)


def main():
    parser = make_parser()
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    if args.first_step:
        task = find_task("training step, overlock_xxt, 64x64, batch 64", args.device)
        return task.step(adapter(args.first_step, args))()
    chosen = [task for task in tasks(args.device) if args.only in str(task)]
    if not chosen:
        parser.error(f"no row's description contains {args.only!r}")
    try:
        products_rate, byte_rate = machine_rates(args.device)
    except SystemExit as error:  # there is no such device
        sys.exit(f"bench.py: error: {error}")
    environments = find_implementations(args)
    print(
        f"{device_name(args.device)}; matrix product {products_rate / 1e9:.0f} G multiply-adds/s, "
        f"copy {byte_rate / 1e9:.1f} GB/s\nmedian milliseconds +- half of the interquartile range; "
        "peak memory of the process in MiB"
    )
    names = " ".join(f"{name:>15}" for name in environments)
    ratios = f"{'jt/best':>8} {'(turns)':>11} {'floor':>8} {'jt/floor':>8}"
    print(f"{'':46} {names} {ratios} {'jt MiB':>7} {'torch MiB':>9}")
    rows = []
    for task in chosen:
        row = bench(task, environments, args)
        products, bytes_moved = task.work()
        row["floor_ms"] = 1e3 * max(products / products_rate, bytes_moved / byte_rate)
        rows.append(row)
        print_row(row, environments)
    dropped = sum(row["turns_dropped"] for row in rows)
    if dropped or any(row["noisy"] for row in rows):
        noisy = sum(row["noisy"] for row in rows)
        print(
            f"This machine is not quiet: a fixed product took {NOISE:.0%} longer than at its best "
            f"beside {dropped} turns, which were dropped, and beside every turn of {noisy} rows"
        )
    threads = [f"{name} {rows[-1][f'{name}_threads']}" for name in ("jittor", "torch")]
    print("threads: " + ", ".join(threads))
    for name, jittor, torch in first_steps(args, environments):
        print(f"{name:46} {1e3 * jittor:9.0f} {'':5} {1e3 * torch:9.0f}", flush=True)
        empty = dict.fromkeys(rows[0], "")
        rows.append({**empty, "task": name, "jittor_ms": 1e3 * jittor, "torch_ms": 1e3 * torch})
    args.output.mkdir(parents=True, exist_ok=True)
    with open(args.output / "bench.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, args.output / "bench.png")
    print(f"written: {args.output / 'bench.csv'}, {args.output / 'bench.png'}")


def take_turn(task, environments, args):
    """{implementation: what its process measured}, one after another."""
    is_model = task.kind in STEPS
    return {
        name: run_worker(args, python, name, task, environment)
        for name, (python, environment) in environments.items()
        if (task.uses_natten or not name.startswith("natten")) and (is_model or name != "compiled")
    }


def quiet_turns(task, environments, args):
    """The turns beside which a fixed product took its best time, and how many others there were.

    All turns, and 0, if there is none. The product is timed before, between and after the turns.
    """
    products, turns = [product_time(args.device)], []
    for _ in range(args.rounds):
        turns.append(take_turn(task, environments, args))
        products.append(product_time(args.device))
    slow = [time > (1 + NOISE) * min(products) for time in products]
    quiet = [turn for i, turn in enumerate(turns) if not (slow[i] or slow[i + 1])]
    return quiet or turns, len(turns) - len(quiet)


def bench(task, environments, args):
    """Let the implementations take turns at `task`.

    Returns a row of the table, its floor excepted.
    """
    turns, noisy = quiet_turns(task, environments, args)
    medians = [{name: statistics.median(t["times"]) for name, t in turn.items()} for turn in turns]
    ratios = [m["jittor"] / min(m[name] for name in TORCHES if name in m) for m in medians]
    row = {"task": str(task)}
    for name in IMPLEMENTATIONS:
        results = [turn[name] for turn in turns if name in turn]
        values = [1e3 * t for result in results for t in result["times"]]
        quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [0, 0, 0]
        median = statistics.median(values) if values else ""
        row[f"{name}_ms"] = median
        row[f"{name}_spread_ms"] = (quartiles[2] - quartiles[0]) / 2 if values else ""
        counts_images = values and task.kind in STEPS
        row[f"{name}_images_per_s"] = 1e3 * task.batch / median if counts_images else ""
        row[f"{name}_peak_mib"] = max((result["peak"] for result in results), default="")
        row[f"{name}_threads"] = results[-1]["threads"] if results else ""
    best = min((row[f"{name}_ms"], name) for name in TORCHES if row[f"{name}_ms"] != "")
    row |= dict(best_torch=best[1], best_torch_ms=best[0])
    row |= dict(ratio_min=min(ratios), ratio_max=max(ratios))
    return row | dict(turns_dropped=args.rounds - len(turns), noisy=int(noisy == args.rounds))


def draw(rows, path):
    """Bars of each implementation's time relative to PyTorch's, one group a task; logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.45 * len(rows) + 1.2), layout="constrained")
    colors = dict(
        zip(IMPLEMENTATIONS, ("#00466e", "#f0ad30", "#d98200", "#8a5300", "#999", "#ccc"))
    )
    names = [name for name in IMPLEMENTATIONS if any(row[f"{name}_ms"] != "" for row in rows)]
    height = 0.9 / len(names)
    for i, name in enumerate(names):
        shown = [(y, row) for y, row in enumerate(rows) if row[f"{name}_ms"] != ""]
        places = [y + height * i for y, _ in shown]
        ratios = [row[f"{name}_ms"] / row["torch_ms"] for _, row in shown]
        axes.barh(places, ratios, height=0.9 * height, color=colors[name], label=name)
    axes.set_yticks([y + 0.4 for y in range(len(rows))], [r["task"] for r in rows], fontsize=7)
    axes.set(xscale="log", xlabel="time, relative to our PyTorch")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
