"""Lay the Jittor run over the PyTorch run: logs/log.csv and logs/log_torch.csv in one figure.

    python plot.py                                 draws logs/, writes logs/training_metrics.png
    python plot.py --logs runs/a --output a.pdf    another folder, another format
    python plot.py --visual logs/visual            the pictures of both visualize.py side by side

Four panels: auxiliary loss, main loss, top-1 and top-5 accuracy; training is solid with round
markers, validation dashed with square ones. A log is drawn as far as it goes: while its run goes
on, beside a longer one, or alone. A thin third line, where there is a log_torch_perturbed.csv, is
PyTorch from initial weights moved by one unit in the last place: what chance does.

The main loss of training is the column train_loss_main. For a log without it (the published ones)
it is derived, as train_loss - 0.4 * train_loss_aux, and a note says so.
"""

import argparse
import csv
import math
import os
import sys
import tempfile
from pathlib import Path

OPTIONAL = "PyTorch, perturbed"
LOGS = {"Jittor": "log.csv", "PyTorch": "log_torch.csv", OPTIONAL: "log_torch_perturbed.csv"}
COLUMNS = ["train_loss", "train_loss_aux", "epoch_time", "val_loss", "acc_top1", "acc_top5"]

# train_loss is main + 0.4 * aux. The published logs don't say so, but their numbers do: as the main
# loss, the 3.6 and 3.8 they start from would be worse than guessing among 20 classes (ln 20 = 3.0);
# less 0.4 * aux it is 2.6 and 2.7.
AUX_LOSS_RATIO = 0.4

# Two runs that agree draw one curve, and neither may hide the other: Jittor's thin dark line lies
# on PyTorch's thick light one, its small markers in open ones. The blue and the orange are apart
# for the colour-blind and in greyscale.
STYLES = {
    "Jittor": dict(color="#00466e", linewidth=1.2, markersize=2.8, zorder=3),
    "PyTorch": dict(
        color="#f0ad30",
        linewidth=3.2,
        markersize=6.5,
        zorder=2,
        markerfacecolor="white",
        markeredgewidth=1.4,
    ),
    OPTIONAL: dict(color="#808080", linewidth=0.7, markersize=0, zorder=4),
}


