"""Reads pickled checkpoints as NumPy arrays, without PyTorch, and runs nothing of what they say.

torch.save's zip format, its older one, and plain pickles such as jt.save's. A pickle names the
functions that rebuild its objects, and unpickling calls them. This reader knows those that build
tensors, arrays and containers; any other class in the file, such as the argparse.Namespace that
timm saves or the modules of a whole pickled model, becomes an object that only holds its state.
torch_impl does not use torch.load(weights_only=True) instead, because this file must be the same in
both folders, Jittor's environment has no PyTorch, and weights_only refuses files with such objects.
"""

import io
import os
import pickle
import zipfile
from collections import OrderedDict

import numpy as np

DTYPES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
}
# How torch.save's older format begins: a pickled number.
LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)


class Opaque:
    """Stands for an object of a class that this reader does not know, and holds its state."""

    def __new__(cls, *_, **__):
        return super().__new__(cls)

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass

    extend = append


def to_float32(bits):
    """bfloat16, which NumPy lacks, as 16-bit integers -> float32: the upper half of its bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def from_bytes(data, dtype):
    """A flat array of `dtype`, one of DTYPES' values; bfloat16 becomes float32."""
    if dtype == "bfloat16":
        return to_float32(np.frombuffer(data, "<u2"))
    return np.frombuffer(data, dtype)


def rebuild_tensor(storage, offset, size, stride, *_):
    """torch._utils._rebuild_tensor_v2: a strided view of a flat storage."""
    last = offset + sum((n - 1) * s for n, s in zip(size, stride)) if all(size) else -1
    if offset < 0 or min((*size, *stride), default=0) < 0 or last >= len(storage):
        raise ValueError("a tensor reaches beyond its storage")
    strides = [s * storage.itemsize for s in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides)


def first(value, *_):
    return value


# What may be called while a file is read; for a Var or a parameter, what it wraps.
KNOWN = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): lambda *_: {},
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): first,
    ("torch._utils", "_rebuild_parameter_with_state"): first,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda build, kind, args, state: build(*args),
    ("jittor", "jittor_core.Var"): first,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
}
# NumPy's own, by whatever name the NumPy that wrote the file had for its module.
for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    KNOWN[module, "_reconstruct"] = np.zeros(1).__reduce__()[0]
    KNOWN[module, "scalar"] = np.float32(0).__reduce__()[0]


class Unpickler(pickle.Unpickler):
    """storage_of(dtype, key, size) returns the flat array of a tensor's numbers."""

    def __init__(self, file, storage_of=None):
        super().__init__(file, encoding="latin1")  # for pickles of Python 2
        self.storage_of = storage_of

    def find_class(self, module, name):
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        return KNOWN.get((module, name), Opaque)

    def persistent_load(self, saved):
        if saved[0] == "module":  # in the older format a class and its source
            return saved[1]
        # ("storage", type, key, device, size), in the older format with a view of it, or None
        _, dtype, key, _, size, *view = saved
        storage = self.storage_of(dtype, key, size)
        if view and view[0] is not None:
            _, offset, size = view[0]
            storage = storage[offset : offset + size]
        return storage


def read_zip(path):
    """torch.save's format since 1.6: an archive with the pickle and a file for each storage."""
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("/data.pkl") or n == "data.pkl")
        folder = name[: -len("data.pkl")]

        def storage_of(dtype, key, size):
            return from_bytes(archive.read(f"{folder}data/{key}"), dtype)

        return Unpickler(io.BytesIO(archive.read(name)), storage_of).load()


def read_legacy(path):
    """torch.save's format before 1.6: pickles one after the other, then the storages' bytes."""
    storages, available = {}, os.path.getsize(path)

    def storage_of(dtype, key, size):
        if key not in storages:
            array_dtype = "<f4" if dtype == "bfloat16" else dtype
            if size * np.dtype(array_dtype).itemsize > 2 * available:
                raise ValueError("a storage is larger than the file")
            storages[key] = dtype, np.zeros(size, array_dtype)
        return storages[key][1]

    with open(path, "rb") as f:
        for _ in range(3):  # the magic number, the version, the machine that wrote it
            Unpickler(f).load()
        content = Unpickler(f, storage_of).load()
        for key in Unpickler(f).load():
            dtype, array = storages[key]
            size = int(np.frombuffer(f.read(8), "<i8")[0])
            width = 2 if dtype == "bfloat16" else array.itemsize
            array[:] = from_bytes(f.read(size * width), dtype)  # the tensors are views of it
    return content


def read(path):
    """Read the object in `path`, tensors as arrays. Raises ValueError if it is not such a file."""
    try:
        with open(path, "rb") as f:
            head = f.read(len(LEGACY))
        if head.startswith(b"PK"):
            return read_zip(path)
        if head == LEGACY:
            return read_legacy(path)
        with open(path, "rb") as f:
            return Unpickler(f).load()
    except PermissionError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"not a readable checkpoint ({type(error).__name__})") from None
