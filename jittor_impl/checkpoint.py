"""Checkpoints: safetensors files, the same keys in both frameworks: either loads the other's.

Keys: model.<state-dict key>, optimizer.exp_avg.<parameter>, optimizer.exp_avg_sq.<parameter>.
Metadata "run", JSON: epoch (epochs done), step (optimizer steps done), best_top1, args, data
(classes and image shape), history (rows of the log).
"""

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from . import read_pth
from .aligned.start import jt
from .errors import InputError
from .run_files import write_atomic

RUN_KEYS = {"epoch", "step", "best_top1", "args", "data", "history"}
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


def optimizer_arrays(model, optimizer):
    """AdamW's moments, {"exp_avg.<name>" and "exp_avg_sq.<name>": NumPy array}."""
    arrays = {}
    for i, name in enumerate(trainable(model)):
        for moment, jittor_name in (("exp_avg", "m"), ("exp_avg_sq", "values")):
            arrays[f"{moment}.{name}"] = optimizer.param_groups[0][jittor_name][i].numpy()
    return arrays


def save_checkpoint(path, model, optimizer, run):
    """Write model, moments and `run` (a dict that JSON can hold) to `path`."""
    arrays = {f"model.{key}": value for key, value in model_arrays(model).items()}
    moments = optimizer_arrays(model, optimizer)
    arrays |= {f"optimizer.{key}": value for key, value in moments.items()}
    for key, value in arrays.items():
        # safetensors wants contiguous arrays; the reshape keeps a scalar () from becoming (1,).
        arrays[key] = np.ascontiguousarray(value).reshape(value.shape)
    write_atomic(path, save(arrays, metadata={"run": json.dumps(run)}))


def read_checkpoint(path):
    """Read our checkpoint or an official .pth: (arrays of the model, arrays of the optimizer, run).

    Of a .pth file, optimizer and run are empty. Raises InputError if it is missing or is neither.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}; check the path")
    if path.suffix in (".pth", ".pt", ".bin"):
        try:
            content = read_pth.read(path)
        except ValueError as error:
            raise InputError(f"{path}: {error}; it may be truncated, fetch it again") from None
        for key in ("state_dict", "model"):
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
        content = content if isinstance(content, dict) else {}
        arrays = {key: value for key, value in content.items() if isinstance(value, np.ndarray)}
        if not arrays:
            raise InputError(f"{path} holds no state dict; give a checkpoint of OverLoCK")
        return arrays, {}, {}
    try:
        with safe_open(path, framework="numpy") as f:
            keys = f.keys()
            arrays = {key: f.get_tensor(key) for key in keys}
            run = json.loads((f.metadata() or {}).get("run", "{}"))
    except (SafetensorError, ValueError, TypeError, OSError) as error:
        raise InputError(
            f"{path} is not a checkpoint or is truncated ({str(error)[:80]}); give another one"
        ) from None
    complete = isinstance(run, dict) and run.keys() >= RUN_KEYS
    if run and not (complete and len(run["history"]) == run["epoch"]):
        raise InputError(f"{path} was not written by this train.py; use it with --init")
    model, optimizer = {}, {}
    for key, value in arrays.items():
        kind, _, name = key.partition(".")
        if kind not in ("model", "optimizer"):
            what = f"a safetensors file, but not a checkpoint of train.py (key {key})"
            raise InputError(f"{path} is {what}; give another one")
        (model if kind == "model" else optimizer)[name] = value
    return model, optimizer, run


def load_model(model, arrays, path, keep_classifier=False):
    """Load `arrays` into `model`. Raises InputError if a key or a shape differs, and names it.

    With keep_classifier, classifiers of another number of classes stay as they are in `model`.
    Returns the keys of those that stayed.
    """
    own = model_arrays(model)
    kept = []
    for key in CLASSIFIERS:
        if key in own and key in arrays and own[key].shape != arrays[key].shape and keep_classifier:
            arrays = {**arrays, key: own[key]}
            kept.append(key)
    missing, unexpected = own.keys() - arrays.keys(), arrays.keys() - own.keys()
    if missing or unexpected:
        counts = f"{len(missing)} keys are missing, {len(unexpected)} unknown"
        which = f"{counts}, such as {min(missing or unexpected)}"
        raise InputError(
            f"{path} is a checkpoint of another model ({which}); give the right --model"
        )
    for key, value in arrays.items():
        if key in CLASSIFIERS and value.shape != own[key].shape:
            raise InputError(
                f"{path} has {value.shape[0]} classes, this model {own[key].shape[0]}; "
                f"give --num-classes {value.shape[0]}, or --init to keep all but the classifier"
            )
        if value.shape != own[key].shape:
            raise InputError(
                f"{path} is a checkpoint of another model ({key} is {value.shape} there, "
                f"{own[key].shape} here); give the right --model"
            )
    # Arrays, never stopped Vars: a parameter that is assigned one is frozen without a word.
    state = model.state_dict()
    for key, value in arrays.items():
        value = value.astype(own[key].dtype).reshape(state[key].shape)  # a scalar () -> (1,)
        state[key].update(jt.array(value))
    return kept


def load_optimizer(model, optimizer, arrays, step, path):
    """Load AdamW's moments and set its step count."""
    optimizer.n_step = step
    for i, (name, parameter) in enumerate(trainable(model).items()):
        for moment, jittor_name in (("exp_avg", "m"), ("exp_avg_sq", "values")):
            value = arrays.get(f"{moment}.{name}")
            if value is None or value.shape != tuple(parameter.shape):
                lack = f"{path} lacks the optimizer's {moment} of {name}"
                raise InputError(f"{lack}; it cannot be resumed, use --init")
            optimizer.param_groups[0][jittor_name][i].update(jt.array(value))