class PlotError(Exception):
    """What the user can mend; the message reads "what is wrong; what to do"."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (--help lists the options)")


def fail(message):
    """Exit with status 2 and one line on stderr, even if the message holds line breaks.

    A file name or a library may put them there.
    """
    print("plot.py: error:", " ".join(message.splitlines()), file=sys.stderr)
    sys.exit(2)


def read_log(path):
    """Read a CSV log into a dict from column name to a list of floats, one an epoch."""
    # pandas.read_csv would pad the short last line of a killed run with NaN,
    # and name no line in its complaints.
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, cells) for cells in reader if cells]
    except (UnicodeDecodeError, csv.Error):
        raise PlotError(
            f"{path} is not a text file; give --logs the folder of a training run"
        ) from None
    if not rows:
        raise PlotError(f"{path} is empty; delete it or train again")

    header = rows[0][1]
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise PlotError(
            f"{path} is not a log of train.py, it has no column {', '.join(missing)}; "
            "give --logs the folder of a training run"
        )

    log = {name: [] for name in [*COLUMNS, "train_loss_main"] if name in header}
    for line, cells in rows[1:]:
        if len(cells) != len(header):
            raise PlotError(
                f"{path} line {line} has {len(cells)} cells, the header {len(header)}; "
                "delete this line if a run was killed while writing it"
            )
        row = dict(zip(header, cells))
        for name in log:
            try:
                log[name].append(float(row[name]))
            except ValueError:
                raise PlotError(
                    f"{path} line {line}, column {name}: {row[name]!r} is not a number; "
                    "correct or delete this line"
                ) from None
    return log


def read_logs(folder):
    """Return a dict from framework to its log, and notes on what is absent or derived.

    A log without a finished epoch counts as absent.
    """
    if not folder.is_dir():
        raise PlotError(f"{folder} is not a folder; give --logs the folder of a training run")
    logs, absent, derived = {}, [], []
    for framework, name in LOGS.items():
        try:
            log = read_log(folder / name)
        except FileNotFoundError:
            if framework != OPTIONAL:
                absent.append(f"no {name}")
            continue
        if not log["train_loss"]:
            absent.append(f"no finished epoch in {name}")
            continue
        if "train_loss_main" not in log:
            losses = zip(log["train_loss"], log["train_loss_aux"])
            log["train_loss_main"] = [total - AUX_LOSS_RATIO * aux for total, aux in losses]
            derived.append(
                f"no train_loss_main in {name}, "
                f"drawn is train_loss - {AUX_LOSS_RATIO} * train_loss_aux"
            )
        logs[framework] = log
    if not logs:
        raise PlotError(
            f"nothing to draw in {folder}: {', '.join(absent)}; "
            "train for an epoch, or give --logs another folder"
        )
    return logs, absent + derived


def draw(logs):
    """Draw the logs that read_logs returns in four panels, and return the matplotlib Figure."""
    # Imported here, so that --help and complaints about the logs come at once.
    # Figure, unlike pyplot, needs no display.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 6.6), dpi=200, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    aux, main, top1, top5 = figure.subplots(2, 2).flat
    epochs = max(len(log["train_loss"]) for log in logs.values())
    for framework, log in logs.items():
        # In a long run a marker an epoch would hide the lines.
        style = dict(STYLES[framework], markevery=math.ceil(epochs / 30))
        # Matplotlib multiplies dash lengths by the line width;
        # undone, both frameworks' dashes coincide.
        dashes = (0, (5 / style["linewidth"], 2.5 / style["linewidth"]))
        training = dict(style, linestyle="-", marker="o", label=f"{framework}, training")
        validation = dict(style, linestyle=dashes, marker="s", label=f"{framework}, validation")
        x = range(1, len(log["train_loss"]) + 1)
        aux.plot(x, log["train_loss_aux"], **training)
        main.plot(x, log["train_loss_main"], **training)
        main.plot(x, log["val_loss"], **validation)
        top1.plot(x, log["acc_top1"], **validation)
        top5.plot(x, log["acc_top5"], **validation)

    aux.set(title="Auxiliary loss", ylabel="cross-entropy (nats)")
    main.set(title="Main loss", ylabel="cross-entropy (nats)")
    top1.set(title="Top-1 accuracy", ylabel="accuracy (fraction)")
    top5.set(title="Top-5 accuracy", ylabel="accuracy (fraction)")
    ticks = MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True).tick_values(1, epochs)
    # 1, 5, 10: there is no epoch 0.
    ticks = sorted({max(1, int(tick)) for tick in ticks if tick <= epochs})
    margin = max(0.5, 0.03 * epochs)
    for axes in figure.axes:
        axes.set(xlabel="epoch", xticks=ticks, xlim=(1 - margin, epochs + margin))
        axes.grid(color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)

    finals = [
        f"{framework} {log['acc_top1'][-1]:.3f} (epoch {len(log['acc_top1'])})"
        for framework, log in logs.items()
        if framework != OPTIONAL
    ]
    figure.suptitle(f"Final top-1 accuracy: {', '.join(finals)}", fontsize="medium")
    # One legend for all panels, and below them:
    # inside a panel it would cover lines sooner or later.
    figure.legend(
        *main.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3 if len(logs) == 3 else 4,
        frameon=False,
        handlelength=4,
    )
    return figure


def save(figure, path):
    """Write the figure in the format of the path's extension.

    A failure leaves an earlier figure as it was.
    """
    import matplotlib

    try:
        with tempfile.TemporaryDirectory(prefix=".plot-", dir=path.parent) as folder:
            temporary = Path(folder, path.name)
            # 42 is TrueType; conferences turn down PDFs with Type 3 fonts, the default.
            with matplotlib.rc_context({"pdf.fonttype": 42}):
                figure.savefig(temporary, format=path.suffix[1:].lower())
            os.replace(temporary, path)
    except OSError as error:
        raise PlotError(
            f"cannot write {path}: {error.strerror or error}; give --output another place"
        ) from None


def largest_gap(logs, column):
    """Say how far apart the two frameworks are at worst in a column, over the epochs of both."""
    one, other = logs["Jittor"][column], logs["PyTorch"][column]
    gaps = [abs(a - b) for a, b in zip(one, other)]
    # NaN, from a run that diverged, is worse than any number.
    worst = max(gaps, key=lambda gap: (math.isnan(gap), gap))
    return f"{worst:.3g} (epoch {gaps.index(worst) + 1})"


def print_summary(logs):
    """Print a line for each framework, and the largest gaps if there are two."""
    for framework, log in logs.items():
        top1, top5, minutes = log["acc_top1"], log["acc_top5"], sum(log["epoch_time"])
        print(
            f"{framework} after epoch {len(top1)}: top-1 {top1[-1]:.3f} (best {max(top1):.3f}), "
            f"top-5 {top5[-1]:.3f} (best {max(top5):.3f}), {minutes:.1f} minutes in all"
        )
    if "Jittor" in logs and "PyTorch" in logs:
        print(
            f"Largest gap: main loss {largest_gap(logs, 'train_loss_main')} in training, "
            f"{largest_gap(logs, 'val_loss')} in validation, top-1 {largest_gap(logs, 'acc_top1')}"
        )


def plot_visual(folder):
    """Draw each pair of arrays that both visualize.py left in the folder, and their difference."""
    import numpy as np
    from tools import visual

    drawn = False
    for kind in ("cam", "erf", "kernels"):
        paths = folder / f"{kind}.npz", folder / f"{kind}_torch.npz"
        if not all(path.is_file() for path in paths):
            continue
        try:
            jittor, torch = (dict(np.load(path)) for path in paths)
            key, difference = visual.largest_difference(jittor, torch)
        except (ValueError, OSError, EOFError) as error:
            raise PlotError(
                f"{paths[0]} and {paths[1]} do not belong together ({error}); "
                "write both from one checkpoint and the same images"
            ) from None
        output = folder / f"{kind}_both.png"
        save(visual.draw(jittor, torch), output)
        print(f"{kind}: largest difference {difference:.1e} of the range, in {key}")
        print("Figure:", output)
        drawn = True
    if not drawn:
        raise PlotError(
            f"{folder} lacks a pair such as cam.npz and cam_torch.npz; "
            "run visualize.py of both folders with --output there"
        )


def main():
    parser = Parser(
        prog="plot.py", description="Draw the Jittor run and the PyTorch run over each other."
    )
    parser.add_argument(
        "--logs",
        metavar="DIR",
        type=Path,
        default=Path(__file__).resolve().parent / "logs",
        help="folder with log.csv, log_torch.csv or both (default: logs beside plot.py)",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="figure to write, .png, .pdf or .svg (default: training_metrics.png in DIR)",
    )
    parser.add_argument(
        "--visual",
        metavar="DIR",
        type=Path,
        help="draw instead what both visualize.py wrote to DIR, side by side, with the difference",
    )
    args = parser.parse_args()
    output = args.output or args.logs / "training_metrics.png"
    try:
        if args.visual:
            return plot_visual(args.visual)
        if output.suffix.lower() not in [".png", ".pdf", ".svg"]:
            raise PlotError(
                f"cannot tell a format from {output}; end --output in .png, .pdf or .svg"
            )
        logs, notes = read_logs(args.logs)
        save(draw(logs), output)
    except PlotError as error:
        fail(str(error))
    except ImportError as error:
        fail(f"{error}; run pip install -r requirements-torch.txt")
    except OSError as error:
        fail(f"cannot read {error.filename}: {error.strerror}; check the path and its permissions")
    for note in notes:
        print("Note:", note)
    print_summary(logs)
    print("Figure:", output)


if __name__ == "__main__":
    main()
