"""Checkpoints: safetensors files, the same keys in both frameworks: either loads the other's.

Keys: model.<state-dict key>, optimizer.exp_avg.<parameter>, optimizer.exp_avg_sq.<parameter>.
Metadata "run", JSON: epoch (epochs done), step (optimizer steps done), best_top1, args, data
(classes and image shape), history (rows of the log).
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from . import read_pth
from .errors import InputError
from .run_files import write_atomic

RUN_KEYS = {"epoch", "step", "best_top1", "args", "data", "history"}
CLASSIFIERS = ("head.4.weight", "head.4.bias", "aux_head.2.weight", "aux_head.2.bias")


def trainable(model):
    """{name: parameter} of what the optimizer trains."""
    return dict(model.named_parameters())


def model_arrays(model):
    """{state-dict key: NumPy array}."""
    return {key: value.detach().cpu().numpy().copy() for key, value in model.state_dict().items()}


def optimizer_arrays(model, optimizer):
    """AdamW's moments, {"exp_avg.<name>" and "exp_avg_sq.<name>": NumPy array}."""
    arrays = {}
    for name, parameter in trainable(model).items():
        for moment in ("exp_avg", "exp_avg_sq"):
            arrays[f"{moment}.{name}"] = optimizer.state[parameter][moment].cpu().numpy()
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
    arrays = {key: value.astype(own[key].dtype) for key, value in arrays.items()}
    model.load_state_dict({key: torch.from_numpy(value) for key, value in arrays.items()})
    return kept


def load_optimizer(model, optimizer, arrays, step, path):
    """Load AdamW's moments and set its step count."""
    for name, parameter in trainable(model).items():
        state = {"step": torch.tensor(float(step))}
        for moment in ("exp_avg", "exp_avg_sq"):
            value = arrays.get(f"{moment}.{name}")
            if value is None or value.shape != tuple(parameter.shape):
                lack = f"{path} lacks the optimizer's {moment} of {name}"
                raise InputError(f"{lack}; it cannot be resumed, use --init")
            # In the parameter's own memory layout: a resumed step then runs the same arithmetic.
            state[moment] = torch.empty_like(parameter, requires_grad=False)
            state[moment].copy_(torch.from_numpy(value))
        optimizer.state[parameter] = state
