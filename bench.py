"""Time both frameworks side by side: python bench.py, or `make bench`.

Every measurement is a process of its own, after warm-up; the contestants take turns (A B C A B C ...), so that a slow
minute of the machine hits all of them. A contestant is a framework, or PyTorch with NATTEN's na2d_av, which is what the
official OverLoCK runs, at the larger batch only: "natten" as pip builds it for a CPU, with no optimisation and for one
thread; "natten -O3" the same source with the compiler flags that it lacks. Prints a table, writes logs/bench.csv and
logs/bench.png.

The floor of a row is what the machine could do at best: its multiply-adds at the matrix rate measured here, or its bytes
at the copy bandwidth measured here, whichever takes longer.
"""
import argparse
import csv
import ctypes
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent
CONTESTANTS = ("jittor", "torch", "natten", "natten -O3")
# Merged: after reparam() in both frameworks, and with BatchNorms folded into the convolutions before them.
STEPS = ("training step", "inference", "merged inference")
# variant, image side, batch sizes
MODELS = [("overlock_xxt", 64, (64, 16)), ("overlock_xt", 224, (8, 2))]
LARGER_BATCH = {variant: batches[0] for variant, _, batches in MODELS}
# na2d_av: (batch, heads, height, width, dim), kernel: what XXT at 64 and XT at 224 pixels use, then large maps
WINDOWS = [((64, 2, 9, 9, 24), 9), ((64, 4, 7, 7, 16), 7), ((8, 8, 14, 14, 16), 13), ((8, 12, 7, 7, 14), 7),
           ((1, 8, 56, 56, 16), 13), ((1, 2, 200, 320, 16), 13)]
# depthwise convolution and BatchNorm: (batch, channels, height, width), kernel
MAPS = [((64, 24, 16, 16), 13), ((64, 48, 16, 16), 3), ((64, 96, 4, 4), 9), ((8, 56, 56, 56), 17), ((8, 256, 14, 14), 3)]


class Framework:
    """What differs between Jittor and PyTorch for a benchmark."""

    def __init__(self, contestant):
        self.jittor = contestant == "jittor"
        sys.path.insert(0, str(ROOT / ("jittor_impl" if self.jittor else "torch_impl")))
        import models
        import ops
        self.models, self.ops = models, ops
        if self.jittor:
            from jittor_setup import jt
            self.jt = jt
        else:
            import torch
            self.torch = torch
            ops.set_na2d_backend("natten" if contestant.startswith("natten") else "dense")

    def array(self, shape):
        import numpy as np
        values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        if self.jittor:
            return self.jt.array(values)
        tensor = self.torch.from_numpy(values).requires_grad_()
        return tensor.contiguous(memory_format=self.torch.channels_last) if len(shape) == 4 else tensor

    def forward_backward(self, function, *inputs):
        """Run function(*inputs) and pull a gradient (the output itself) back to every input."""
        out = function(*inputs)
        if self.jittor:
            self.jt.sync([out, *self.jt.grad((out * out.detach()).sum(), list(inputs))])
        else:
            self.torch.autograd.grad(out, inputs, out.detach())

    def fold_batch_norms(self, model):
        """Do by PyTorch's own means what Jittor's inference does by itself; for a model in evaluation mode."""
        from torch.nn.utils.fusion import fuse_conv_bn_eval
        for module in model.modules():
            layers = list(module) if isinstance(module, self.torch.nn.Sequential) else []
            for i, (layer, following) in enumerate(zip(layers, layers[1:])):
                if isinstance(following, self.torch.nn.BatchNorm2d) and type(layer) is self.torch.nn.Conv2d:
                    module[i], module[i + 1] = fuse_conv_bn_eval(layer, following), self.torch.nn.Identity()


def measure(step, seconds):
    """Warm up, then repeat `step` for about `seconds`, at least twice. Returns the list of times in seconds."""
    start = time.perf_counter()
    step()
    if time.perf_counter() - start < seconds:
        step()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < end and len(times) < 50:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return times


