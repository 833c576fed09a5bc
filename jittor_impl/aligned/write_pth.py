"""torch.save for a state dict, without PyTorch: what torch.load reads, weights_only too."""

import pickle
import zipfile

import numpy as np

# The classes that torch.load looks up for the numbers of a tensor.
STORAGES = {"float32": "FloatStorage", "int64": "LongStorage"}


def save(state, file):
    """Write {key: array}, float32 or int64, to the open file: torch.save's zip format.

    An archive of a pickle, which says what the tensors are, and of each tensor's numbers.
    """
    content = [pickle.PROTO, b"\2", pickle.EMPTY_DICT, pickle.MARK]
    for i, (key, array) in enumerate(state.items()):
        content += [text(key), tensor(str(i), array)]
    content += [pickle.SETITEMS, pickle.STOP]
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"".join(content))
        archive.writestr("archive/byteorder", "little")
        for i, array in enumerate(state.values()):
            archive.writestr(f"archive/data/{i}", np.ascontiguousarray(array).tobytes())
        archive.writestr("archive/version", "3\n")


def tensor(key, array):
    """Opcodes: _rebuild_tensor_v2(storage, 0, shape, strides, requires_grad, backward_hooks)."""
    strides = [stride // array.itemsize for stride in np.empty_like(array, order="C").strides]
    kind = call_name("torch", STORAGES[array.dtype.name])
    storage = group(text("storage"), kind, text(key), text("cpu"), number(array.size))
    shapes = [group(*map(number, numbers)) for numbers in (array.shape, strides)]
    hooks = call_name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = group(storage + pickle.BINPERSID, number(0), *shapes, pickle.NEWFALSE, hooks)
    return call_name("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


def call_name(module, name):
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def group(*items):
    """Opcodes of a tuple of what `items` are the opcodes of."""
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def text(value):
    data = value.encode()
    return pickle.BINUNICODE + len(data).to_bytes(4, "little") + data


def number(value):
    return pickle.BININT + int(value).to_bytes(4, "little", signed=True)
