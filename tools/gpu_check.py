"""Check the project on a GPU, in ten minutes and without a network: `make gpu`.

    python tools/gpu_check.py [--device cuda] [--steps kernels,triton] [--seconds 570]
                              [--bundle gpu-bundle] [--output logs/gpu]

Each step is a command with a time limit of its own. Its output goes to OUTPUT/STEP.log and what it
found to OUTPUT/results.jsonl, at once; a failed one stops no other. Prints a table, writes gpu.json
and gpu.png from all of results.jsonl, so that a check may be made in several calls. What is worth
most comes first, and Jittor compiles itself beside the steps that do without it. The exit status is
the number of correctness steps that failed. With --device cpu the same is rehearsed, in small.
"""

import argparse
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tools.gpu_bundle import ENVIRONMENTS  # noqa: E402

TOOLS = ROOT / "tools" / "gpu"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Options of both train.py for the rows of the models.
NUMBERS = {"float32": "", "TF32": "--tf32 on", "bfloat16": "--amp bfloat16"}
VERSIONS = "import torch; print('PyTorch', torch.__version__, 'CUDA', torch.version.cuda)"
# Every toolkit of the machine, and why Jittor would not take it.
TOOLKITS = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from jittor_impl.aligned.setup import cuda_toolkit as c
for nvcc in c.candidates(Path.home()):
    print(nvcc, c.toolkit_version(nvcc), "cuDNN", c.cudnn_version(nvcc))
    print("  problem:", c.problem(nvcc, Path.home()))
"""


def last_line(step, output):
    lines = [line for line in output.splitlines() if line.strip()]
    return dict(summary=lines[-1].strip()[:160] if lines else "")


def json_lines(step, output):
    """The lines of kernels.py and operators.py."""
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    wrong = [row for row in rows if row.get("ok") is False]
    timed = [row for row in rows if row.get("ratio")]
    if timed:
        worst = max(timed, key=lambda row: row["ratio"])
        text = f"{len(timed)} timed, farthest from its floor: {worst['kernel']}, "
        return dict(summary=f"{text}{worst['ratio']:.1f} times", rows=timed)
    text = f"{len(rows)} cases, {len(wrong)} wrong"
    return dict(summary=text + (f", the first is {wrong[0]}" if wrong else ""), rows=wrong)


def bench_rows(step, output):
    with open(step.folder / "bench.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["floor_ms"]]
    names = ("task", "jittor_ms", "torch_ms", "floor_ms", "jittor_peak_mib", "torch_peak_mib")
    rows = [{name: row[name] for name in names} for row in rows]
    parts = [f"{float(row['jittor_ms']):.1f}/{float(row['torch_ms']):.1f}" for row in rows]
    return dict(summary=f"ms in Jittor/PyTorch: {', '.join(parts)}", rows=rows)


@dataclass
class Step:
    """Commands, one after another, within `limit` seconds together."""

    name: str
    limit: int
    commands: list
    folder: Path
    correctness: bool = True
    find: object = last_line
    environment: dict = field(default_factory=dict)
    skip: str = ""
    beside_build: bool = False  # whether it may run while Jittor compiles itself

    def run(self, deadline):
        """What the step found, as results.jsonl has it; deadline: of time.monotonic()."""
        limit = min(self.limit, deadline - time.monotonic())
        skip = self.skip or ("no time is left" if limit < 1 else "")
        if skip:
            return dict(step=self.name, ok=None, summary=f"skipped: {skip}")
        self.folder.mkdir(parents=True, exist_ok=True)
        log, start, status = self.folder.with_suffix(".log"), time.perf_counter(), 0
        with open(log, "w") as file:
            for command in self.commands:
                left = limit - (time.perf_counter() - start)
                status = run_command([str(word) for word in command], file, self.environment, left)
                if status and self.correctness:
                    break
        result = dict(step=self.name, correctness=self.correctness, ok=status == 0)
        result["seconds"] = round(time.perf_counter() - start, 1)
        text = log.read_text(errors="replace")
        try:
            result |= self.find(self, text)
        except (OSError, ValueError, KeyError):
            result |= last_line(self, text)
        if status == TIMED_OUT:
            result["summary"] = f"stopped after {limit:.0f} s: {result['summary']}"
        return result


TIMED_OUT = 124
RUNNING = set()  # processes


def run_command(command, log, environment, seconds):
    """The exit status; after `seconds` it and all that it started are stopped."""
    log.write(f"$ {' '.join(command)}\n")
    log.flush()
    try:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    except OSError as error:
        log.write(f"{command[0]}: {error.strerror}\n")
        return 127
    RUNNING.add(process)
    try:
        status = process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        stop(process)
        status = TIMED_OUT
    RUNNING.discard(process)
    return status


def stop(process):
    """End a process and all that it started: as by Ctrl-C, at which pytest tells what failed."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def has_option(option):
    """Whether train.py has it; it is not asked, since it may have no environment yet."""
    return any(f'"{option}"' in file.read_text() for file in (ROOT / "torch_impl").glob("*.py"))


