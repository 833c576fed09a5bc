"""Whether a stopped run can go on with the options and data at hand, and what to give if not."""

import json
import shlex

from .errors import InputError
from .recipe import CROP_OPTIONS, TINY, total_epochs, with_recipe

# A resumed run continues the stopped one only if these are the same.
RUN_ARGUMENTS = (
    *("model", "num_classes", "train_per_class", "val_per_class", "batch_size"),
    *("aux_loss_ratio", "seed", "grad_accumulation", *TINY),
)


def option_words(name, value):
    """How the command line gives an option: ["--lr", "0.1"], ["--no-bias-decay"]."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    return [f"--{option}", *map(str, value if isinstance(value, (list, tuple)) else [value])]


def differing(started, args):
    """{option: its value in a run, of which `started` are all}, of those that `args` change."""
    own = json.loads(json.dumps({name: getattr(args, name) for name in RUN_ARGUMENTS}))
    if started["sched"] == "constant":  # which may go on; a cosine bends at its end
        own.pop("epochs")
    if started["scale"] is None:  # without which these change nothing
        own = {name: value for name, value in own.items() if name not in CROP_OPTIONS}
    return {name: started[name] for name, value in own.items() if value != started[name]}


def how_started(options):
    """What to say of a run of these {option: value}, and what to do; None is without the option."""
    given = [option_words(name, value) for name, value in options.items() if value is not None]
    absent = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is None]
    was, remedies = [], []
    if given:
        was.append(f"with {shlex.join(sum(given, []))}")
        remedies.append("give that too")
    if absent:
        was.append(f"without {' '.join(absent)}")
        remedies.append(f"leave {' '.join(absent) if given else 'it'} out")
    return f"{' and '.join(was)}; {', '.join(remedies)}"


def check_resumable(run, args, path):
    """Raise InputError unless `args` are those of the run that wrote the checkpoint at `path`."""
    if not run:
        raise InputError(f"{path} has weights only; use it with --init")
    # Checkpoints of before there were recipes lack their options.
    before = {"recipe": "tiny", "grad_accumulation": 1, **TINY}
    started = {**json.loads(json.dumps(before)), **run["args"]}
    wrong = differing(started, args)
    if wrong and args.recipe != started["recipe"]:
        name = started["recipe"]
        wrong = {"recipe": name, **differing(started, with_recipe(args, name))}
    if not args.given.issuperset(name for name, value in wrong.items() if value is None):
        wrong["data_dir"] = started["data_dir"]  # TinyImageNet alone is not taken whole by default
    if wrong:
        how = how_started({k: v for k, v in wrong.items() if v is not None or k in args.given})
        raise InputError(f"the run in {path} was started {how}, or start anew with --init")
    if run["epoch"] >= total_epochs(args):
        remedy = "give a larger --epochs to go on"
        if args.sched == "cosine":  # at the end of which the learning rate has come down
            init = f"--init {shlex.quote(str(path))}"
            remedy = f"to train further, start anew from it with {init}, without --resume"
        raise InputError(f"the run in {path} has done its {run['epoch']} epochs; {remedy}")


def check_same_data(before, data, data_dir, path):
    """Raise InputError unless a run on `before`, of its checkpoint at `path`, can go on on `data`.

    Both say classes, image shape and number of training images; older checkpoints lack the last.
    """
    if any(before[key] != data[key] for key in ("classes", "image_shape")):
        other = f"other classes or image sizes than {data_dir} has"
        raise InputError(f"the run in {path} was trained on {other}; give the right --data-dir")
    now = data["train_images"]
    if before.get("train_images", now) != now:
        counts = f"{before['train_images']} images, and {data_dir} now has {now}"
        remedy = "restore them, or start anew with --init"
        raise InputError(f"the run in {path} was trained on {counts}; {remedy}")
