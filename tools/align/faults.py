"""What kind of fault a departure looks like, said in a sentence: align.py's verdict for a pair.

Each kind is tried on the numbers: the difference is the output of an earlier module (a lost
residual), the variance that a norm divided by is another one, and so on. tests/test_ports.py plants
each of them.
"""

import numpy as np
from tools.align.compare import EPS, adamw, of_check
from tools.align.names import kind
from tools.align.side import module_name

# How much of a difference may be left unexplained where a sentence names its cause.
UNEXPLAINED = 0.02


class Departure:
    """A module's output that departs, and what is known of it.

    ours, exact: its output in Jittor and in the reference; x: the reference's input, or None.
    """

    def __init__(self, pair, label):
        self.pair, self.label = pair, label
        self.mode, name = label.split(" ", 1)
        self.module = module_name(name)
        theirs = pair.module_of[self.module]
        self.jittor = pair.about["jittor"]["modules"][self.module]
        self.torch = pair.about["reference"]["modules"][theirs]
        self.ours = pair.output(label, "jittor").astype(np.float64)
        self.exact = pair.output(label, "reference")
        self.x = pair.output(label, "reference", "into")
        self.kind = kind(self.torch["kind"])

    def weight(self, name):
        return self.pair.weight(f"{self.module}.{name}")


def explains(guess, difference):
    """Whether `guess` is all of `difference` but for UNEXPLAINED of it."""
    size = np.abs(difference).mean()
    return size > 0 and np.abs(difference - guess).mean() < UNEXPLAINED * size


def ignored_forward(d):
    if d.jittor["ignored"]:
        called = d.jittor["called"]
        return f"its class defines `forward`, but Jittor calls `execute`, here {called}"
    return None


def other_settings(d):
    """Settings of the same name that differ; a number stands for itself along every axis."""
    ours, theirs = d.jittor["settings"], d.torch["settings"]
    differing = [
        f"{name} is {shown(ours[name])} in Jittor, {shown(theirs[name])} in PyTorch"
        for name in ours
        if name in theirs and name != "p" and len({*ours[name]} | {*theirs[name]}) > 1
        if ours[name] != theirs[name] and set(ours[name]) != set(theirs[name])
    ]
    return "; ".join(differing) or None


def shown(values):
    return values[0] if len(set(values)) == 1 else tuple(values)


