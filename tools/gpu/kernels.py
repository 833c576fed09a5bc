"""Our CUDA kernels one by one, without Jittor, against PyTorch in float64.

    python tools/gpu/kernels.py [--device cuda] [--small] [--time] [--output results.jsonl]

Outputs and scratch memory are NaN, or -1, before each call, so that every number must be written;
each kernel runs twice and has to give the same bits. A line of JSON for each case, with the largest
error of its outputs; exits with the number of cases that failed. --time measures instead, in
float32 at the sizes of XT, 224 pixels, batch 128, and says how many times its floor a kernel takes:
its bytes at the copy bandwidth measured here or its multiply-adds at the rate of a matrix product,
whichever is longer. With --device cpu the kernels run through tests/cuda_on_cpu.h.
"""

import argparse
import ctypes
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
TYPES = (torch.float32, torch.float16, torch.bfloat16)
# Relative to the norm: sums in float32, and the rounding of a result to the type of the map.
LIMITS = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

# (B, C, H, W, kernel, dilation)
DEPTHWISE = [
    *((64, 24, 16, 16, 13, 1), (64, 24, 16, 16, 3, 5), (64, 96, 4, 4, 9, 1), (65, 5, 17, 31, 9, 2)),
    *((1, 1, 1, 1, 3, 1), (3, 7, 5, 40, 19, 1), (2, 8, 200, 320, 17, 1)),
    *((128, 56, 56, 56, 17, 1), (128, 224, 56, 56, 3, 1), (128, 256, 14, 14, 13, 1)),
]
# As the dilated branches of a block: (B, C, H, W, (kernel, dilation) of each)
MERGED = [
    (64, 24, 16, 16, (13, 1), (5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    (128, 56, 56, 56, (17, 1), (5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
]
NORMS = [  # (B, C, H, W)
    *((64, 24, 16, 16), (64, 128, 2, 2), (65, 7, 5, 3), (2, 300, 1, 1), (4, 3, 200, 320)),
    *((128, 56, 56, 56), (128, 256, 14, 14), (128, 1344, 7, 7)),
]
WINDOWS = [  # (B * heads, H, W, kernel, dim)
    *((128, 9, 9, 5, 24), (128, 9, 9, 9, 24), (256, 7, 7, 7, 16), (3, 13, 30, 13, 33)),
    *((2, 5, 5, 1, 3), (2, 200, 320, 13, 16), (1024, 14, 14, 13, 16), (1536, 7, 7, 7, 14)),
]
SEPARABLE = [  # (planes, H, W, h, w)
    *((6, 4, 4, 9, 9), (6, 9, 15, 7, 7), (2, 1, 5, 7, 3)),
    *((128 * 256, 14, 14, 7, 7), (128 * 256, 7, 7, 14, 14)),
]
ADAMW = [[1, 7, 1024, 1025, 300000], [3] * 32]
SMALL = dict(
    DEPTHWISE=[(2, 3, 9, 20, 3, 1), (3, 2, 17, 5, 5, 2)],
    MERGED=[(2, 3, 9, 11, (7, 1), (3, 3))],
    NORMS=[(3, 5, 7, 9), (2, 40, 1, 1)],
    WINDOWS=[(2, 9, 10, 5, 3), (1, 13, 13, 13, 4), (2, 8, 17, 3, 5)],
    SEPARABLE=[(3, 4, 6, 9, 7)],
    ADAMW=[[1, 1500, 30]],
)


@dataclass
class Case:
    """A call of a kernel: arguments in order, in which `outputs` and `scratch` are written.

    behind_pointers: the arrays that arguments point to.
    """

    kernel: str
    arguments: list
    outputs: list
    expected: list
    shape: tuple
    scratch: list = field(default_factory=list)
    products: int = 0
    behind_pointers: tuple = ()

    @property
    def dtype(self):
        """That of the maps; a sum alone is float64, of float32."""
        dtype = self.outputs[0].dtype
        return dtype if dtype in TYPES else torch.float32

    def bytes_moved(self):
        """Those of every tensor once, scratch memory excepted."""
        arrays = [a for a in self.arguments if torch.is_tensor(a)]
        tensors = {a.data_ptr(): a for a in (*arrays, *self.behind_pointers)}
        for tensor in self.scratch:
            tensors.pop(tensor.data_ptr(), None)
        return sum(a.numel() * a.element_size() for a in tensors.values())


class Kernels:
    """The library of kernels.cu, compiled for this machine's device."""

    def __init__(self, device):
        self.device = device
        include = [f"-I{ROOT / 'jittor_impl' / 'kernels'}", "-O2", "-shared", "-std=c++17"]
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(__file__).with_suffix(".cu"), Path(folder) / "kernels.so"
            if device == "cuda":
                nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
                major, minor = torch.cuda.get_device_capability()
                # As Jittor compiles them.
                options = [f"-arch=sm_{major}{minor}", "--use_fast_math", "-Xcompiler", "-fPIC"]
                command = [nvcc, *options, *include, source]
            else:
                emulation = ["-include", ROOT / "tests" / "cuda_on_cpu.h", "-DON_A_CPU", "-fPIC"]
                command = ["g++", *emulation, *include, "-x", "c++", source]
            subprocess.run([*command, "-o", target], check=True)
            self.library = ctypes.CDLL(str(target))

    def run(self, case):
        """Call the kernel; raises RuntimeError where it did not start or went wrong."""

        def c(a):
            if torch.is_tensor(a):
                return ctypes.c_void_p(a.data_ptr())
            return ctypes.c_int64(a) if isinstance(a, int) else a

        function = getattr(self.library, case.kernel)
        function.restype = ctypes.c_char_p
        wrong = function(ctypes.c_int64(TYPES.index(case.dtype)), *map(c, case.arguments))
        if wrong:
            raise RuntimeError(wrong.decode())

    def synchronize(self):
        if self.device == "cuda":
            torch.cuda.synchronize()


class Cases:
    """Random inputs of each kernel, and what PyTorch computes from them in float64."""

    def __init__(self, device, dtype, sizes):
        self.device, self.dtype, self.sizes = device, dtype, sizes
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape, dtype=None):
        x = torch.randn(shape, device=self.device, generator=self.generator)
        return x.to(dtype or self.dtype)

    def floats(self, *shape):
        return self.normal(*shape, dtype=torch.float32)

    def empty(self, *shape, dtype=None):
        return torch.empty(shape, device=self.device, dtype=dtype or self.dtype)

    def scratch(self, *shape):
        return self.empty(*shape, dtype=torch.float32)

    def __iter__(self):
        makers = dict(
            DEPTHWISE=self.depthwise,
            MERGED=self.merged,
            NORMS=self.norms,
            WINDOWS=self.windows,
            SEPARABLE=self.separable,
            ADAMW=self.lists,
        )
        for name, make in makers.items():
            for shape in self.sizes[name]:
                yield from make(*shape)

    def depthwise(self, *shape):
        B, C, H, W, K, d = shape
        x, weight, bias = self.normal(B, C, H, W), self.normal(C, 1, K, K), self.normal(C)
        grad_y, y = self.normal(B, C, H, W), self.empty(B, C, H, W)
        leaves = X, Wt, Bs = [a.double().requires_grad_() for a in (x, weight, bias)]
        Y = F.conv2d(X, Wt, Bs, padding=d * (K // 2), dilation=d, groups=C) + X
        grads = torch.autograd.grad(Y, leaves, grad_y.double())
        products = x.numel() * K * K
        arguments = [x, weight, bias, y, *shape, 1]
        yield Case("depthwise", arguments, [y], [Y], shape, products=products)
        outputs = [self.empty(B, C, H, W), self.empty(C, 1, K, K), self.empty(C)]
        chunks = min(B, 16)
        scratch = self.scratch(chunks, C, K * K + 1)
        arguments = [x, weight, grad_y, *outputs, scratch, *shape, 1, chunks]
        name = "depthwise_gradients"
        yield Case(name, arguments, outputs, grads, shape, [scratch], 2 * products)

    def merged(self, B, C, H, W, *branches):
        x, y, largest = self.normal(B, C, H, W), self.empty(B, C, H, W), branches[0][0]
        scratch = [self.empty(C, largest, largest), self.empty(C)]
        arrays, expected = [], 0
        for K, d in branches:
            weight = self.floats(C, 1, K, K)
            norm = gamma, beta, mean, var = [self.floats(C) for _ in range(4)]
            var.square_().add_(1)
            Y = F.conv2d(x.double(), weight.double(), padding=d * (K // 2), dilation=d, groups=C)
            gamma, beta, mean, var = (a.double() for a in norm)
            expected = expected + F.batch_norm(Y, mean, var, gamma, beta, False, 0, 1e-5)
            arrays += [weight, *norm]
        pointers = (ctypes.c_void_p * len(arrays))(*[a.data_ptr() for a in arrays])
        sizes = [(ctypes.c_int64 * len(branches))(*numbers) for numbers in zip(*branches)]
        arguments = [x, pointers, *sizes, len(branches), y, *scratch, B, C, H, W]
        case = Case("merged_depthwise", arguments, [y], [expected], (B, C, H, W, *branches))
        case.scratch, case.behind_pointers = scratch, arrays
        case.products = x.numel() * largest**2
        yield case

    def norms(self, B, C, H, W):
        P, shape = H * W, (B, C, H, W)
        x, grad_y = self.normal(*shape), self.normal(*shape)
        if self.dtype == torch.float32 and B * P > 8:
            x += 20  # a mean far from 0
        weight, bias = self.floats(C), self.floats(C)
        leaves = X, Wt, Bs = [a.double().requires_grad_() for a in (x, weight, bias)]
        chunks = min(max(-(-B * P // 2048), 1), 1024)
        sums = self.scratch(chunks + 1, C, 2)
        y, of_channels = self.empty(*shape), [self.scratch(C) for _ in range(4)]
        grads, numbers = [y, *of_channels[:2]], [B, C, P, chunks]

        def moments(axes, eps):
            mean, var = X.detach().mean(axes), X.detach().var(axes, unbiased=False)
            return mean, (var + eps).rsqrt()

        if B * P > 2:  # of two values the gradient is a difference of equal numbers
            running = [self.floats(C), self.floats(C).abs() + 1]
            statistics = [a.double() for a in running]
            Y = F.batch_norm(X, *statistics, Wt, Bs, True, 0.1, 1e-5)
            expected = torch.autograd.grad(Y, leaves, grad_y.double())
            mean, inv_std = moments((0, 2, 3), 1e-5)
            batches = torch.tensor(7, dtype=torch.int32, device=self.device)
            outputs = [y, *of_channels, torch.empty_like(batches)]
            arguments = [x, weight, bias, *running, batches, *outputs, sums, *numbers]
            wanted = [Y, mean, inv_std, *statistics, batches.double() + 1]
            yield Case("batch_norm", arguments, outputs, wanted, shape, [sums])
            mean, inv_std = mean.float(), inv_std.float()
            arguments = [x, weight, mean, inv_std, grad_y, *grads, sums, *numbers]
            yield Case("batch_norm_backward", arguments, grads, expected, shape, [sums])
        if C > 1:
            channels_last = X.permute(0, 2, 3, 1)  # (B, H, W, C)
            Y = F.layer_norm(channels_last, (C,), Wt, Bs, 1e-6).permute(0, 3, 1, 2)
            expected = torch.autograd.grad(Y, leaves, grad_y.double())
            mean, inv_std = moments(1, 1e-6)  # (B, H, W)
            outputs = [y, self.scratch(B, P), self.scratch(B, P)]
            arguments = [x, weight, bias, *outputs, B, C, P]
            wanted = [Y, mean.reshape(B, P), inv_std.reshape(B, P)]
            yield Case("channel_norm", arguments, outputs, wanted, shape)
            mean, inv_std = mean.float().contiguous(), inv_std.float().contiguous()
            arguments = [x, weight, mean, inv_std, grad_y, *grads, sums, *numbers]
            yield Case("channel_norm_backward", arguments, grads, expected, shape, [sums])
        norms = X.square().sum((2, 3), keepdim=True).sqrt()
        gain = Wt.reshape(1, C, 1, 1) * norms / (norms.mean(1, keepdim=True) + 1e-6) + 1
        Y = gain * X + Bs.reshape(1, C, 1, 1)
        expected = torch.autograd.grad(Y, leaves, grad_y.double())
        norms, images = norms.detach().reshape(B, C), self.scratch(B, 2)
        outputs, dots = [y, self.scratch(B, C)], self.scratch(B, C, 2)
        arguments = [x, weight, bias, *outputs, images, B, C, P]
        yield Case("grn", arguments, outputs, [Y, norms], shape, [images])
        arguments = [x, weight, norms.float(), grad_y, *grads, dots, images, B, C, P]
        yield Case("grn_backward", arguments, grads, expected, shape, [dots, images])

    def windows(self, *shape):
        N, H, W, K, dim = shape
        attn = self.floats(N, H, W, K * K).softmax(-1).to(self.dtype)
        value, grad = self.normal(N, H, W, dim), self.normal(N, H, W, dim)
        A, V = (a.double().requires_grad_() for a in (attn, value))

        def first(size):
            index = torch.arange(size, device=self.device) - K // 2
            return index.clamp(0, size - K)

        rows, cols, out = first(H), first(W), 0
        for p in range(K):
            for q in range(K):
                neighbours = V[:, rows + p][:, :, cols + q]  # (N, H, W, dim)
                out = out + A[..., p * K + q, None] * neighbours
        grad_attn, grad_value = torch.autograd.grad(out, (A, V), grad.double())
        maps, weights = self.empty(N, H, W, dim), self.empty(N, H, W, K * K)
        for name, inputs, output, expected in (
            ("forward", (attn, value), maps, out),
            ("grad_attn", (grad, value), weights, grad_attn),
            ("grad_value", (attn, grad), maps, grad_value),
        ):
            arguments = [*inputs, output, *shape]
            products = value.numel() * K * K
            name = f"na2d_av_{name}"
            yield Case(name, arguments, [output], [expected.detach()], shape, products=products)

    def separable(self, *shape):
        planes, H, W, h, w = shape
        x, grad = self.normal(planes, H, W), self.normal(planes, h, w)
        rows, cols = self.floats(h, H).relu(), self.floats(w, W).relu()  # which have zeros
        R, Cs, y, grad_x = rows.double(), cols.double(), self.empty(planes, h, w), x.clone()
        Y, grad_X = R @ x.double() @ Cs.T, R.T @ grad.double() @ Cs
        yield Case("separable", [x, rows, cols, y, *shape, 0], [y], [Y], shape)
        numbers = [planes, h, w, H, W, 1]
        yield Case("separable", [grad, rows, cols, grad_x, *numbers], [grad_x], [grad_X], shape)

    def lists(self, *sizes):
        """AdamW, and the kernels of foreach_cuda.h, on lists of float32 arrays."""
        if self.dtype == torch.float32:
            yield from self.adamw(*sizes)
            yield from self.foreach(*sizes)

    def foreach(self, *sizes):
        a, b = ([self.floats(n) for n in sizes] for _ in range(2))
        out, factor, sums = [torch.empty_like(x) for x in a], self.floats(1), self.scratch(256)
        total = self.empty(1, dtype=torch.float64)
        A, B = ([x.double() for x in arrays] for arrays in (a, b))
        arrays = [x for items in zip(a, b, out) for x in items]
        pointers = (ctypes.c_void_p * len(arrays))(*[x.data_ptr() for x in arrays])
        given = [pointers, (ctypes.c_int64 * len(sizes))(*sizes), len(sizes)]
        expected = [x + 0.3 * (y - x) for x, y in zip(A, B)]
        yield Case("lerp", [*given, 30], out, expected, sizes, behind_pointers=arrays)
        expected, read = [factor.double() * x for x in A], [*a, *out]
        yield Case("scale", [*given, factor], out, expected, sizes, behind_pointers=read)
        expected, arguments = [sum((x * x).sum() for x in A).reshape(1)], [*given, total, sums, 256]
        yield Case("sum_of_squares", arguments, [total], expected, sizes, [sums], behind_pointers=a)

    def adamw(self, *sizes):
        beta1, beta2, lr, eps, decay, step = 0.9, 0.999, 1e-3, 1e-8, 0.01, 3
        values = [[self.floats(n) for _ in range(3)] for n in sizes]
        values = [[p, g, m, p.square()] for p, g, m in values]
        outputs = [[torch.empty_like(v[0]) for _ in range(3)] for v in values]
        correction = (1 - beta2**step) ** 0.5
        step_size = lr / (1 - beta1**step)
        numbers = [1 - lr * decay, 1 - beta1, beta2, 1 - beta2, step_size, correction, eps]
        expected = []
        for p, g, m, v in ([a.double() for a in arrays] for arrays in values):
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            p = p * (1 - lr * decay) - step_size * m / (v.sqrt() / correction + eps)
            expected += [p, m, v]
        arrays = [a for old, new in zip(values, outputs) for a in (*old, *new)]
        pointers = (ctypes.c_void_p * len(arrays))(*[a.data_ptr() for a in arrays])
        counts = (ctypes.c_int64 * len(sizes))(*sizes)
        arguments = [pointers, counts, len(sizes), (ctypes.c_float * 7)(*numbers)]
        outputs = [a for new in outputs for a in new]
        yield Case("adamw", arguments, outputs, expected, sizes, behind_pointers=arrays)


def run_poisoned(kernels, case):
    for tensor in (*case.outputs, *case.scratch):
        tensor.fill_(math.nan if tensor.is_floating_point() else -1)
    kernels.run(case)
    kernels.synchronize()
    return [tensor.clone() for tensor in case.outputs]


def check(kernels, case):
    """What is found of a case: its errors, and whether two calls gave the same bits."""
    try:
        first, second = run_poisoned(kernels, case), run_poisoned(kernels, case)
    except RuntimeError as error:
        return dict(ok=False, error=str(error)[:300])
    same = all(map(torch.equal, first, second))
    pairs = list(zip(first, case.expected))
    errors = [((a.double() - e).norm() / e.norm().clamp(min=1e-30)).item() for a, e in pairs]
    # Not `max`, which passes over NaN.
    ok = same and all(e <= LIMITS[case.dtype] for e in errors)
    return dict(ok=ok, error=max(errors, key=lambda e: math.inf if math.isnan(e) else e), same=same)


def milliseconds(kernels, function, repeats=20):
    """The median of a call's times."""
    times = []
    for i in range(repeats + 3):  # three to warm up
        kernels.synchronize()
        start = time.perf_counter()
        function()
        kernels.synchronize()
        times += [1e3 * (time.perf_counter() - start)] if i >= 3 else []
    return statistics.median(times)


def rates(kernels, small):
    """Bytes/ms of a copy and multiply-adds/ms of a product in float32."""
    size, side = (2**20, 256) if small else (2**28, 8192)
    source, target = torch.randn(2, size, device=kernels.device)
    a, b = torch.randn(2, side, side, device=kernels.device)
    copy = 8 * size / milliseconds(kernels, lambda: target.copy_(source))
    return copy, side**3 / milliseconds(kernels, lambda: a @ b)


def main():
    parser = argparse.ArgumentParser(prog="kernels.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes, for sanitizers and CPUs")
    parser.add_argument("--time", action="store_true", help="measure instead of checking")
    parser.add_argument("--output", type=Path, help="append the lines to this file too")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    sizes = SMALL if args.small else {name: globals()[name] for name in SMALL}
    if args.time and not args.small:
        sizes = {name: [s for s in shapes if s[0] >= 128] for name, shapes in sizes.items()}
        sizes["ADAMW"] = [[300000] * 32]
    kernels = Kernels(args.device)
    dtypes = TYPES[:1] if args.time or args.device == "cpu" else TYPES
    copy, product = rates(kernels, args.small) if args.time else (None, None)
    failed = 0
    for dtype in dtypes:
        for case in Cases(args.device, dtype, sizes):
            line = dict(kernel=case.kernel, dtype=str(dtype)[6:], shape=case.shape)
            if args.time:
                run, repeats = (lambda case=case: kernels.run(case)), 2 if args.small else 20
                ms = milliseconds(kernels, run, repeats)
                floor = max(case.bytes_moved() / copy, case.products / product)
                line |= dict(ms=ms, floor_ms=floor, ratio=ms / floor if floor else None)
            else:
                line |= check(kernels, case)
                failed += not line["ok"]
            print(json.dumps(line), flush=True)
            if args.output:
                with open(args.output, "a") as file:
                    file.write(json.dumps(line) + "\n")
    sys.exit(min(failed, 125))


if __name__ == "__main__":
    main()
