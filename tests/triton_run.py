"""na2d_av's Triton kernels against its definition.

`python tests/triton_run.py` interprets them, `python tests/triton_run.py cuda` runs them on a GPU.
Prints a line for each case, exits with 1 if an error is above its limit.
"""

import os
import sys
from functools import lru_cache
from pathlib import Path

device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
if device == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from test_ops import SHAPES, definition, error  # noqa: E402
from triton.runtime import interpreter  # noqa: E402
from torch_impl import ops  # noqa: E402
from torch_impl.kernels import backend  # noqa: E402

OLD = triton.__version__ < "3"
if OLD:
    # The interpreter of Triton 2 cannot make an int32,
    # and patches Triton anew at every call of a function.
    interpreter.Builder.get_int32_ty = lambda self: triton.language.int32
    interpreted = interpreter.InterpretedFunction
    interpreted._patch_lang = lru_cache(interpreted._patch_lang)

# As SHAPES, but small, for the interpreter takes milliseconds for a neighbour: thin maps, K = 1,
# H = W = K, every block of channels, rows of several programs of which the last is not full, and
# columns that see more queries than K.
SMALL = [
    ((1, 1, 5, 5, 1), 5),
    ((1, 2, 6, 11, 3), 3),
    ((1, 1, 7, 9, 12), 7),
    ((1, 1, 9, 8, 14), 5),
    ((2, 1, 4, 13, 31), 1),
    ((1, 1, 3, 7, 17), 3),
    ((1, 1, 3, 41, 40), 3),
    ((1, 1, 1, 1, 1), 1),
]
NAMES = ("out", "grad_attn", "grad_value")
failed = False


def leaf(array, dtype, axes):
    """A tensor with gradient; its axes lie in memory in the order `axes`, as contmix's views do."""
    tensor = torch.from_numpy(array).to(device, dtype).permute(axes).contiguous()
    return tensor.permute(*np.argsort(axes).tolist()).detach().requires_grad_()


def draw(shape, K):
    generator = np.random.default_rng(0)
    shapes = ((*shape[:4], K * K), shape, shape)
    return [generator.standard_normal(s).astype(np.float32) for s in shapes]


def run(name, attn, value, K, grad_out):
    backend.set_na2d_backend(name)
    out = ops.na2d_av(attn, value, K)
    return [out.detach(), *torch.autograd.grad(out, [attn, value], grad_out.to(out.dtype))]


def check(title, results, expected, limits):
    global failed
    results = [result.double().cpu().numpy() for result in results]
    errors = [error(actual, wanted) for actual, wanted in zip(results, expected)]
    wrong = [name for name, e, limit in zip(NAMES, errors, limits) if not e <= limit]
    failed = failed or bool(wrong)
    verdict = "WRONG: " + ", ".join(wrong) if wrong else ""
    print(title, *(f"{name} {e:.1e}" for name, e in zip(NAMES, errors)), verdict)


def in_float64(tensors, K):
    attn, value, grad_out = (x.detach().double().cpu().numpy() for x in tensors)
    forward, backward = definition(attn, value, K)
    return [forward(), *backward(grad_out)]


def rounding(dtype):
    """What the rounding of a result to `dtype` may add to the error of a float32 one."""
    if dtype == torch.float32:
        return 0
    # To the nearest: half of eps. The interpreter cuts bfloat16 off: all of it.
    return torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 and device == "cpu" else 2)


for shape, K in SMALL if device == "cpu" else SMALL + SHAPES:
    attn, value, grad_out = draw(shape, K)
    attn = leaf(attn, torch.float32, (0, 1, 2, 3, 4))
    value = leaf(value, torch.float32, (1, 0, 4, 2, 3))
    grad_out = torch.from_numpy(grad_out).to(device)
    results = run("triton", attn, value, K, grad_out)
    check(f"{shape}, {K}:", results, in_float64((attn, value, grad_out), K), [2e-6] * 3)
    dense = [x.double().cpu().numpy() for x in run("dense", attn, value, K, grad_out)]
    check(f"{shape}, {K}, dense:", results, dense, [2e-6] * 3)
    if device == "cuda":
        again = run("triton", attn, value, K, grad_out)
        check(f"{shape}, {K}, again:", again, [x.double().cpu().numpy() for x in results], [0] * 3)

# (type of attn, of value, of autocast or None).
# Under autocast the softmax before na2d_av leaves float32.
half, bfloat = (torch.float16,) * 2, (torch.bfloat16,) * 2
TYPES = [
    (*half, None),
    (torch.float32, torch.float16, torch.float16),
    (torch.float32, torch.float32, torch.float16),
    (*bfloat, None),
    (torch.float32, torch.float32, torch.bfloat16),
]
for attn_type, value_type, autocast in TYPES:
    if OLD and device == "cpu" and torch.bfloat16 in (attn_type, autocast):
        print("Triton 2 interprets no bfloat16: left out")
        continue
    shape, K = (1, 2, 6, 8, 12), 3
    attn, value, grad_out = draw(shape, K)
    attn = leaf(attn, attn_type, (0, 1, 2, 3, 4))
    value = leaf(value, value_type, (1, 0, 4, 2, 3))
    out_type = autocast or value_type
    grad_out = torch.from_numpy(grad_out).to(device, out_type)
    with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
        results = run("triton", attn, value, K, grad_out)
        dense = run("dense", attn, value, K, grad_out)
    types = [x.dtype for x in results]
    assert types == [x.dtype for x in dense] == [out_type, attn_type, value_type], types
    limits = [2e-6 + rounding(dtype) for dtype in types]
    check(f"{types}:", results, in_float64((attn, value, grad_out), K), limits)

attn, value, _ = draw(shape, K)
attn, value = torch.from_numpy(attn).to(device), torch.from_numpy(value).to(device)
backend.set_na2d_backend("triton")
for attn_type, value_type, kind in (
    (torch.float32, torch.float16, RuntimeError),
    (torch.float64, torch.float64, ValueError),
):
    try:
        ops.na2d_av(attn.to(attn_type), value.to(value_type), K)
    except kind as raised:
        print(f"refused, as it should be: {raised}")
    else:
        raise SystemExit(f"no {kind.__name__} for {attn_type} and {value_type}")
sys.exit(failed)
