"""The reference values' weights, a formula of the state-dict key (tests/reference/README.md)."""

import zlib

import numpy as np


def formula(key, shape):
    """The weight of `key`, float32 (int64 for num_batches_tracked)."""
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    r = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
    if key.endswith("running_var"):
        value = 1 + 0.1 * abs(r)
    elif key.endswith("running_mean"):
        value = 0.1 * r
    elif key.endswith(".weight") and (len(shape) == 1 or tuple(shape[1:]) == (1, 1, 1)):
        value = 1 + 0.1 * r
    elif key.endswith(".weight"):
        value = 0.5 * r / np.sqrt(np.prod(shape[1:]))
    else:
        value = 0.1 * r
    return np.asarray(value).astype(np.float32)


def projection(name, shape):
    """The fixed random direction that a parameter's gradient is projected on."""
    return np.random.default_rng(zlib.crc32(("proj" + name).encode())).standard_normal(shape)
