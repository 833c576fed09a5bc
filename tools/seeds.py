"""Final and best accuracies of the committed runs, and how far the frameworks are apart.

`python tools/seeds.py` reads logs/reference/seed-*/ and prints a row for each run, the means and
standard deviations, and the gaps. It needs pandas, which is in PyTorch's environment.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from plot import LOGS  # noqa: E402


def read(folder):
    """{(framework, seed): log} of every run in `folder`."""
    return {
        (framework, path.parent.name.removeprefix("seed-")): pd.read_csv(path)
        for framework, name in LOGS.items()
        for path in sorted(folder.glob(f"seed-*/{name}"))
    }


def accuracies(logs):
    """A row for each run, and the mean and standard deviation of each framework with several.

    Late accuracies are means over epochs 11 to 20.
    """
    rows = []
    for (framework, seed), log in logs.items():
        top1, top5 = log.acc_top1, log.acc_top5
        rows.append(
            dict(
                run=framework,
                seed=seed,
                final_top1=top1.iloc[-1],
                final_top5=top5.iloc[-1],
                late_top1=top1.iloc[10:].mean(),
                late_top5=top5.iloc[10:].mean(),
                best_top1=top1.max(),
                best_top5=top5.max(),
                train_loss=log.train_loss.iloc[-1],
                minutes=log.epoch_time.sum(),
            )
        )
    table = pd.DataFrame(rows)
    for framework, runs in table.groupby("run"):
        if len(runs) > 1:
            numbers = runs.drop(columns=["run", "seed"])
            for name, row in (("mean", numbers.mean()), ("std", numbers.std())):
                table.loc[len(table)] = dict(run=framework, seed=name, **row)
    return table


def gaps(logs):
    """Largest gap (with its epoch) and mean gap of the training losses over the epochs.

    Gaps are in percent of PyTorch's losses.
    """
    rows = []
    for (framework, seed), log in logs.items():
        if framework == "PyTorch" or ("PyTorch", seed) not in logs:
            continue
        other = logs["PyTorch", seed]
        for column in ("train_loss_main", "train_loss_aux"):
            gap = 100 * (log[column] - other[column]).abs() / other[column]
            rows.append(
                {
                    "run": f"{framework} against PyTorch",
                    "seed": seed,
                    "loss": column,
                    "largest %": gap.max(),
                    "epoch": gap.idxmax() + 1,
                    "mean %": gap.mean(),
                }
            )
    return pd.DataFrame(rows)


def main():
    parser = argparse.ArgumentParser(description="Accuracies and gaps of the committed runs.")
    parser.add_argument(
        "--logs",
        type=Path,
        default=ROOT / "logs" / "reference",
        help="folder with seed-0/, seed-1/, ...",
    )
    logs = read(parser.parse_args().logs)
    if not logs:
        problem = "no runs in that folder; give --logs one that has seed-0/log.csv"
        parser.exit(2, f"{parser.prog}: error: {problem}\n")
    with pd.option_context("display.width", 200):
        print(accuracies(logs).to_string(index=False, float_format="%.4f"))
        print(gaps(logs).to_string(index=False, float_format="%.2f"))


if __name__ == "__main__":
    main()
