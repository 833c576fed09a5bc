"""The framework under test: OVERLOCK_TESTS (jittor or torch), else the one that is installed.

tests/run.py sets OVERLOCK_TESTS.
"""

import os
from importlib import import_module
from importlib.util import find_spec

import numpy as np

NAME = os.environ.get("OVERLOCK_TESTS") or ("jittor" if find_spec("jittor") else "torch")


def save_weights(path, arrays, prefix=""):
    """Write {key: array} as a safetensors file, which wants contiguous arrays."""
    checkpoint = module("checkpoint")
    arrays = {f"{prefix}{k}": np.ascontiguousarray(v).reshape(v.shape) for k, v in arrays.items()}
    checkpoint.write_atomic(path, checkpoint.save(arrays))


def module(name):
    """A module of the implementation under test, such as train or aligned.nn."""
    return import_module(f"{NAME}_impl.{name}")
