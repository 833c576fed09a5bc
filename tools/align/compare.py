"""The arithmetic of align.py: how far two runs lie apart, and how far rounding alone may part them.

Arrays come by name, rows of the table are dicts with the columns of COLUMNS.
"""

import csv
import sys

import numpy as np

EPS = float(np.finfo(np.float32).eps)
# How many times PyTorch's error in float32 Jittor may have: in one array, where chance is large,
ARRAY_LIMIT = 10
# in the mean over the arrays of a check, where it averages out,
CHECK_LIMIT = 3
# and in the loss of a step, beside PyTorch from perturbed weights; both averaged over WINDOW steps,
STEP_LIMIT = 3
WINDOW = 10
# the largest of so many perturbed runs: one of two may be 16 times as far away as the other.
PERTURBED_RUNS = 5
STATISTICS = ("running_mean", "running_var")
# What is equal or not, and how a line of the table counts it.
EXACT = {
    "weights": "arrays, {} equal bit by bit",
    "batches": "arrays, {} equal bit by bit",
    "dropout": "layers, {} of the same probability",
    "trainable": "arrays, {} trained by both or by neither",
}
COLUMNS = ("check", "name", "max_error", "mean_error")
COLUMNS += ("torch_max_error", "torch_mean_error", "limit", "ok")


def relative_errors(actual, reference, floor):
    """(maximum, mean) of |actual - reference| relative to |reference|'s, or `floor` if larger."""
    difference, size = np.abs(actual.astype(np.float64) - reference), np.abs(reference)
    return difference.max() / max(size.max(), floor), difference.mean() / max(size.mean(), floor)


def floor_of(reference):
    """The size that errors are at least relative to: that of the arrays of a check at large.

    Some gradients are zero in exact arithmetic, such as that of a bias before BatchNorm.
    """
    size = np.median([np.abs(array).mean() for array in reference.values()])
    return max(size, np.finfo(np.float64).tiny)  # more than half may be zero


def largest_errors(runs, reference):
    """{"check/name": relative errors (maximum, mean), each the largest of the runs}.

    runs: what each computed, {"check/name": array}, a generator so that one at a time is kept;
    reference: the same of the reference, and perhaps more.
    """
    largest = {}
    for arrays in runs:
        for check in dict.fromkeys(name.split("/")[0] for name in arrays):
            exact = of_check(reference, check)
            floor = floor_of(exact)
            for name, array in of_check(arrays, check).items():
                errors = relative_errors(array, exact[name], floor)
                key = f"{check}/{name}"
                largest[key] = np.maximum(largest.get(key, 0), errors)
    return largest


def compare_bits(check, jittor, torch):
    """Rows of a check for equality."""
    for name in [*torch, *(name for name in jittor if name not in torch)]:
        same = name in jittor and name in torch and jittor[name].dtype == torch[name].dtype
        same = same and np.array_equal(jittor[name], torch[name])
        yield dict(check=check, name=name, ok=same)


def determined(torch, reference, perturbed):
    """{name: which elements of a gradient have a sign that float32 can tell}.

    They are more than ten times as large as its largest error; perturbed: as in compare_arrays.
    """
    floor, kept = floor_of(reference), {}
    for name, array in reference.items():
        size = max(np.abs(array).max(), floor)
        errors = relative_errors(torch[name], array, floor), perturbed.get(name, (0, 0))
        kept[name] = np.abs(array) > 10 * size * max(largest for largest, _ in errors)
    return kept


def adamw(weights, gradients, options):
    """{name: parameter after AdamW's first step from these weights and gradients}, in float64.

    options: its "lr", "eps" and "weight_decay".
    """
    lr, eps, decay = (float(options[name]) for name in ("lr", "eps", "weight_decay"))
    # At the first step the corrected moments are the gradient and its square.
    return {
        name: weights[name] * (1 - lr * decay) - lr * g / (np.abs(g) + eps)
        for name, g in ((name, gradient.astype(np.float64)) for name, gradient in gradients.items())
    }


def compare_arrays(check, jittor, torch, reference, torch_reference, keep=None, perturbed=None):
    """Rows of a check within rounding.

    keep: {name: mask of the elements to compare}, all of them where there is none. PyTorch's error
    is that against `torch_reference`, or that of a perturbed run, {name: (maximum, mean)}, if it is
    larger. What Jittor fuses into one kernel, in inference and in training, has no counterpart and
    is left out; in evaluation nothing is fused.
    """
    keep, perturbed = keep or {}, perturbed or {}
    fused = {name for name in reference if name.startswith(("inference ", "training "))}
    for name in reference:
        if name not in jittor and name not in fused:
            yield dict(check=check, name=f"{name} is missing", ok=False)
    floor = floor_of(reference)
    for name in (name for name in reference if name in jittor):
        ours, theirs = jittor[name].shape, reference[name].shape
        if ours != theirs:
            yield dict(check=check, name=f"{name} has shape {ours}, not {theirs}", ok=False)
            continue
        kept = keep.get(name, np.ones(reference[name].shape, bool))
        if not kept.any():
            continue
        exact, torch_exact = reference[name][kept], torch_reference[name][kept]
        largest, mean = relative_errors(jittor[name][kept], exact, floor)
        errors = relative_errors(torch[name][kept], torch_exact, floor)
        torch_largest, torch_mean = np.maximum(errors, perturbed.get(name, 0))
        # No limit is below half a unit in the last place: float32 cannot be nearer on the whole.
        limit = ARRAY_LIMIT * max(torch_mean, EPS / 2)
        if check == "step" and not name.endswith(STATISTICS):
            limit = np.inf
        yield dict(
            check=check,
            name=name,
            max_error=largest,
            mean_error=mean,
            torch_max_error=torch_largest,
            torch_mean_error=torch_mean,
            limit=limit,
            ok=bool(mean <= limit),
        )