def lost_residual(d):
    """What is missing is the output of a module before it, or its input."""
    if d.ours.shape != d.exact.shape:
        return None
    # An activation after the sum lets the difference through where neither is 0.
    passed = (d.ours != 0) & (d.exact != 0)
    if passed.sum() < max(8, passed.size // 20):
        return None
    difference = (d.exact - d.ours)[passed]
    for text, array in d.pair.before(d.label):
        if array.shape != d.exact.shape:
            continue
        for sign, word in ((1, "lost"), (-1, "added")):
            if explains(sign * array[passed], difference):
                return f"a {word} residual: the difference is {text}"
    return None


def norm(d):
    """The variance that a norm divided by, from its output."""
    if "norm" not in d.kind or d.x is None or d.ours.shape != d.exact.shape:
        return None
    batch = "batch" in d.kind
    if batch:
        axes = (0, *range(2, d.x.ndim))
    elif "layer" in d.kind and d.weight("weight") is not None:
        axes = tuple(range(d.x.ndim - d.weight("weight").ndim, d.x.ndim))
    else:
        return None
    shape = [1] * d.x.ndim
    for axis in (1,) if batch else axes:
        shape[axis] = d.x.shape[axis]
    weight, bias = (
        default if d.weight(name) is None else d.weight(name).astype(np.float64).reshape(shape)
        for name, default in (("weight", 1.0), ("bias", 0.0))
    )
    mean, variance = d.x.mean(axes, keepdims=True), d.x.var(axes, keepdims=True)
    n = d.x.size // mean.size
    if batch and d.mode == "evaluation" and d.weight("running_var") is not None:
        mean, variance = (d.weight(f"running_{s}").reshape(shape) for s in ("mean", "var"))
        mean, variance = mean.astype(np.float64), variance.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        centred, normal = d.x - mean, (d.ours - bias) / weight
        slope = (normal * centred).sum(axes, keepdims=True) / (centred**2).sum(axes, keepdims=True)
        used = 1 / slope**2
    known = np.isfinite(used) & (variance > 0)
    if not known.any() or not explains(
        (slope * centred + 0 * normal)[np.broadcast_to(known, normal.shape)],
        normal[np.broadcast_to(known, normal.shape)],
    ):
        return None
    eps = d.torch["settings"].get("eps", [0.0])[0]
    used, variance = used[known], variance[known]
    found = float(np.median(used - variance))
    noise = 100 * EPS * variance.max()
    if (
        abs(found - eps) > 0.02 * eps + noise
        and np.ptp(used - variance) < 0.05 * abs(found) + noise
    ):
        return f"another epsilon: it adds {found:.3g} to the variance, PyTorch {eps:.3g}"
    if n > 1:
        for factor, word in ((n / (n - 1), "unbiased"), ((n - 1) / n, "biased")):
            if explains(variance * factor - variance, used - eps - variance):
                mean_of = "over n - 1" if word == "unbiased" else "over n"
                return f"the {word} variance, a mean {mean_of} = {n - (word == 'unbiased')} values"
    if batch and d.mode == "evaluation":
        return None
    ratio = float((np.abs(mean) / np.sqrt(d.x.var(axes, keepdims=True) + eps)).max())
    error = np.abs(d.ours - d.exact).max() / np.abs(d.exact).max()
    if error < 100 * EPS * (1 + ratio**2):
        return (
            f"rounding in the variance, off by {error:.0e}: E[x^2] - E[x]^2 loses digits where the "
            f"mean is large beside the spread, here up to {ratio:.3g} times"
        )
    return None


def pooling(d):
    if d.kind != "pool":
        return None
    if d.x is not None and d.x.ndim == 4 and d.ours.shape == d.exact.shape:
        (H, W), (h, w) = d.x.shape[2:], d.ours.shape[2:]
        rows, cols = H // h, W // w
        if rows and cols and (H % h or W % w):
            equal = np.empty(d.ours.shape)
            for i in range(h):
                for j in range(w):
                    window = d.x[:, :, i * rows : i * rows + H - (h - 1) * rows]
                    window = window[:, :, :, j * cols : j * cols + W - (w - 1) * cols]
                    equal[:, :, i, j] = window.mean((2, 3))
            if explains(equal - d.exact, d.ours - d.exact):
                return f"windows of equal size, which Jittor's adaptive pooling cuts: {H} -> {h}"
    return "another pooling window: its size, stride or padding, or the border counted otherwise"


def scaled(d):
    if d.ours.shape != d.exact.shape or not d.ours.any():
        return None
    factor = float((d.ours * d.exact).sum() / (d.exact**2).sum())
    if abs(factor - 1) > 1e-3 and explains(factor * d.exact, d.ours):
        return f"it is {factor:.4g} times PyTorch's"
    return None


def in_general(d):
    if d.ours.shape != d.exact.shape:
        return f"its shape is {d.ours.shape}, PyTorch's {d.exact.shape}"
    if d.torch["leaf"]:
        return "its input agrees: another setting, another formula, or weights that it does not use"
    return "what it calls agrees: what its own `execute` does with that differs"


KINDS = (ignored_forward, lost_residual, norm, pooling, scaled, in_general)


def of_forward(pair, name):
    label = name.split(" has shape ")[0]
    departure = Departure(pair, label)
    reasons = [next(filter(None, (kind(departure) for kind in KINDS)))]
    settings = other_settings(departure)
    reasons += [settings] if settings else []
    return f"In the forward pass they first depart at {label}: {'; '.join(reasons)}."


def of_gradients(pair, names, departs_before):
    """names: of the gradients that depart; departs_before: whether the forward pass departs."""
    order = {}
    for label in pair.forward:
        mode, name = label.split(" ", 1)
        if mode == "training":
            order.setdefault(module_name(name), len(order))

    def place(key):
        return order.get(key.rpartition(".")[0], -1)

    keys = [name.split(" is missing")[0].split(" has shape ")[0] for name in names]
    last = max(keys, key=place)
    frozen = [key for key, name in zip(keys, names) if name.endswith(" is missing")]
    begin = f"In the gradients, coming from the loss, they first depart at {last}: "
    if last in frozen:
        return begin + "it has none, a frozen parameter."
    ours, exact = (pair.arrays("gradients", run)[last] for run in ("jittor", "reference"))
    if not ours.any():
        return (
            begin + "it is 0: stop_grad() works in place, and a part switched to eval() is frozen."
        )
    if departs_before:
        return begin + "it follows from the forward pass."
    factor = float((ours * exact).sum() / (exact**2).sum())
    if abs(factor - 1) > 1e-3 and explains(factor * exact, ours.astype(np.float64)):
        return begin + f"it is {factor:.4g} times PyTorch's, a sum for a mean or the reverse."
    after = [module for module in order if order[module] > place(last)]
    sentence = (
        "the forward pass agrees, so it is the gradient of this module or of what stands between "
        f"it and {after[0] if after else 'the loss'}"
    )
    error = np.abs(ours - exact).mean() / np.abs(exact).mean()
    small = f"; or of the loss, as it is small, {error:.0e} of its size" if error < 1e-4 else ""
    return begin + sentence + small + "."


def of_step(pair, name):
    """The difference of a step that agrees in its gradients, and of what it is a multiple."""
    weights = pair.arrays("weights", "jittor")
    options = {k: float(v) for k, v in of_check(pair.runs["torch"], "options").items()}
    ours = pair.arrays("step", "jittor")
    if pair.about["torch"]["optimizer"] == pair.about["jittor"]["optimizer"] == "AdamW":
        exact = adamw(weights, pair.arrays("gradients", "jittor"), options)
    else:
        exact = pair.arrays("step", "reference")
    keys = [key for key in ours if key in exact and ours[key].shape == exact[key].shape]
    begin = f"In the step of the optimizer they first depart at {name}: "
    if not keys:
        return begin + "no parameter is trained by both."
    w, ours, exact = (
        np.concatenate([arrays[key].astype(np.float64).ravel() for key in keys])
        for arrays in (weights, ours, exact)
    )
    difference = ours - exact
    slope = float((difference * w).sum() / (w * w).sum())
    # float32 holds the new weight to half a unit in the last place, beside which a decay is small.
    if np.abs(difference - slope * w).mean() < 0.1 * np.abs(difference).mean():
        decay = options["weight_decay"] - slope / options["lr"]
        decay = 0.0 if abs(decay) < 1e-2 * options["weight_decay"] else decay
        return begin + f"weight decay {decay:.2g}, PyTorch's is {options['weight_decay']:.2g}."
    moved = exact - w
    factor = float(((ours - w) * moved).sum() / (moved**2).sum())
    if explains(factor * moved, ours - w):
        return begin + f"it goes {factor:.3g} times as far: another learning rate."
    return begin + "another epsilon, other betas, or parameters without a gradient that decay."


def of_buffers(pair, name):
    key = name.split(" is missing")[0].split(" has shape ")[0]
    begin = f"In what training keeps beside the weights they first depart at {key}: "
    module, _, buffer = key.rpartition(".")
    label = f"training {module}"
    old = pair.weight(key)
    if name != key or old is None or label not in pair.forward:
        return begin + "it is missing or has another shape."
    settings = pair.about["reference"]["modules"][pair.module_of[module]]["settings"]
    momentum = settings.get("momentum", [0.1])[0]
    ours, exact = (pair.arrays("buffers", run)[key] for run in ("jittor", "reference"))
    moved, old = exact - old, old.astype(np.float64)
    if buffer == "running_var":
        n = pair.output(label, "reference").size // exact.size
        biased = (1 - momentum) * old + (exact - (1 - momentum) * old) * (n - 1) / n
        if explains(biased - exact, ours - exact):
            return begin + f"the biased running variance, (n - 1) / n of PyTorch's at n = {n}."
    factor = float(((ours - old) * moved).sum() / (moved**2).sum())
    if abs(factor - 1) > 1e-3 and explains(factor * moved, ours - old):
        return begin + f"another momentum, {factor * momentum:.3g} for {momentum:.3g}."
    return begin + "another running statistic."


def of_trainable(names):
    frozen = [name for name in names if name.endswith(" is frozen in Jittor")]
    if frozen:
        return f"{frozen[0]}, a frozen parameter: a Var that was stopped, or a part put to eval()."
    return f"{names[0]}: to Jittor every float Var is a parameter, unless stopped or named _..."


def explain(pair, rows, departures):
    """Sentences on the departures, {check: name of the first}, in the order of the checks."""
    failed = {
        check: [row["name"] for row in rows if row["check"] == check and not row["ok"]]
        for check in departures
    }
    sentences = []
    for check, first in departures.items():
        if not failed[check] and check not in ("step",):
            sentences.append(f"{check}: no array departs by itself, but the mean of all does.")
        elif check == "trainable":
            sentences.append(of_trainable(failed[check]))
        elif check == "forward":
            sentences.append(of_forward(pair, first))
        elif check == "gradients":
            sentences.append(of_gradients(pair, failed[check], "forward" in departures))
        elif (
            check == "adamw" or check == "step" and not any(row["check"] == "adamw" for row in rows)
        ):
            sentences.append(of_step(pair, first))
        elif check == "buffers":
            sentences.append(of_buffers(pair, first))
        elif check == "dropout":
            sentences.append(f"Another dropout: {first}.")
        elif check in ("weights", "loss", "steps"):
            sentences.append(f"The {check} depart{'s' * (check == 'loss')}, first: {first}.")
    return sentences