def bench_model(f, kind, variant, side, batch):
    import numpy as np
    import train
    model = f.models.OverLoCK(**f.models.VARIANTS[variant], num_classes=20)
    generator = np.random.default_rng(0)
    images = generator.standard_normal((batch, 3, side, side)).astype(np.float32)
    labels = generator.integers(0, 20, batch)
    args = train.make_parser().parse_args([])
    training = kind == "training step"
    model.train() if training else model.eval()
    if kind == "merged inference":
        model.reparam()
        if not f.jittor:
            f.fold_batch_norms(model)
    if not f.jittor:
        model = model.to(memory_format=f.torch.channels_last)
    optimizer = train.make_optimizer(model, args)
    if f.jittor:
        def step():
            output, target = model(f.jt.array(images)), f.jt.array(labels.astype(np.int32))
            loss = train.cross_entropy(output["main"], target) + 0.4 * train.cross_entropy(output["aux"], target)
            optimizer.step(loss)
            f.jt.sync_all()
            loss.item()

        def infer():
            with f.jt.no_grad():
                model(f.jt.array(images)).numpy()
    else:
        def batch_of():
            return f.torch.from_numpy(images).contiguous(memory_format=f.torch.channels_last)

        def step():
            output, target = model(batch_of()), f.torch.from_numpy(labels)
            loss = train.cross_entropy(output["main"], target) + 0.4 * train.cross_entropy(output["aux"], target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

        def infer():
            with f.torch.inference_mode():
                model(batch_of())
    return measure(step if training else infer, 6)


def bench_operator(f, name, shape, kernel):
    if name == "na2d_av":
        attn, value = f.array((*shape[:4], kernel**2)), f.array(shape)
        return measure(lambda: f.forward_backward(lambda a, v: f.ops.na2d_av(a, v, kernel), attn, value), 2)
    if name == "depthwise":
        conv = f.models.Conv2d(shape[1], shape[1], kernel, padding=kernel // 2, groups=shape[1], bias=False)
        x = f.array(shape)
        return measure(lambda: f.forward_backward(lambda x, w: conv(x), x, conv.weight), 2)
    norm, x = f.models.BatchNorm2d(shape[1]), f.array(shape)
    return measure(lambda: f.forward_backward(lambda x, w, b: norm(x), x, norm.weight, norm.bias), 2)


def bench_loading(f, side, batch):
    """Batches as training takes them from memory: shuffled, flipped, normalised."""
    import numpy as np
    from dataset import TinyImageNet
    data = TinyImageNet([], [], [], progress=False)
    data.images = np.random.default_rng(0).integers(0, 256, (64 * batch, side, side, 3), np.uint8)
    data.labels = np.zeros(len(data.images), np.int64)
    batches = iter(())

    def step():
        nonlocal batches
        if next(batches, None) is None:
            batches = data.batches(batch, 0, 1)
            next(batches)
    return measure(step, 2)


def worker(contestant, task):
    """Run one measurement in this process and print it as JSON."""
    kind, *arguments = task
    f = Framework(contestant)
    if kind in STEPS:
        times = bench_model(f, *task)
    elif kind == "data loading":
        times = bench_loading(f, *arguments)
    else:
        times = bench_operator(f, kind, *arguments)
    # Not getrusage's ru_maxrss, which begins with that of the parent process.
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # MiB
    threads = f.torch.get_num_threads() if not f.jittor else ctypes.CDLL("libgomp.so.1").omp_get_max_threads()
    print("RESULT " + json.dumps({"times": times, "peak": peak, "threads": threads}))


def machine_rates():
    """Measured multiply-adds/s of a large float32 matrix product and bytes/s of a large copy, with all cores."""
    import torch
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    flops = 2048**3 / min(measure(lambda: a @ b, 2))
    source, target = torch.randn(2**26), torch.empty(2**26)
    copy = 2 * source.numel() * 4 / min(measure(lambda: target.copy_(source), 2))
    return flops, copy


def count_products(model, side):
    """Multiply-adds of one image of side x side: convolutions and matrix products by PyTorch's counter, na2d_av by its definition."""
    import contmix
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    window_products = 0

    def counted_na2d_av(attn, value, kernel_size):
        nonlocal window_products
        window_products += attn.numel() * value.shape[-1]
        return torch.zeros_like(value)

    with mock.patch.object(contmix, "na2d_av", counted_na2d_av), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, side, side))
    return counter.get_total_flops() / 2 + window_products


