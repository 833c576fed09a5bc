"""The figure of docs/results.md on recipes, from the committed runs.

`python tools/recipes.py` draws logs/reference/recipes/recipes.png and prints a row for each recipe.
It needs matplotlib and pandas, which are in PyTorch's environment.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import pandas as pd  # noqa: E402

LOGS = Path(__file__).resolve().parent.parent / "logs" / "reference" / "recipes"
# name: the folders of its runs, its color
RECIPES = {
    "tiny": ("tiny-[0-9]", "grey"),
    "paper": ("paper-[0-9]", "#00466e"),
    "paper --lr 1e-3": ("paper-lr-1e-3", "#f0ad30"),
}
PANELS = {"val_loss": "Validation loss", "acc_top1": "Top-1 accuracy"}


def statistics_of(runs, column):
    """Mean and, of more than one run, standard deviation of `column` at the last epoch."""
    values = pd.Series([run[column].iloc[-1] for run in runs if column in run])
    return " ± ".join(f"{value:.3f}" for value in (values.mean(), values.std()) if value == value)


def main():
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    torch = pd.read_csv(LOGS / "paper-0" / "log_torch.csv")
    for name, (folders, color) in RECIPES.items():
        runs = [pd.read_csv(path / "log.csv") for path in sorted(LOGS.glob(folders))]
        epochs = pd.concat(runs).groupby("epoch")
        lines = {column: epochs[column] for column in runs[0] if column != "epoch"}
        for axes, column in zip(panels, PANELS):
            mean = lines[column].mean()
            seeds = f", {len(runs)} seeds" if len(runs) > 1 else ""
            axes.plot(mean, color=color, label=name + seeds)
            axes.fill_between(
                mean.index, lines[column].min(), lines[column].max(), color=color, alpha=0.2
            )
            if f"{column}_ema" in lines:
                averaged = dict(color=color, linestyle=":", label=f"{name}, averaged weights")
                axes.plot(lines[f"{column}_ema"].mean(), **averaged)
        columns = ("acc_top1", "acc_top1_ema", "val_loss", "train_loss")
        numbers = ", ".join(f"{column} {statistics_of(runs, column) or '-'}" for column in columns)
        print(f"{name}, {len(runs)} runs of {len(mean)} epochs: {numbers}")
    for axes, (column, title) in zip(panels, PANELS.items()):
        pytorch = dict(color="black", linestyle=(0, (4, 4)), label="paper, PyTorch, seed 0")
        axes.plot(torch.epoch, torch[column], **pytorch)
        axes.set(title=title, xlabel="epoch")
    panels[-1].legend()
    figure.savefig(LOGS / "recipes.png", dpi=150)


if __name__ == "__main__":
    main()
