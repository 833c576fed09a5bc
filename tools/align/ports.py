"""align.py for any pair: a Jittor port beside the PyTorch model that it is a port of.

docs/ports.md shows it; docs/alignment.md says what each check compares.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from tools.align import faults
from tools.align.compare import (
    adamw,
    check_output,
    compare_arrays,
    compare_bits,
    compare_steps,
    determined,
    draw,
    fail,
    of_check,
    summary,
    write_table,
)
from tools.align.names import UserError, kind, pairs, read_map, rename, rename_module
from tools.align.side import OUTPUT, make_inputs, module_name
from tools.align.worker import run_worker

CHECKS = ("weights", "dropout", "trainable", "forward", "loss", "gradients", "step", "adamw")
CHECKS += ("buffers", "steps")
# What has no meaning if a module draws in training.
TRAINING = ("loss", "gradients", "step", "adamw", "buffers", "steps")


def add_arguments(parser):
    add = parser.add_argument_group("any other pair of models").add_argument
    for name, framework in (("jittor", "Jittor"), ("torch", "PyTorch")):
        spec = f"{framework}'s model: module:function, or file.py:function"
        add(f"--{name}", metavar="MODEL", default=None, help=spec)
    shape = "2,3,224,224 (normal), 2,16:1000 (integers below 1000) or an .npz; once for each input"
    add("--input", action="append", metavar="SHAPE", help=shape)
    add("--kwargs", default="{}", metavar="JSON", help="arguments of both functions")
    for name in ("jittor", "torch"):
        add(f"--{name}-kwargs", default="{}", metavar="JSON", help="arguments of one alone")
    add("--map", metavar="FILE", help="lines `pattern -> replacement`: PyTorch's keys as Jittor's")
    add("--optimizer-kwargs", default='{"lr": 0.001}', metavar="JSON", help="arguments of AdamW")
    for name in ("jittor", "torch"):
        add(f"--{name}-loss", metavar="LOSS", help="file.py:function of the output and targets")
        optimizer = "file.py:function of the parameters, instead of AdamW"
        add(f"--{name}-optimizer", metavar="OPTIMIZER", help=optimizer)
    add("--aligned", action="store_true", help="jittor_impl/aligned in place of Jittor's layers")


def parse_json(option, text):
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{option} {text} is not JSON like '{{\"num_classes\": 20}}'")
    return value


def jobs(args, folder):
    """The jobs of a pair by name, PyTorch's in the order in which they need each other's files."""
    if not (args.jittor and args.torch and args.input):
        raise UserError("--jittor, --torch and --input go together")
    make_inputs(args.input, args.seed, 0)
    read_map(args.map)
    both = parse_json("--kwargs", args.kwargs)
    if bool(args.jittor_loss) != bool(args.torch_loss):
        raise UserError("--jittor-loss and --torch-loss go together")
    if bool(args.jittor_optimizer) != bool(args.torch_optimizer):
        raise UserError("--jittor-optimizer and --torch-optimizer go together")
    made = {}
    for job in ("torch", "torch64", "perturbed", "jittor"):
        name = "jittor" if job == "jittor" else "torch"
        own = parse_json(f"--{name}-kwargs", getattr(args, f"{name}_kwargs"))
        made[job] = dict(
            framework="torch" if job == "perturbed" else job,
            device=args.device,
            factory=getattr(args, name),
            kwargs={**both, **own},
            input=args.input,
            optimizer=getattr(args, f"{name}_optimizer"),
            optimizer_kwargs=parse_json("--optimizer-kwargs", args.optimizer_kwargs),
            loss=getattr(args, f"{name}_loss"),
            seed=args.seed,
            steps=args.steps,
            aligned=args.aligned,
            map=args.map if job == "jittor" else None,
            weights=None if job == "torch" else str(folder / "torch.npz"),
            reference=str(folder / "torch64.npz") if job == "perturbed" else None,
            output=str(folder / f"{job}.npz"),
        )
    return made


def run_jobs(args, framework, todo, folder):
    """Run jobs in one process of an environment: their arrays {"check/name": array}, lazily read.

    What one of them did wrong ends the program with one line.
    """
    path = folder / f"{framework}.json"
    path.write_text(json.dumps(todo))
    run_worker(args, framework, "--worker", framework, "port", path)
    return [np.load(job["output"]) for job in todo]


def run_torch(args, folder):
    """PyTorch's side, {"torch", "reference", "perturbed": arrays}."""
    made = jobs(args, folder)
    todo = [made[name] for name in ("torch", "torch64", "perturbed")]
    return dict(zip(("torch", "reference", "perturbed"), run_jobs(args, "torch", todo, folder)))


