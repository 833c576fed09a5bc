"""Reads the tensors of a .pth file (torch.save's zip format) as NumPy arrays, without PyTorch.

A .pth file is a pickle, and unpickling runs what the file says. This reader builds tensors,
containers and numbers; any other class in the file, such as the argparse.Namespace that timm saves,
becomes an empty object. torch_impl does not use torch.load(weights_only=True) instead, because this
file must be the same in both folders, Jittor's environment has no PyTorch, and weights_only refuses
the files with other objects (such as argparse.Namespace) that timm writes.
"""

import io
import pickle
import zipfile
from collections import OrderedDict

import numpy as np

DTYPES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
}


class Opaque:
    """Stands for an object of a class that this reader does not know."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def rebuild_tensor(storage, offset, size, stride, *_):
    """torch._utils._rebuild_tensor_v2: a strided view of a flat storage, copied."""
    last = offset + sum((n - 1) * s for n, s in zip(size, stride)) if all(size) else -1
    if offset < 0 or min((*size, *stride), default=0) < 0 or last >= len(storage):
        raise ValueError("a tensor reaches beyond its storage")
    strides = [s * storage.itemsize for s in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides).copy()


def read(path):
    """Read the object in `path`, tensors as arrays. Raises ValueError if it is not such a file."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith("/data.pkl") or n == "data.pkl")
            folder = name[: -len("data.pkl")]

            class Unpickler(pickle.Unpickler):
                def find_class(self, module, name):
                    if (module, name) == ("collections", "OrderedDict"):
                        return OrderedDict
                    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                        return rebuild_tensor
                    if (module, name) == ("torch._utils", "_rebuild_parameter"):
                        return lambda data, *_: data
                    if module == "torch" and name in DTYPES:
                        return name
                    return Opaque

                def persistent_load(self, saved):
                    _, storage_type, key, _, _ = saved
                    return np.frombuffer(archive.read(f"{folder}data/{key}"), DTYPES[storage_type])

            return Unpickler(io.BytesIO(archive.read(name))).load()
    except PermissionError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"not a readable zip-format .pth file ({type(error).__name__})") from None