def smoothed(gaps):
    """Means over windows of ten steps, (runs, steps) -> (runs, windows), one for a shorter run."""
    width = min(WINDOW, gaps.shape[1])
    return np.lib.stride_tricks.sliding_window_view(gaps, width, axis=1).mean(2)


def compare_steps(jittor, torch, perturbed, check="steps"):
    """Rows of the last check, one a step; the limit is that of the window that ends there.

    jittor and torch are losses, (steps,), perturbed those of several runs, (runs, steps).
    """
    gap, chance = (np.abs(runs - torch) / np.abs(torch) for runs in (jittor[None], perturbed))
    # A loss is a single number, which rounding may move though no weight does.
    allowed = np.maximum(smoothed(chance).max(0), ARRAY_LIMIT / STEP_LIMIT * EPS / 2)
    for i, (ours, theirs) in enumerate(zip(smoothed(gap)[0], allowed), min(WINDOW, len(torch)) - 1):
        yield dict(
            check=check,
            name=f"step {i + 1}",
            max_error=gap[0, i],
            mean_error=ours,
            torch_max_error=chance[:, i].max(),
            torch_mean_error=theirs,
            limit=STEP_LIMIT * theirs,
            ok=bool(ours <= STEP_LIMIT * theirs),
        )


def of_check(arrays, check):
    start = f"{check}/"
    return {name[len(start) :]: arrays[name] for name in arrays if name.startswith(start)}


def excess(row):
    """How many times PyTorch's error the mean error of a row is."""
    return row["mean_error"] / max(row["torch_mean_error"], EPS / 2)


def summary(check, rows):
    """One line of the table, and the name of the first row beyond its limit, or None."""
    failed = [row for row in rows if not row["ok"]]
    if check in EXACT:
        text = f"{len(rows)} {EXACT[check].format(len(rows) - len(failed))}"
    else:
        measured = [row for row in rows if "mean_error" in row]
        if not measured:
            return f"{check:9} FAILED, nothing to compare", "everything"
        means = [[row[key] for row in measured] for key in ("mean_error", "torch_mean_error")]
        mean, torch_mean = map(np.mean, means)
        maxima = [[row[key] for row in measured] for key in ("max_error", "torch_max_error")]
        largest, torch_largest = map(max, maxima)
        limit = CHECK_LIMIT * max(torch_mean, EPS / 2)
        limited = [row for row in measured if np.isfinite(row["limit"])]
        if limited:
            nearest = max(limited, key=lambda row: row["mean_error"] / row["limit"])
            share = nearest["mean_error"] / nearest["limit"]
            nearest = f"nearest to its limit: {nearest['name']}, {share:.2f} of it"
        else:
            nearest = f"judged by the mean alone, {mean / limit:.2f} of its limit"
        text = (
            f"{len(rows):4} | max {largest:.1e}  mean {mean:.1e} | allowed error from: "
            f"max {torch_largest:.1e}  mean {torch_mean:.1e} | {nearest}"
        )
        if not failed and not check.startswith("steps") and mean > limit:
            first = max(measured, key=excess)["name"]
            return f"{check:9} {text} | FAILED, the mean is beyond its limit, most {first}", first
    first = failed[0]["name"] if failed else None
    beyond = f"FAILED, {len(failed)} beyond the limit, the first is {first}"
    return f"{check:9} {text} | {beyond if failed else 'ok'}", first


def draw(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    measured = [row for row in rows if row["check"] == "forward" and "mean_error" in row]
    forward = [row for row in measured if row["name"].startswith("training")]
    steps = [row for row in rows if row["check"] == "steps"]
    numbers = [int(row["name"].split()[1]) for row in steps]
    change = "weights perturbed by one unit in the last place"
    perturbed = f"PyTorch, {change}, largest of {PERTURBED_RUNS}"
    for axes, x, shown, error, label in (
        (left, range(len(forward)), forward, "mean_error", "PyTorch in float32"),
        (right, numbers, steps, "max_error", perturbed),
    ):
        theirs, ours = ([row[key] for row in shown] for key in (f"torch_{error}", error))
        axes.plot(x, theirs, color="#f0ad30", linewidth=2.5, label=label)
        axes.plot(x, ours, color="#00466e", linewidth=1, label="Jittor")
        axes.set_yscale("log")
        axes.legend()
    left.set(title="Every module in order of execution", xlabel="module")
    left.set(ylabel="mean error relative to PyTorch in float64")
    right.set(title="Training step after training step", xlabel="step")
    right.set(ylabel="relative gap of the loss to PyTorch")
    figure.savefig(path, dpi=150)


def fail(message):
    print(f"align.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def check_output(folder):
    """Make the folder; end with one line unless a table can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "alignment.csv").touch()
    except OSError as error:
        fail(f"cannot write to {folder} ({error.strerror}); give another --output")


def write_table(rows, path):
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