def run_jittor(args, folder):
    """Jittor's side; PyTorch's has been run in the same folder."""
    return run_jobs(args, "jittor", [jobs(args, folder)["jittor"]], folder)[0]


class Pair:
    """The arrays of all runs under Jittor's names, and what is known of the modules."""

    def __init__(self, runs, patterns):
        self.runs = runs
        names = ("jittor", "torch", "reference")
        self.about = {name: json.loads(str(runs[name]["about"])) for name in names}
        self.patterns, self.notes = patterns, []
        self.module_of = {}  # {name of a module in Jittor: in PyTorch}
        self.match_outputs()

    def match_outputs(self):
        """Decide which recorded outputs are compared, and note what is left out."""
        jittor, torch = self.runs["jittor"], self.runs["reference"]
        kinds, labels = {}, {}
        for name, run in (("jittor", jittor), ("reference", torch)):
            modules = self.about[name]["modules"]
            kinds[name], labels[name] = {}, {}
            for key in (key for key in run if key.startswith("forward/")):
                label = key.removeprefix("forward/")
                module = module_name(label.split(" ", 1)[1])
                new = module
                if name == "reference":
                    new = rename_module(module, self.patterns)
                shown = label.replace(f" {module}", f" {new}", 1) if module else label
                kinds[name][shown] = kind(modules[module]["kind"]), run[key].shape
                labels[name][shown] = label
        found = pairs(kinds["jittor"], kinds["reference"])
        self.forward = {}  # {name in Jittor: name in PyTorch}, in order of execution
        for theirs in kinds["reference"]:
            if theirs in found:
                ours = found[theirs]
                self.forward[labels["jittor"][ours]] = labels["reference"][theirs]
                ours, theirs = (
                    module_name(x.split(" ", 1)[1]) for x in (ours, labels["reference"][theirs])
                )
                self.module_of[ours] = theirs
        for name, matched, side in (
            ("jittor", set(found.values()), "Jittor"),
            ("reference", set(found), "PyTorch"),
        ):
            left = [module_name(x.split(" ", 1)[1]) for x in kinds[name] if x not in matched]
            left = list(dict.fromkeys(left))
            if left:
                self.notes.append(f"{len(left)} modules of {side} alone, the first is {left[0]}")

    def arrays(self, check, run):
        """{name: array} of a check."""
        if check == "forward":
            found = {label: self.output(label, run) for label in self.forward}
            return {label: array for label, array in found.items() if array is not None}
        found = of_check(self.runs[run], check)
        if run != "jittor":
            found = {rename(key, self.patterns): value for key, value in found.items()}
        return found

    def output(self, label, run, check="forward"):
        """What a module returned, or what went into it ("into"); None if that was not recorded."""
        key = f"{check}/{label if run == 'jittor' else self.forward[label]}"
        return self.runs[run].get(key)

    def weight(self, key):
        """The initial weight of this key in Jittor, or None."""
        return self.runs["jittor"].get(f"weights/{key}")

    def before(self, label):
        """Pairs (text, the reference's array) of what modules before it take and return."""
        mode = label.split(" ")[0]
        for other in self.forward:
            if not other.startswith(f"{mode} "):
                continue
            into = self.output(other, "reference", "into")
            if into is not None:
                yield f"the input of {other}", into
            if other == label:
                return
            yield f"the output of {other}", self.output(other, "reference")

    def trained(self, run):
        keys = self.about[run]["trained"]
        return keys if run == "jittor" else [rename(key, self.patterns) for key in keys]


def compare(pair, check):
    """The rows of a check."""
    about = pair.about
    if check == "dropout":
        return compare_dropout(pair)
    if check == "trainable":
        return compare_trainable(pair)
    if check == "steps":
        names = ("jittor", "torch", "perturbed")
        return compare_steps(*(pair.runs[name]["losses"] for name in names))
    if check == "weights":
        ours, theirs = (pair.arrays(check, run) for run in ("jittor", "torch"))
        return compare_bits(
            check,
            ours,
            {
                k: like(v, ours.get(k))
                for k, v in theirs.items()
                if k in ours or not k.endswith("num_batches_tracked")
            },
        )
    if check == "adamw":
        if any(about[run]["optimizer"] != "AdamW" for run in about):
            return []
        options = of_check(pair.runs["torch"], "options")
        exact = []
        for run in ("jittor", "torch"):
            parts = (pair.arrays(part, run) for part in ("weights", "gradients"))
            exact.append(adamw(*parts, options))
        ours, theirs = (pair.arrays("step", run) for run in ("jittor", "torch"))
        return compare_arrays(check, ours, theirs, *exact)
    ours, theirs, exact = (pair.arrays(check, run) for run in ("jittor", "torch", "reference"))
    if check == "buffers":
        exact = {
            key: value for key, value in exact.items() if key in ours and value.dtype.kind == "f"
        }
    keep = {}
    if check == "step":
        keep = determined(
            *(pair.arrays("gradients", run) for run in ("torch", "reference", "perturbed"))
        )
    if check == "forward" and any(about[run]["random"] for run in ("jittor", "torch")):
        exact = {key: value for key, value in exact.items() if not key.startswith("training ")}
    if not exact:
        return []
    perturbed = pair.arrays(check, "perturbed")
    rows = list(compare_arrays(check, ours, theirs, exact, exact, keep, perturbed))
    return without_other_shapes(pair, rows) if check == "forward" else rows


