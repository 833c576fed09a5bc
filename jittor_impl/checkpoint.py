"""Checkpoints: safetensors files, the same keys in both frameworks: either loads the other's.

Keys: model.<state-dict key>, optimizer.exp_avg.<parameter>, optimizer.exp_avg_sq.<parameter>, and,
where weights are averaged, ema.<state-dict key>.
Metadata "run", JSON: epoch (epochs done), step (optimizer steps done), best_top1, args, data
(classes, image shape, number of training images), history (rows of the log).
"""

import json
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save
from .aligned.start import jt
from .errors import InputError
from .models import VARIANTS, OverLoCK
from .run_files import write_atomic
from .weights import is_merged, read_weights

RUN_KEYS = {"epoch", "step", "best_top1", "args", "data", "history"}
HEADS = ("head", "aux_head")
CLASSIFIERS = ("head.4.weight", "head.4.bias", "aux_head.2.weight", "aux_head.2.bias")


def trainable(model):
    """{name: parameter} of what the optimizer trains."""
    # To Jittor every Var of a module is a parameter, BatchNorm's statistics too.
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    return {name: value for name, value in model.state_dict().items() if not name.endswith(buffers)}


def model_arrays(model):
    """{state-dict key: NumPy array}."""
    arrays = {key: value.numpy() for key, value in model.state_dict().items()}
    for key in arrays:
        # A 64-bit scalar in PyTorch; Jittor has neither by default.
        if key.endswith("num_batches_tracked"):
            arrays[key] = arrays[key].astype(np.int64).reshape(())  # (1,) -> ()
    return arrays


def moments_of(optimizer):
    """AdamW's moments, {"exp_avg.<name>" and "exp_avg_sq.<name>": Var}."""
    moments = {}
    for group in optimizer.param_groups:
        for moment, jittor_name in (("exp_avg", "m"), ("exp_avg_sq", "values")):
            for name, value in zip(group["names"], group[jittor_name]):
                moments[f"{moment}.{name}"] = value
    return moments


def optimizer_arrays(optimizer):
    """AdamW's moments, {"exp_avg.<name>" and "exp_avg_sq.<name>": NumPy array}."""
    return {key: value.numpy() for key, value in moments_of(optimizer).items()}


def save_checkpoint(path, model, optimizer, ema, run):
    """Write model, moments, averaged weights, if any, and `run` (for JSON) to `path`."""
    arrays = {f"model.{key}": value for key, value in model_arrays(model).items()}
    moments = optimizer_arrays(optimizer)
    arrays |= {f"optimizer.{key}": value for key, value in moments.items()}
    if ema:
        arrays |= {f"ema.{key}": value for key, value in model_arrays(ema.module).items()}
    for key, value in arrays.items():
        # safetensors wants contiguous arrays; the reshape keeps a scalar () from becoming (1,).
        arrays[key] = np.ascontiguousarray(value).reshape(value.shape)
    write_atomic(path, save(arrays, metadata={"run": json.dumps(run)}))


class Checkpoint(NamedTuple):
    arrays: dict  # of the model, by state-dict key
    moments: dict  # of AdamW
    run: dict
    notes: list  # lines for the user: what was taken, what was left out


def read_checkpoint(path, use_ema=False):
    """Read our checkpoint, or weights that somebody else wrote, of which moments and run are empty.

    Raises InputError if it is missing or is neither.
    """
    weights = read_weights(path, use_ema)
    try:
        run = json.loads(weights.metadata.get("run", "{}"))
    except ValueError:
        run = None
    complete = isinstance(run, dict) and run.keys() >= RUN_KEYS
    if run != {} and not (complete and len(run["history"]) == run["epoch"]):
        raise InputError(f"{path} was not written by this train.py; use it with --init")
    moments = {}
    for key, value in weights.others.items():
        if key.startswith("optimizer."):
            moments[key.removeprefix("optimizer.")] = value
    return Checkpoint(weights.arrays, moments, run, weights.notes)


def variant_of(arrays):
    """The variant that has the widths and depths of `arrays`, None if none has."""
    convolutions = [arrays.get(f"patch_embed{i}.0.weight", np.zeros(0)) for i in (2, 4)]
    # (out_dim, in_dim, 3, 3) of each
    embed_dim = tuple(width for conv in convolutions for width in conv.shape[1::-1])

    def depths(*parts):
        keys = [key.split(".") for key in arrays]
        return tuple(len({key[1] for key in keys if key[0] == part}) for part in parts)

    depth = depths("blocks1", "blocks2", "blocks3", "blocks4")
    found = embed_dim, depth, depths("sub_blocks3", "sub_blocks4")
    for name, variant in VARIANTS.items():
        if found == (variant["embed_dim"], variant["depth"], variant["sub_depth"]):
            return name
    return None


