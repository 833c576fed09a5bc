"""The weights in a file, whoever wrote it: with the official keys, and what was left out.

What is in a file decides, never its name: safetensors; torch.save's and jt.save's pickles; a state
dict, plain or under a key as timm, Lightning and OpenMMLab write it, with any prefix before its
keys; the whole network, a backbone, or either with merged branches.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open
from . import read_pth
from .errors import InputError

# Every key of every variant begins with one of these.
PARTS = (
    *("patch_embed1", "patch_embed2", "patch_embed3", "patch_embed4", "high_level_proj"),
    *("patch_embedx", "blocks1", "blocks2", "blocks3", "blocks4", "sub_blocks3", "sub_blocks4"),
    *("head", "aux_head"),
)
# A key that every OverLoCK has; what stands before it in a file stands before all keys.
ANCHOR = "patch_embed2.0.weight"
SAFETENSORS_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "bfloat16",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "<i1",
    "U8": "<u1",
    "BOOL": "?",
}


class Weights(NamedTuple):
    arrays: dict  # {official key: array}
    others: dict  # {key in the file: array}, arrays that are not the network's
    metadata: dict  # what a safetensors file says of itself
    notes: list  # lines for the user: what was taken, what was left out


def read_weights(path, use_ema=False):
    """Read the weights in the file at `path`; its averaged ones (EMA) with use_ema.

    Raises InputError if there are none.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}; check the path")
    arrays, metadata = read_arrays(path)
    places = [key[: -len(ANCHOR)] for key in arrays if key.endswith(ANCHOR)]
    # An optimizer's moments have the parameters' names too.
    places = [place for place in places if re.fullmatch(r"((?!optimizer\.).*\.)?", place)]
    averaged = [place for place in places if is_averaged(place)]
    plain = [place for place in places if place not in averaged]
    if use_ema and not averaged:
        raise InputError(f"{path} has no averaged weights (EMA); leave --use-ema out")
    if not places:
        names = ", ".join(list(arrays)[:3]) or "none"
        what = f"not a checkpoint of train.py and no state dict of OverLoCK (tensors: {names})"
        raise InputError(f"{path} is {what}; give one of OverLoCK's")
    place = (averaged if use_ema or not plain else plain)[0]
    weights, others = {}, {}
    for key, value in arrays.items():
        name = key[len(place) :]
        if key.startswith(place) and name.partition(".")[0] in PARTS:
            weights[name] = value
        else:
            others[key] = value
    notes = []
    if averaged and plain:
        taken = f"{path}: took {place.rstrip('.') or 'the state dict'}"
        if use_ema:
            notes.append(
                f"{taken}, the averaged weights (EMA); without --use-ema, those as trained"
            )
        else:
            notes.append(f"{taken}; --use-ema takes the averaged weights (EMA) instead")
    elif averaged and not use_ema:
        notes.append(f"{path} has averaged weights (EMA) alone; took those")
    foreign = foreign_parts(others, place, [other for other in places if other != place])
    if foreign:
        notes.append(f"{path}: left out what a classifier has not: {', '.join(foreign)}")
    return Weights(weights, others, metadata, notes)


def foreign_parts(others, place, copies):
    """Names of what stands beside the network's own parts, such as h_proj or decode_head.

    `copies` are the places of other copies of the network, which are not foreign.
    """
    # Beside a backbone stand a detector's or segmenter's neck and heads.
    outer = place.removesuffix("backbone.")
    names = set()
    for key in others:
        if key.startswith(outer) and not any(key.startswith(copy) for copy in copies):
            inner = key.removeprefix(place)
            names.add((inner if inner != key else key[len(outer) :]).partition(".")[0])
    return sorted(names - {"optimizer"})


def is_averaged(place):
    return bool(re.search(r"(^|[._])(ema|averaged)([._]|$)", place))


def is_merged(arrays):
    """Whether the dilated branches are merged (`reparam()`; upstream's deploy=True)."""
    return any(key.endswith("lk_origin.bias") for key in arrays)


def read_arrays(path):
    """({key: array} of all tensors in a file, a nested key joined by dots; metadata)."""
    with open(path, "rb") as f:
        head = f.read(1024)
    reason = foreign_format(head)
    if reason:
        raise InputError(f"{path} is {reason}")
    if head[8:9] == b"{":
        return read_safetensors(path)
    try:
        content = read_pth.read(path)
    except ValueError as error:
        raise InputError(f"{path}: {error}; it may be truncated, fetch it again") from None
    return flatten(content), {}


def foreign_format(head):
    """What a file that begins so is, if it is surely no checkpoint, and what to do; else None."""
    text = head.lstrip().lower()
    if not head:
        return "empty; fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer and not the file itself; `git lfs pull` fetches that"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "a web page and not a checkpoint; download the file itself"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")):
        return "a compressed archive; unpack it first"
    if head.startswith(b"\x89HDF"):
        return "an HDF5 file, not a checkpoint of PyTorch or Jittor; give one of those"
    return None


def read_safetensors(path):
    try:
        with safe_open(path, framework="numpy") as f:
            metadata = f.metadata() or {}
        tensors = deserialize(path.read_bytes())
        arrays = {}
        for key, tensor in tensors:
            dtype = SAFETENSORS_DTYPES[tensor["dtype"]]
            # deserialize's numbers are as many as the shape says, and bfloat16 it leaves to us.
            arrays[key] = read_pth.from_bytes(tensor["data"], dtype).reshape(tensor["shape"])
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        what = f"not a checkpoint or is truncated ({str(error)[:80]})"
        raise InputError(f"{path} is {what}; give another one") from None
    return arrays, metadata


def flatten(content, prefix=""):
    """{key: array} of a nested content, keys joined by dots; of a pickled module, its state."""
    if isinstance(content, (np.ndarray, np.generic)):
        return {prefix[:-1]: np.asarray(content)}
    if isinstance(content, read_pth.Opaque):
        content = module_state(content.__dict__)
    if not isinstance(content, dict):
        return {}
    arrays = {}
    for key, value in content.items():
        arrays |= flatten(value, f"{prefix}{key}.")
    return arrays


def module_state(attributes):
    """What PyTorch keeps of a module: its parameters, buffers and modules, by their names."""
    parts = (attributes.get(name) for name in ("_parameters", "_buffers", "_modules"))
    state = {}
    for part in parts:
        state |= part if isinstance(part, dict) else {}
    return state