def make_steps(args):
    """In the order in which they run."""
    jittor, torch, cpu = args.jittor_python, args.torch_python, args.device == "cpu"
    on_device, small = [f"--device={args.device}"], ["--small"] if cpu else []
    pythons = [f"--jittor-python={jittor}", f"--torch-python={torch}"]
    kernels = [torch, TOOLS / "kernels.py", *on_device]

    def step(name, limit, *commands, **others):
        folder = args.output / name.replace(" ", "-")
        # A few cores take longer to compile for.
        return Step(name, 5 * limit if cpu else limit, list(commands), folder, **others)

    def tests(framework, name, limit, files, chosen, **others):
        """Some of tests/, as they run by themselves; on a CPU the first alone."""
        python = jittor if framework == "jittor" else torch
        environment = {"OVERLOCK_DEVICE": args.device, "OVERLOCK_TESTS": framework}
        environment |= {"JITTOR_PYTHON": jittor, "TORCH_PYTHON": torch}
        paths = [f"tests/test_{file}.py" for file in (files[:1] if cpu else files)]
        chosen = ["-k", chosen] if chosen else []
        # Not --tb=no: the log is all that comes back from a machine that is given away.
        command = [python, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
        name = f"{framework} {name}"
        return step(name, limit, [*command, *paths, *chosen], environment=environment, **others)

    if args.bundle:
        unpack = [sys.executable, "tools/gpu_bundle.py", "--install", f"--bundle={args.bundle}"]
        yield step("environments", 120, unpack)
    smi = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm"]
    yield step(
        "inventory",
        60,
        *([*smi, "--format=csv,noheader"], ["nvidia-smi", "-q"], ["uname", "-a"]),
        *(["ldd", "--version"], ["g++", "--version"], ["nvcc", "--version"]),
        *([torch, "-c", VERSIONS], [jittor, "-c", TOOLKITS]),
        correctness=False,
    )
    yield step("build", 300, [jittor, "-c", "import jittor_impl.models"])
    yield step("kernels", 120, [*kernels, *small], find=json_lines, beside_build=True)
    triton = [torch, "tests/triton_run.py", args.device]
    yield step("triton", 120, triton, beside_build=True)
    models, layers = ["contmix_block", "models"], ["ops", "functions", "aligned_nn"]
    numbers = "reference" if cpu else "not (triton or compile or cpu)"
    runs = "files_of_a_run" if cpu else "files_of_a_run or kill_and_resume or evaluate_repeats"
    yield tests("torch", "models", 120, [*models, "ops"], numbers, beside_build=True)
    yield tests("torch", "training", 120, ["train"], runs, beside_build=True)
    yield step("operators", 120, [jittor, TOOLS / "operators.py", *on_device], find=json_lines)
    yield tests("jittor", "models", 240, models, numbers)
    yield tests("jittor", "training", 180, ["train"], runs)
    sample = args.output / "sample"
    sizes = ["--sample-classes=3", "--sample-train=8", "--sample-val=2"] if cpu else []
    draw = [torch, "data/prepare.py", "--sample", f"--output={sample}", *sizes]
    options = ["--num-classes=3", "--train-per-class=8", "-b=8", "--steps=1"]
    options = options if cpu else ["--num-classes=5"]
    command = [torch, "align.py", *on_device, *pythons, f"--data-dir={sample}", *options]
    yield step("align", 150, draw, [*command, f"--output={args.output / 'align'}"])
    for name, options in NUMBERS.items():
        why = "needs a GPU" if cpu and options else ""
        if options and not cpu and not has_option(options.split()[0]):
            why = f"train.py has no {options.split()[0]}"
        only = "batch norm, 64x96x4x4" if cpu else "training step"
        command = [torch, "bench.py", *on_device, *pythons, f"--only={only}", "--rounds=1"]
        made = step(f"speed {name}", 240, skip=why, correctness=False, find=bench_rows)
        made.commands = [[*command, f"--train-options={options}", f"--output={made.folder}"]]
        yield made
    floors = [*kernels, "--time", *small]
    yield step("floors", 120, floors, correctness=False, find=json_lines)
    why = "needs a GPU" if cpu else ""
    yield tests("jittor", "layers", 240, layers, numbers, skip=why)
    sanitizer = shutil.which("compute-sanitizer")
    why = why or ("" if sanitizer else "compute-sanitizer is not installed")
    for tool in SANITIZERS:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *kernels, "--small"]
        yield step(tool, 90, command, skip=why)