def no_classifier(path):
    what = "a backbone without a classifier: there is nothing to evaluate"
    return f"{path} is {what}; train one from it with --init"


def fill(arrays, own, path, keep_classifier):
    """Take from `own`, of the model, what `arrays` may lack. Returns all, and classifiers taken.

    Jittor and older versions of PyTorch do not count batches; a backbone has no classifiers; with
    keep_classifier they may have another number of classes. Evaluation needs the main one alone.
    """
    filled, kept = dict(arrays), []
    present = {key.partition(".")[0] for key in arrays}
    for key, value in own.items():
        head = key.partition(".")[0]
        lacks_head = head in HEADS and head not in present
        if lacks_head and head == "head" and not keep_classifier:
            raise InputError(no_classifier(path))
        other_size = key in CLASSIFIERS and key in arrays and arrays[key].shape != value.shape
        if lacks_head or other_size and keep_classifier:
            filled[key] = value
            kept.append(key)
        elif key.endswith("num_batches_tracked"):
            filled.setdefault(key, value)
    kept.sort(key=lambda key: key.startswith("aux_"))  # the main one first
    return filled, kept


def load_model(model, arrays, path, keep_classifier=False, remedy=None):
    """Load `arrays` into `model`. Raises InputError if a key or a shape differs, and names it.

    With keep_classifier, classifiers that have another number of classes, or that are not there,
    stay as they are in `model`. Returns the keys of those that stayed. `remedy` is what the error
    says to do, if not to give another --model.
    """
    own = model_arrays(model)
    arrays, kept = fill(arrays, own, path, keep_classifier)
    remedy = remedy or right_model(arrays)
    missing, unexpected = own.keys() - arrays.keys(), arrays.keys() - own.keys()
    if missing or unexpected:
        counts = f"{len(missing)} keys are missing, {len(unexpected)} unknown"
        which = f"{counts}, such as {min(missing or unexpected)}"
        raise InputError(f"{path} is a checkpoint of another model ({which}); {remedy}")
    for key, value in arrays.items():
        if key in CLASSIFIERS and value.shape != own[key].shape:
            raise InputError(
                f"{path} has {value.shape[0]} classes, this model {own[key].shape[0]}; "
                f"give --num-classes {value.shape[0]}, or --init to keep all but the classifier"
            )
        if value.shape != own[key].shape:
            shapes = f"{key} is {value.shape} there, {own[key].shape} here"
            raise InputError(f"{path} is a checkpoint of another model ({shapes}); {remedy}")
    # Arrays, never stopped Vars: a parameter that is assigned one is frozen without a word.
    state = model.state_dict()
    for key, value in arrays.items():
        value = value.astype(own[key].dtype).reshape(state[key].shape)  # a scalar () -> (1,)
        state[key].update(jt.array(value))
    return kept


def load_whole_model(arrays, path, needs_classifier=True):
    """The model that `arrays` are of, its variant, classes and branches found in them, loaded.

    Returns it, and the keys of what they lack, such as the auxiliary classifier. Raises InputError
    if it is none of the variants, or a backbone and needs_classifier.
    """
    variant, classifier = variant_of(arrays), arrays.get("head.4.bias")
    if variant is None:
        raise InputError(f"{path} is of none of the variants: {', '.join(VARIANTS)}")
    has_classifier = classifier is not None and classifier.ndim == 1
    if needs_classifier and not has_classifier:
        raise InputError(no_classifier(path))
    stem = arrays.get("patch_embed1.0.weight", np.zeros((1, 3)))
    if stem.ndim > 1 and stem.shape[1] != 3:
        raise InputError(f"{path} takes images of {stem.shape[1]} channels; give one for RGB")
    num_classes = len(classifier) if has_classifier else 0
    model = OverLoCK(**VARIANTS[variant], num_classes=num_classes, deploy=is_merged(arrays))
    remedy = "the file is damaged; give another one"
    kept = load_model(model, arrays, path, keep_classifier=not has_classifier, remedy=remedy)
    return model, kept


def right_model(arrays):
    """What to do about `arrays` that do not fit the model."""
    variant = variant_of(arrays)
    return f"give --model {variant}" if variant else "it is none of the variants that --model takes"


def load_optimizer(optimizer, arrays, step, path):
    """Load AdamW's moments and set its step count."""
    optimizer.n_step = step
    for key, moment in moments_of(optimizer).items():
        value = arrays.get(key)
        if value is None or value.shape != tuple(moment.shape):
            lack = f"{path} lacks the optimizer's {key}"
            raise InputError(f"{lack}; it cannot be resumed, use --init")
        moment.update(jt.array(value))
