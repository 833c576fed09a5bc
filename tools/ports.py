"""jittor.models beside torchvision.models: the table of docs/ports.md.

`python tools/ports.py` compares every pair as align.py does, as it is and with --aligned, and
writes logs/reference/ports/MODEL-SIZE[-aligned].csv; names after it choose models. `--table` runs
nothing and prints the table of what is there. The first run of a model compiles for minutes.
"""

import argparse
import csv
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import align  # noqa: E402
from tools.align import ports  # noqa: E402
from tools.align.compare import CHECK_LIMIT, EPS, check_output  # noqa: E402

FOLDER = ROOT / "logs" / "reference" / "ports"
# {model: side of its images}: small ones where the model takes them.
MODELS = {
    "alexnet": 224,
    "densenet121": 64,
    "mnasnet1_0": 64,
    "mobilenet_v2": 64,
    "resnet18": 64,
    "resnet50": 64,
    "shufflenet_v2_x1_0": 64,
    "squeezenet1_1": 64,
    "vgg11_bn": 224,
}
STEPS = 3
SHOWN = ("forward", "loss", "gradients", "adamw", "buffers", "steps")


def run(args, model):
    """Run a pair with Jittor's layers and with aligned's beside the same runs of PyTorch.

    Prints what align.py says, and keeps its tables.
    """
    side, names = MODELS[model], {"jittor": "jittor.models", "torch": "torchvision.models"}
    words = [f"--{name}={package}:{model}" for name, package in names.items()]
    words += [f"--jittor-python={args.jittor_python}", f"--torch-python={args.torch_python}"]
    words += [f"--input=2,3,{side},{side}", f"--steps={STEPS}", f"--output={args.output}"]
    pair = align.make_parser().parse_args(words)
    check_output(args.output)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        torch = ports.run_torch(pair, Path(folder))
        for pair.aligned in (False, True):
            jittor = ports.run_jittor(pair, Path(folder))
            ports.report(pair, {**torch, "jittor": jittor})
            (args.output / "alignment.csv").replace(path_of(model, pair.aligned))


def path_of(model, aligned):
    return FOLDER / f"{model}-{MODELS[model]}{'-aligned' if aligned else ''}.csv"


def cell(rows):
    """What a check found: how many arrays depart, if any, or that the mean does; mean errors."""
    if not rows:
        return "-"
    measured = [row for row in rows if row["mean_error"]]
    ours, theirs = (
        np.mean([float(row[key]) for row in measured]) for key in ("mean_error", "torch_mean_error")
    )
    failed = sum(row["ok"] != "True" for row in rows)
    if not failed and ours > CHECK_LIMIT * max(theirs, EPS / 2) and rows[0]["check"] != "steps":
        return f"**mean {ours:.0e}** ({theirs:.0e})"
    beyond = f"**{failed} of {len(rows)}**, " if failed else ""
    return f"{beyond}{ours:.0e} ({theirs:.0e})"


def table():
    """The rows of the table in Markdown."""
    yield f"| model, side | layers | {' | '.join(SHOWN)} |"
    yield "| --- " * (len(SHOWN) + 2) + "|"
    for model, side in MODELS.items():
        for aligned in (False, True):
            path = path_of(model, aligned)
            if path.exists():
                with open(path) as f:
                    rows = list(csv.DictReader(f))
                cells = [cell([row for row in rows if row["check"] == check]) for check in SHOWN]
                layers = "aligned" if aligned else "Jittor's"
                yield f"| {model}, {side} | {layers} | {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(prog="ports.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; all without one")
    add("--table", action="store_true", help="print the table of the committed files")
    add("--output", type=Path, default=ROOT / "logs", help="for align.py's own files")
    for name in ("jittor", "torch"):
        add(f"--{name}-python", default=ROOT / f".venv-{name}/bin/python")
    args = parser.parse_args()
    unknown = [model for model in args.models if model not in MODELS]
    if unknown:
        parser.error(f"no model {unknown[0]}; there are {', '.join(MODELS)}")
    if not args.table:
        for model in args.models or MODELS:
            run(args, model)
    print("\n".join(table()))


if __name__ == "__main__":
    main()
