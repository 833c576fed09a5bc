"""The figure of docs/results.md on recipes, from the committed runs.

`python tools/recipes.py` draws logs/reference/recipes/recipes.png and prints a row for each run. It
needs matplotlib and pandas, which are in PyTorch's environment.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import pandas as pd  # noqa: E402

LOGS = Path(__file__).resolve().parent.parent / "logs" / "reference"
RECIPES = {"paper": "#00466e", "paper-lr-1e-3": "#f0ad30"}
PANELS = {"val_loss": "Validation loss", "acc_top1": "Top-1 accuracy"}


def main():
    tiny = pd.concat([pd.read_csv(path) for path in sorted(LOGS.glob("seed-*/log.csv"))])
    tiny = tiny.groupby("epoch").mean(numeric_only=True)
    runs = {name: pd.read_csv(LOGS / "recipes" / name / "log.csv") for name in RECIPES}
    torch = pd.read_csv(LOGS / "recipes" / "paper" / "log_torch.csv")
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axes, (column, title) in zip(panels, PANELS.items()):
        axes.plot(tiny.index, tiny[column], color="grey", label="tiny, mean of nine seeds")
        for name, run in runs.items():
            axes.plot(run.epoch, run[column], color=RECIPES[name], label=name)
            averaged = dict(color=RECIPES[name], linestyle=":", label=f"{name}, averaged weights")
            axes.plot(run.epoch, run[f"{column}_ema"], **averaged)
        pytorch = dict(color="black", linestyle=(0, (4, 4)), label="paper, PyTorch")
        axes.plot(torch.epoch, torch[column], **pytorch)
        axes.set(title=title, xlabel="epoch")
        axes.legend()
    figure.savefig(LOGS / "recipes" / "recipes.png", dpi=150)
    for name, run in {"tiny": tiny, **runs, "paper, PyTorch": torch}.items():
        last, best = run.iloc[-1], run.acc_top1.max()
        print(
            f"{name:14} epochs {len(run)}, final top-1 {last.acc_top1:.3f} (averaged weights "
            f"{last.get('acc_top1_ema', float('nan')):.3f}), best {best:.3f}, validation loss "
            f"{last.val_loss:.3f}, training loss {last.train_loss:.3f}"
        )


if __name__ == "__main__":
    main()