def without_other_shapes(pair, rows):
    """The rows of "forward", less those of another shape where the models as a whole agree.

    Such a module is cut otherwise: it concatenates what in PyTorch its caller does.
    """
    agree = {row["name"].split(" ")[0] for row in rows if row["ok"] and OUTPUT in row["name"]}
    left = [r for r in rows if " has shape " in r["name"] and r["name"].split(" ")[0] in agree]
    if left:
        first = left[0]["name"].split(" ", 1)[1]
        pair.notes.append(f"{len(left)} outputs of another shape left out, the first: {first}")
    return [row for row in rows if row not in left]


def like(array, other):
    """PyTorch's array in the type and shape that Jittor has for it: no 64-bit integers, no ()."""
    if other is None:
        return array
    return array.astype(other.dtype).reshape(other.shape) if array.size == other.size else array


def compare_dropout(pair):
    """Rows of layers that drop at random, by their probability."""
    for ours, theirs in pair.module_of.items():
        settings = [
            pair.about[run]["modules"][name]["settings"].get("p")
            for run, name in (("jittor", ours), ("torch", theirs))
        ]
        if all(settings):
            name = f"{ours} drops {settings[0][0]}, {theirs} {settings[1][0]}"
            same = settings[0] == settings[1]
            yield dict(check="dropout", name=ours if same else name, ok=same)


def compare_trainable(pair):
    """Rows of weights, by whether the optimizer is to change them."""
    ours, theirs = (set(pair.trained(run)) for run in ("jittor", "torch"))
    for key in pair.arrays("weights", "torch"):
        same = (key in ours) == (key in theirs)
        state = "frozen" if key in theirs else "trained"
        yield dict(check="trainable", name=key if same else f"{key} is {state} in Jittor", ok=same)


def verdict(args, runs):
    """(rows, lines of the table, {check: its first departure}, sentences, notes) of all runs."""
    pair = Pair(runs, read_map(args.map))
    rows, lines, departures = [], [], {}
    random = {side: pair.about[side]["random"] for side in ("jittor", "torch")}
    for side, framework in (("jittor", "Jittor"), ("torch", "PyTorch")):
        if random[side]:
            left = "the checks of training are left out"
            pair.notes.append(f"{framework} draws at random in {random[side]}: {left}")
    for check in CHECKS:
        if any(random.values()) and check in TRAINING or check == "steps" and not args.steps:
            continue
        found = list(compare(pair, check))
        if not found:
            continue
        line, first = summary(check, found)
        lines.append(line)
        if first:
            departures[check] = first
        rows += found
    return rows, lines, departures, faults.explain(pair, rows, departures), pair.notes


def report(args, runs):
    """Print the table of all runs, and write it: whether the models part."""
    rows, lines, departures, sentences, notes = verdict(args, runs)
    inputs = " and ".join(args.input)
    layers = " with aligned's layers" if args.aligned else ""
    print(f"{args.jittor}{layers} beside {args.torch}, input {inputs}, seed {args.seed}")
    print("\n".join([*(f"note: {note}" for note in notes), *lines]))
    write_table(rows, args.output / "alignment.csv")
    draw(rows, args.output / "alignment.png")
    print(f"written: {args.output / 'alignment.csv'}, {args.output / 'alignment.png'}")
    if departures:
        print("The frameworks part.", *sentences, sep="\n")
    else:
        print("The frameworks compute the same, apart by rounding.")
    return bool(departures)


def main(args):
    """The command: end with status 1 if the models part."""
    check_output(args.output)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        try:
            runs = run_torch(args, folder)
            sys.exit(int(report(args, {**runs, "jittor": run_jittor(args, folder)})))
        except UserError as error:
            fail(error)
