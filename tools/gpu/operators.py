"""Jittor's own operators that the models use on a GPU, against NumPy in float64.

    python tools/gpu/operators.py [--device cuda]

runs in Jittor's environment; a line of JSON for each, and the exit status is how many are wrong.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.frameworks import Jittor  # noqa: E402

generator = np.random.default_rng(0)


def normal(*shape):
    return generator.standard_normal(shape).astype(np.float32)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def scattered(x, index):
    """The gradient of x[:, index] for ones: how often each was taken."""
    return np.broadcast_to(np.bincount(index.ravel(), minlength=x.shape[1]), x.shape)


def pixels_of(x, weight, stride):
    """A 3x3 convolution with padding 1, tap by tap."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    H, W = (-(-n // stride) for n in x.shape[2:])
    return sum(
        np.einsum(
            "oc,bchw->bohw",
            weight[:, :, p, q],
            padded[:, :, p : p + stride * H : stride, q : q + stride * W : stride],
        )
        for p in range(3)
        for q in range(3)
    )


def cases(jt):
    """name, Jittor's function, NumPy's in float64, inputs."""
    nn, index = jt.nn, generator.integers(0, 50, (9, 9, 25))
    erf = np.vectorize(math.erf)
    yield "matmul", lambda a, b: a @ b, np.matmul, [normal(130, 70), normal(70, 33)]
    batches = [normal(6, 2, 49, 12), normal(6, 2, 12, 30)]
    yield "batched matmul", lambda a, b: a @ b, np.matmul, batches
    for size in (25, 49, 81, 121, 169):
        yield f"softmax {size}", lambda x: nn.softmax(x, dim=-1), softmax, [normal(4, 2, 7, size)]
    for stride in (1, 2):
        inputs = [normal(3, 8, 10, 14), normal(12, 8, 3, 3)]
        yield (
            f"convolution 3x3, stride {stride}",
            lambda x, w, stride=stride: nn.conv2d(x, w, stride=stride, padding=1),
            lambda x, w, stride=stride: pixels_of(x, w, stride),
            inputs,
        )
    yield (
        "convolution 1x1",
        lambda x, w: nn.conv2d(x, w),
        lambda x, w: np.einsum("oc,bchw->bohw", w[:, :, 0, 0], x),
        [normal(3, 8, 7, 9), normal(20, 8, 1, 1)],
    )
    yield "gather", lambda x: x[:, index], lambda x: x[:, index], [normal(2, 50)]
    yield (
        "gradient of gather",
        lambda x: jt.grad(x[:, index].sum(), x),
        lambda x: scattered(x, index),
        [normal(2, 50)],
    )
    yield "sum", lambda x: x.sum((2, 3)), lambda x: x.sum((2, 3)), [normal(4, 5, 60, 70)]
    yield "mean", lambda x: x.mean((2, 3)), lambda x: x.mean((2, 3)), [normal(4, 5, 60, 70)]
    yield "max", lambda x: x.max(1), lambda x: x.max(1), [normal(30, 40)]
    yield "GELU", nn.gelu, lambda x: x / 2 * (1 + erf(x / 2**0.5)), [normal(300)]
    yield "sigmoid", lambda x: x.sigmoid(), lambda x: 1 / (1 + np.exp(-x)), [normal(300)]
    x, order = normal(2, 3, 5, 4, 6, 2), (1, 0, 2, 4, 5, 3)
    yield "transpose", lambda x: x.permute(order), lambda x: x.transpose(order), [x]


def main():
    parser = argparse.ArgumentParser(prog="operators.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    f, wrong = Jittor(parser.parse_args().device), 0
    for name, function, expected, inputs in cases(f.jt):
        line = dict(operator=name)
        try:
            actual = f.numpy(function(*map(f.array, inputs)))
            wanted = expected(*(x.astype(np.float64) for x in inputs))
            error = np.abs(actual - wanted).max() / np.abs(wanted).max()
            line |= dict(ok=bool(error <= 5e-6), error=float(error))  # sums of at most 72 products
        except RuntimeError as error:
            line |= dict(ok=False, error=str(error)[:300])
        wrong += not line["ok"]
        print(json.dumps(line), flush=True)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