def work(task):
    """(multiply-adds, bytes) that a task cannot avoid: every tensor in and out once, three times forward for training."""
    kind, *arguments = task
    if kind in STEPS:
        sys.path.insert(0, str(ROOT / "torch_impl"))
        import models
        variant, side, batch = arguments
        model = models.OverLoCK(**models.VARIANTS[variant], num_classes=20).eval()
        if kind == "merged inference":
            model.reparam()
        moved = sum(p.numel() for p in model.parameters()) * 4
        hooks = [m.register_forward_hook(lambda _, i, o: sizes.append(4 * o.numel()))
                 for m in model.modules() if not list(m.children())]
        sizes = []
        flops = batch * count_products(model, side)
        for hook in hooks:
            hook.remove()
        moved += 2 * batch * sum(sizes)
        return (3 * flops, 3 * moved) if kind == "training step" else (flops, moved)
    if kind == "data loading":
        side, batch = arguments
        return 0, batch * 3 * side * side * (1 + 4)  # bytes in, floats out
    shape, kernel = arguments
    size = 1
    for n in shape:
        size *= n
    if kind == "na2d_av":
        weights = size // shape[4] * kernel**2
        return 3 * size * kernel**2, 4 * (3 * weights + 5 * size)
    # A window's taps that fall on the map, in all pixels together; a product with padding can be saved.
    taps = [sum(min(i + kernel // 2, n - 1) - max(i - kernel // 2, 0) + 1 for i in range(n)) for n in shape[2:]]
    products = size // (shape[2] * shape[3]) * taps[0] * taps[1]
    return (3 * products, 4 * 5 * size) if kind == "depthwise" else (8 * size, 4 * 5 * size)


def tasks():
    for variant, side, batches in MODELS:
        for batch in batches:
            yield "training step", variant, side, batch
            yield "inference", variant, side, batch
            yield "merged inference", variant, side, batch
    yield "data loading", 64, 64
    for shape, kernel in WINDOWS:
        yield "na2d_av", shape, kernel
    for shape, kernel in MAPS:
        yield "depthwise", shape, kernel
        yield "batch norm", shape, kernel


def describe(task):
    kind, *arguments = task
    if kind in STEPS:
        return f"{kind}, {arguments[0]}, {arguments[1]}x{arguments[1]}, batch {arguments[2]}"
    if kind == "data loading":
        return f"{kind}, {arguments[0]}x{arguments[0]}, batch {arguments[1]}"
    shape = "x".join(map(str, arguments[0]))
    return f"{kind}, {shape}" + ("" if kind == "batch norm" else f", kernel {arguments[1]}")


def fail(contestant, what, result):
    sys.exit(f"bench.py: error: {contestant} failed at {what}: {(result.stderr.strip() or '?').splitlines()[-1]}")


def run_worker(python, contestant, task, environment):
    command = [python, __file__, "--worker", contestant, json.dumps(task)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        fail(contestant, describe(task), result)
    return json.loads(lines[0][len("RESULT "):])


def first_step(python, implementation, home):
    """Seconds from the start of a process to the end of its first training step of XXT, batch 64."""
    task = ["training step", "overlock_xxt", 64, 64]
    code = (f"import sys; sys.argv = ['bench.py']; sys.path.insert(0, {str(ROOT)!r})\n"
            "import bench; bench.measure = lambda step, seconds: step()\n"
            f"bench.bench_model(bench.Framework({implementation!r}), *{task!r})")
    start = time.perf_counter()
    environment = {name: value for name, value in os.environ.items() if name != "JITTOR_HOME"}  # goes before HOME
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, env={**environment, "HOME": str(home)})
    if result.returncode != 0:
        fail(implementation, "its first step", result)
    return time.perf_counter() - start


def make_parser():
    parser = argparse.ArgumentParser(prog="bench.py", description="Time Jittor, PyTorch and PyTorch with NATTEN.")
    add = parser.add_argument
    add("--jittor-python", default=str(ROOT / ".venv-jittor/bin/python"))
    add("--torch-python", default=str(ROOT / ".venv-torch/bin/python"))
    add("--natten-o3", type=Path, default=ROOT / ".natten-o3", help="folder of a NATTEN built with optimisation (make bench)")
    add("--rounds", type=int, default=3, help="times that each contestant takes its turn")
    add("--only", default="", help="only rows whose description contains this")
    add("--cold", action="store_true", help="also time a first step with an empty Jittor cache, which takes minutes")
    add("--output", type=Path, default=ROOT / "logs")
    add("--worker", nargs=2, help=argparse.SUPPRESS)
    return parser


def find_contestants(args):
    """{contestant: (its Python, the environment variables of its processes)}, of those that are installed."""
    paths = [str(args.natten_o3.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
    optimised = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    found = {"jittor": (args.jittor_python, None), "torch": (args.torch_python, None)}
    for name, environment in (("natten", None), ("natten -O3", optimised)):
        code = "import natten; from natten.functional import na2d_av; print(natten.__file__)"
        result = subprocess.run([args.torch_python, "-c", code], capture_output=True, text=True, env=environment)
        if result.returncode != 0 or environment and not Path(result.stdout.strip()).is_relative_to(args.natten_o3.resolve()):
            print(f"{name} is not installed: this build of the official operator is left out")
        else:
            found[name] = args.torch_python, environment
    return found


def main():
    parser = make_parser()
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker[0], json.loads(args.worker[1]))
    environments = find_contestants(args)
    if not any(args.only in describe(task) for task in tasks()):
        parser.error(f"no row's description contains {args.only!r}")
    flops_rate, byte_rate = machine_rates()
    print(f"{os.cpu_count()} cores; matrix product {flops_rate / 1e9:.0f} G multiply-adds/s, copy {byte_rate / 1e9:.1f} GB/s\n"
          "median milliseconds +- half of the interquartile range; peak memory of the process in MiB")
    print(f"{'':46} {' '.join(f'{name:>15}' for name in CONTESTANTS)} {'jt/torch':>8} {'floor':>8} {'jt/floor':>8} {'jt MiB':>7} {'torch MiB':>9}")
    rows = []
    for task in tasks():
        if args.only not in describe(task):
            continue
        row = bench(task, environments, args.rounds)
        flops, moved = work(task)
        row["floor_ms"] = 1e3 * max(flops / flops_rate, moved / byte_rate)
        rows.append(row)
        cells = " ".join(f"{row[f'{n}_ms']:9.2f} +-{row[f'{n}_spread_ms']:4.1f}" if row[f"{n}_ms"] != "" else f"{'-':>15}"
                         for n in CONTESTANTS)
        print(f"{row['task']:46} {cells} {row['jittor_ms'] / row['torch_ms']:8.2f} {row['floor_ms']:8.2f} "
              f"{row['jittor_ms'] / row['floor_ms']:8.1f} {row['jittor_peak_mib']:7.0f} {row['torch_peak_mib']:9.0f}"
              + (f"   {row['jittor_images_per_s']:.0f} / {row['torch_images_per_s']:.0f} images/s" if task[0] in STEPS else ""),
              flush=True)
    print("threads: " + ", ".join(f"{name} {rows[-1][f'{name}_threads']}" for name in ("jittor", "torch")))
    jittor, torch = (first_step(environments[name][0], name, Path.home()) for name in ("jittor", "torch"))
    first = [("first training step of a new process", jittor, torch)]
    if args.cold:
        with tempfile.TemporaryDirectory() as home:
            first.append(("the same with an empty Jittor cache", first_step(args.jittor_python, "jittor", home), torch))
    for task, jittor, torch in first:
        print(f"{task:46} {1e3 * jittor:9.0f} {'':5} {1e3 * torch:9.0f}", flush=True)
        rows.append({**dict.fromkeys(rows[0], ""), "task": task, "jittor_ms": 1e3 * jittor, "torch_ms": 1e3 * torch})
    args.output.mkdir(parents=True, exist_ok=True)
    with open(args.output / "bench.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, args.output / "bench.png")
    print(f"written: {args.output / 'bench.csv'}, {args.output / 'bench.png'}")


def uses_natten(task):
    """Whether NATTEN takes a turn at `task`: the operator, and the models at their larger batch."""
    return task[0] == "na2d_av" or task[0] in STEPS and task[3] == LARGER_BATCH[task[1]]


def bench(task, environments, rounds):
    """Let the contestants take turns at `task`. Returns a row of the table, its floor excepted."""
    times, peaks, threads = {name: [] for name in environments}, {}, {}
    for _ in range(rounds):
        for name, (python, environment) in environments.items():
            if name.startswith("natten") and not uses_natten(task):
                continue
            result = run_worker(python, name, task, environment)
            times[name] += result["times"]
            peaks[name] = max(peaks.get(name, 0), result["peak"])
            threads[name] = result["threads"]
    row = {"task": describe(task)}
    for name in CONTESTANTS:
        values = [1e3 * t for t in times.get(name, [])]
        quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [0, 0, 0]
        row[f"{name}_ms"] = statistics.median(values) if values else ""
        row[f"{name}_spread_ms"] = (quartiles[2] - quartiles[0]) / 2 if values else ""
        row[f"{name}_images_per_s"] = 1e3 * task[3] / row[f"{name}_ms"] if values and task[0] in STEPS else ""
        row[f"{name}_peak_mib"] = peaks.get(name, "")
        row[f"{name}_threads"] = threads.get(name, "")
    return row


def draw(rows, path):
    """Bars of each contestant's time relative to PyTorch's, one group a task; logarithmic."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(9, 0.45 * len(rows) + 1.2), layout="constrained")
    for i, (name, color) in enumerate(zip(CONTESTANTS, ("#00466e", "#f0ad30", "#999999", "#cccccc"))):
        shown = [(y + 0.22 * i, row[f"{name}_ms"] / row["torch_ms"]) for y, row in enumerate(rows) if row[f"{name}_ms"] != ""]
        axes.barh([y for y, _ in shown], [x for _, x in shown], height=0.2, color=color, label=name)
    axes.set_yticks([y + 0.33 for y in range(len(rows))], [row["task"] for row in rows], fontsize=7)
    axes.set(xscale="log", xlabel="time, relative to our PyTorch")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
