"""The framework under test: OVERLOCK_TESTS (jittor or torch), else the one that is installed.

tests/run.py sets OVERLOCK_TESTS. Where it computes is OVERLOCK_DEVICE: cpu, as by default, or cuda.
"""

import os
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest

NAME = os.environ.get("OVERLOCK_TESTS") or ("jittor" if find_spec("jittor") else "torch")
DEVICE = os.environ.get("OVERLOCK_DEVICE", "cpu")
# Tests that need matplotlib, a library beside PyTorch, or both environments: they run once, beside
# PyTorch.
BESIDE_TORCH = ("plot", "prepare", "both", "ports", "packages", "plugins", "onnx")
BESIDE_TORCH += ("oracles", "augment_oracles", "gpu_check", "gpu_bundle")


def cpu_only(reason):
    """A mark: skip the test on a GPU, for this reason."""
    return pytest.mark.skipif(DEVICE == "cuda", reason=reason)


def save_weights(path, arrays, prefix=""):
    """Write {key: array} as a safetensors file, which wants contiguous arrays."""
    checkpoint = module("checkpoint")
    arrays = {f"{prefix}{k}": np.ascontiguousarray(v).reshape(v.shape) for k, v in arrays.items()}
    checkpoint.write_atomic(path, checkpoint.save(arrays))


def place(model):
    """The model on the device under test; Jittor's arrays are where its operators run."""
    return model.to(DEVICE) if NAME == "torch" else model


def module(name):
    """A module of the implementation under test, such as train or aligned.nn."""
    return import_module(f"{NAME}_impl.{name}")