def draw(results, path):
    """Step times of both frameworks, and how many times its floor each kernel takes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    speeds = [
        (r["step"], row) for r in results if "speed" in r["step"] for row in r.get("rows", [])
    ]
    labels = [f"{row['task']}, {name.partition(' ')[2]}" for name, row in speeds]
    for i, (name, color) in enumerate((("jittor", "#00466e"), ("torch", "#f0ad30"))):
        values = [float(row[f"{name}_ms"]) for _, row in speeds]
        places = [y + 0.4 * i for y in range(len(values))]
        left.barh(places, values, height=0.38, color=color, label=name)
    left.set_yticks(range(len(labels)), labels, fontsize=7)
    left.set(title="Training step", xlabel="ms")
    left.invert_yaxis()
    left.legend()
    timed = [row for r in results if r["step"] == "floors" for row in r.get("rows", [])]
    places = range(len(timed))
    right.barh(places, [row["ratio"] for row in timed], color="#00466e")
    labels = [f"{row['kernel']} {'x'.join(map(str, row['shape'][:5]))}" for row in timed]
    right.set_yticks(places, labels, fontsize=6)
    right.set(title="Our kernels", xlabel="times the floor", xscale="log")
    right.axvline(2, color="black", linewidth=0.8)
    right.invert_yaxis()
    figure.savefig(path, dpi=150)


def make_parser():
    parser = argparse.ArgumentParser(prog="gpu_check.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda", help="cpu rehearses it, in small")
    for name, framework in (("jittor", "Jittor"), ("torch", "PyTorch")):
        add(f"--{name}-python", help=f"Python of {framework}'s environment")
    add("--bundle", type=Path, help="make the environments of it first (tools/gpu_bundle.py)")
    add("--seconds", type=float, default=math.inf, help="for all steps together")
    add("--steps", default="", help="only these, by name, with commas between; all by default")
    add("--output", type=Path, default=ROOT / "logs" / "gpu", help="for all that is written")
    return parser


def main():
    parser = make_parser()
    args = parser.parse_args()
    args.output, deadline = args.output.resolve(), time.monotonic() + args.seconds
    if args.bundle:
        args.bundle = args.bundle.resolve()
    for name in ("jittor", "torch"):
        folder = ENVIRONMENTS[name] if args.bundle else ROOT / f".venv-{name}"
        option = f"{name}_python"
        setattr(args, option, getattr(args, option) or str(folder / "bin" / "python"))
    steps = list(make_steps(args))
    chosen = [name for name in args.steps.split(",") if name] or [s.name for s in steps]
    unknown = set(chosen) - {s.name for s in steps}
    if unknown:
        known = ", ".join(s.name for s in steps)
        parser.error(f"no step {', '.join(sorted(unknown))}; there are {known}")
    args.output.mkdir(parents=True, exist_ok=True)
    failed = 0
    for step, result in results_of([s for s in steps if s.name in chosen], deadline):
        failed += result["ok"] is False and step.correctness
        verdict = {True: "ok", False: "FAILED", None: "-"}[result["ok"]]
        seconds = result.get("seconds", 0)
        print(f"{step.name:16} {verdict:6} {seconds:6.1f} s  {result['summary']}", flush=True)
        results = keep(dict(device=args.device, **result), args)
    print(f"written: {args.output / 'gpu.json'}", end="")
    if any(r.get("rows") for r in results) and draws(results, args):
        print(f", {args.output / 'gpu.png'}", end="")
    print(f"\n{failed} correctness steps failed")
    sys.exit(failed)


def results_of(steps, deadline):
    """Run the steps; yields (step, what it found), in the order in which they end."""
    with ThreadPoolExecutor(1) as pool:
        build = None
        try:
            for step in steps:
                if build and not step.beside_build:
                    yield build[0], build[1].result()
                    build = None
                if step.name == "build":
                    build = step, pool.submit(step.run, deadline)
                else:
                    yield step, step.run(deadline)
            if build:
                yield build[0], build[1].result()
        except KeyboardInterrupt:
            for process in list(RUNNING):
                stop(process)
            raise


def keep(result, args):
    """Write down what a step found. Returns the latest of each step in OUTPUT/results.jsonl."""
    record, machine = args.output / "results.jsonl", args.output / "inventory.log"
    with open(record, "a") as file:
        file.write(json.dumps(result) + "\n")
    results = {r["step"]: r for r in map(json.loads, record.read_text().splitlines())}
    text = machine.read_text() if machine.exists() else ""
    whole = dict(device=args.device, steps=list(results.values()), inventory=text)
    (args.output / "gpu.json").write_text(json.dumps(whole, indent=1))
    return list(results.values())


def draws(results, args):
    """Draw gpu.png; whether there is a matplotlib to do it."""
    try:
        draw(results, args.output / "gpu.png")
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("gpu_check.py: interrupted; what was found is kept")
