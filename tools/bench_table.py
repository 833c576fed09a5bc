"""Print docs/performance.md's tables of times: python tools/bench_table.py.

Reads the runs of `make bench` in logs/reference/bench, each of some rows, and what an earlier one
says of NATTEN, logs/reference/bench-natten.csv.
"""

import csv
import statistics
from pathlib import Path

LOGS = Path(__file__).resolve().parent.parent / "logs" / "reference"
RUNS = sorted((LOGS / "bench").glob("*.csv"))
NATTEN = LOGS / "bench-natten.csv"
TORCHES = "torch", "current"


def cell(milliseconds):
    """Three digits, or the whole number; nothing where nothing was measured."""
    if not milliseconds:
        return ""
    value = float(milliseconds)
    decimals = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{decimals}f}"


def read(path):
    """{task: row}, without the first steps of a process, which the text tells."""
    with open(path, newline="") as f:
        return {row["task"]: row for row in csv.DictReader(f) if row["floor_ms"]}


def short(task):
    return task.replace("overlock_", "").replace("xxt", "XXT").replace("xt,", "XT,")


def rows():
    """A row for each task: the times of the last run that has it, the ratios of all."""
    runs = [read(path) for path in RUNS]
    tasks = list(dict.fromkeys(task for run in runs for task in run))
    for task in tasks:
        of_task = [run[task] for run in runs if task in run]
        last = of_task[-1]
        ratios = [float(row["jittor_ms"]) / float(row["best_torch_ms"]) for row in of_task]
        lowest, highest = (
            choose(float(row[f"ratio_{end}"]) for row in of_task)
            for choose, end in ((min, "min"), (max, "max"))
        )
        memory = " / ".join(
            f"{float(last[f'{name}_peak_mib']):.0f}" for name in ("jittor", "torch")
        )
        yield [
            short(task),
            *(cell(last[f"{name}_ms"]) for name in ("jittor", *TORCHES)),
            f"{statistics.median(ratios):.2f}",
            f"{lowest:.2f} to {highest:.2f}",
            f"{float(last['jittor_ms']) / float(last['floor_ms']):.1f}",
            memory,
        ]


def natten_rows():
    for task, row in read(NATTEN).items():
        if row["natten_ms"]:
            yield [short(task), *(cell(row[f"{n}_ms"]) for n in ("torch", "natten", "natten -O3"))]


def show(headers, rows):
    for cells in (headers, ["---"] * len(headers), *rows):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    ratios = "Jittor / faster PyTorch", "of all turns", "Jittor / floor"
    memory = "memory, Jittor / PyTorch 2.3"
    show(("", "Jittor", "PyTorch 2.3", "PyTorch 2.14", *ratios, memory), rows())
    print()
    show(("", "PyTorch 2.3", "with NATTEN as pip builds it", "with NATTEN, -O3"), natten_rows())
