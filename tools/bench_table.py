"""Print docs/performance.md's table of times: python tools/bench_table.py.

Reads logs/reference/bench.csv.
"""

import csv
from pathlib import Path

TABLE = Path(__file__).resolve().parent.parent / "logs" / "reference" / "bench.csv"
HEADERS = (
    *("", "Jittor", "PyTorch", "PyTorch with NATTEN as pip builds it", "PyTorch with NATTEN, -O3"),
    *("Jittor / PyTorch", "Jittor / floor", "memory, Jittor / PyTorch"),
)


def cell(milliseconds):
    """Three digits, or the whole number; nothing where nothing was measured."""
    if not milliseconds:
        return ""
    value = float(milliseconds)
    decimals = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{decimals}f}"


def rows():
    with open(TABLE, newline="") as f:
        for row in csv.DictReader(f):
            if not row["floor_ms"]:  # the first steps of a process, which the text tells
                continue
            task = row["task"].replace("overlock_", "").replace("xxt", "XXT").replace("xt,", "XT,")
            jittor, torch, floor = (
                float(row[f"{name}_ms"]) for name in ("jittor", "torch", "floor")
            )
            memory = " / ".join(
                f"{float(row[f'{name}_peak_mib']):.0f}" for name in ("jittor", "torch")
            )
            times = [
                cell(row[f"{name}_ms"]) for name in ("jittor", "torch", "natten", "natten -O3")
            ]
            yield [task, *times, f"{jittor / torch:.2f}", f"{jittor / floor:.1f}", memory]


if __name__ == "__main__":
    for cells in (HEADERS, ["---"] * len(HEADERS), *rows()):
        print(f"| {' | '.join(cells)} |")
