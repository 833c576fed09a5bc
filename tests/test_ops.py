"""na2d_av against the reference values, its definition in float64, NATTEN, and bad shapes."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from under_test import DEVICE

TESTS = Path(__file__).parent
RESULTS = ("out", "grad_attn", "grad_value")


def error(actual, expected):
    return np.abs(actual - expected).max() / np.abs(expected).max()


def definition(attn, value, K):
    """na2d_av forward and backward: loops over pixels and neighbours in the arrays' precision."""
    B, heads, H, W, _ = value.shape

    def neighbours(i, j):
        top, left = min(max(i - K // 2, 0), H - K), min(max(j - K // 2, 0), W - K)
        return [(p * K + q, top + p, left + q) for p in range(K) for q in range(K)]

    def forward():
        out = np.zeros(value.shape)
        for i in range(H):
            for j in range(W):
                for k, y, x in neighbours(i, j):
                    out[:, :, i, j] += attn[:, :, i, j, k, None] * value[:, :, y, x]
        return out

    def backward(grad_out):
        grad_attn, grad_value = np.zeros(attn.shape), np.zeros(value.shape)
        for i in range(H):
            for j in range(W):
                for k, y, x in neighbours(i, j):
                    grad_attn[:, :, i, j, k] = (grad_out[:, :, i, j] * value[:, :, y, x]).sum(-1)
                    grad_value[:, :, y, x] += attn[:, :, i, j, k, None] * grad_out[:, :, i, j]
        return grad_attn, grad_value

    return forward, backward


def run(impl, attn, value, K, grad_out):
    """out, grad_attn, grad_value as arrays."""
    attn, value = impl.array(attn), impl.array(value)
    out = impl.module("ops").na2d_av(attn, value, K)
    return [impl.numpy(out), *impl.gradients(out, grad_out, [attn, value])]


@pytest.mark.parametrize("case", range(6))
def test_reference_values(impl, case):
    z = np.load(TESTS / "reference" / "na2d_av.npz")
    names = ("attn", "value", "kernel_size", "grad_out")
    attn, value, K, grad_out = (z[f"case{case}_{name}"] for name in names)
    results = run(impl, attn, value, int(K), grad_out)
    for actual, name in zip(results, RESULTS):
        assert error(actual, z[f"case{case}_{name}"]) < 2e-6, name


# (B, heads, H, W, dim), K: every block of channels (16, 8, 4, 2, 1), kernels as large as the map,
# K = 1, thin maps, and maps large enough to be cut into tiles of which the last is not full.
SHAPES = [
    ((2, 3, 5, 5, 1), 5),
    ((1, 2, 6, 11, 3), 3),
    ((2, 1, 7, 9, 12), 7),
    ((1, 2, 9, 8, 14), 5),
    ((1, 1, 4, 13, 31), 1),
    ((2, 2, 8, 8, 17), 3),
    ((1, 1, 5, 41, 2), 5),
    ((1, 2, 21, 27, 4), 9),
    ((1, 1, 37, 19, 5), 13),
    # More than 256 pixels, with channels that are whole vectors and that are not
    ((1, 1, 17, 20, 40), 5),
    ((1, 1, 17, 20, 32), 5),
]


@pytest.mark.parametrize("shape, K", SHAPES)
def test_definition_in_float64(impl, shape, K):
    generator = np.random.default_rng(0)
    attn = generator.standard_normal((*shape[:4], K * K)).astype(np.float32)
    value, grad_out = (generator.standard_normal(shape).astype(np.float32) for _ in range(2))
    forward, backward = definition(attn.astype(np.float64), value.astype(np.float64), K)
    expected = [forward(), *backward(grad_out.astype(np.float64))]
    results = run(impl, attn, value, K, grad_out)
    for actual, wanted, name in zip(results, expected, RESULTS):
        assert error(actual, wanted) < 2e-6, name


@pytest.mark.parametrize(
    "attn, value, K, why",
    [
        ((1, 2, 7, 7, 16), (1, 2, 7, 7, 8), 4, "odd"),
        ((1, 2, 7, 7, 9), (1, 2, 7, 7, 8), 5, "kernel_size**2 = 25"),
        ((1, 2, 4, 9, 25), (1, 2, 4, 9, 8), 5, "as large as the kernel"),
        ((1, 2, 9, 4, 25), (1, 2, 9, 4, 8), 5, "as large as the kernel"),
        ((1, 2, 7, 8, 25), (1, 2, 7, 7, 8), 5, "agree"),
        ((1, 3, 7, 7, 25), (1, 2, 7, 7, 8), 5, "agree"),
        ((2, 7, 7, 25), (2, 7, 7, 8), 5, "5 axes"),
        ((1, 2, 7, 7, 1), (1, 2, 7, 7, 8), -1, "odd"),
    ],
)
def test_wrong_shapes_are_named(impl, attn, value, K, why):
    arrays = [impl.array(np.zeros(shape, np.float32)) for shape in (attn, value)]
    with pytest.raises(ValueError) as caught:
        impl.module("ops").na2d_av(*arrays, K)
    message = str(caught.value)
    assert why in message and str(attn) in message and str(value) in message


def test_natten_itself(impl):
    if impl.name != "torch":
        pytest.skip("NATTEN is a PyTorch extension; the torch part compares with it")
    backend = impl.module("kernels.backend")
    if backend.natten_na2d_av is None:
        pytest.skip("NATTEN is not installed")
    if DEVICE == "cuda" and not backend.natten_has_cuda():
        pytest.skip("NATTEN was built without CUDA")
    generator = np.random.default_rng(1)
    for _ in range(12):
        K = int(generator.choice([3, 5, 7, 9, 13]))
        B, heads, H, W, dim = generator.integers([1, 1, K, K, 1], [3, 4, 31, 31, 20])
        attn = generator.standard_normal((B, heads, H, W, K * K)).astype(np.float32)
        shape = (B, heads, H, W, dim)
        value, grad_out = (generator.standard_normal(shape).astype(np.float32) for _ in range(2))
        results = []
        for name in ("natten", "dense"):
            backend.set_na2d_backend(name)
            try:
                results.append(run(impl, attn, value, K, grad_out))
            finally:
                backend.set_na2d_backend("auto")
        for natten, ours, name in zip(*results, RESULTS):
            assert error(ours, natten) < 2e-6, (name, value.shape, K)


CUDA_TYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}


def cuda_calls(impl, dtype, monkeypatch):
    """{(header, code, types of the inputs, types of the outputs)} of jittor_impl's GPU operators.

    Those of their gradients too, on maps of `dtype`; the norms have parameters of `dtype` and of
    float32 in turn.
    """
    functions, nn = impl.module("aligned.functions"), impl.module("aligned.nn")
    types, jt, calls = impl.module("aligned.launch").TYPES, impl.jt, set()

    def record(shapes, dtypes, inputs, cpu_header, cpu_src, cuda_header, cuda_src, data):
        in_types, out_types = tuple(str(v.dtype) for v in inputs), tuple(map(str, dtypes))
        calls.add((cuda_header, cuda_src, in_types, out_types))
        return [jt.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes)]

    monkeypatch.setattr(jt, "code", record)
    monkeypatch.setitem(types, 0, types[1])
    x = jt.zeros((2, 3, 9, 9), dtype)
    attn, value = (jt.zeros((2, 3, 9, 9, size), dtype) for size in (25, 4))
    outputs = [impl.module("ops").na2d_av(attn, value, 5)]
    for bias in (True, False):
        conv = nn.Conv2d(3, 3, 5, padding=2, groups=3, bias=bias)
        outputs.append(functions.convolve(x, conv, own=None, residual=True))
    for of_parameters in {dtype, "float32"}:
        norm = nn.BatchNorm2d(3)
        norm.train()
        norm.weight, norm.bias = (jt.zeros(3, of_parameters) for _ in range(2))
        outputs.append(norm(x))
        outputs.append(functions.LayerNormFunction.apply(x, norm.weight, norm.bias, 1e-6))
        gamma, beta = (jt.zeros((1, 3, 1, 1), of_parameters) for _ in range(2))
        outputs.append(functions.GRNFunction.apply(x, gamma, beta))
    outputs.append(functions.adaptive_avg_pool2d(x, (7, 7)))
    assert all(out.dtype == dtype for out in outputs)
    for out in outputs:
        jt.grad(out.float32().sum(), [x, attn, value])
    norm = nn.BatchNorm2d(3)
    monkeypatch.setattr(functions, "on_gpu", lambda: True)
    functions.merged_depthwise(x, [(conv, norm)] * 8)
    parameters = [jt.ones(3, dtype) for _ in range(33)]
    optimizer = impl.module("aligned.optim").AdamW(parameters, lr=1)
    optimizer.step(sum((p * p).sum() for p in parameters))
    foreach = impl.module("aligned.foreach")
    foreach.clip_grad_norm(parameters, 1)
    foreach.lerp(parameters, parameters, 0.1)
    monkeypatch.undo()
    # na2d_av and its two gradients; depthwise convolution and the gradient of its weight, with bias
    # and without (the gradient of x is a convolution without); three norms and their gradients;
    # pooling, whose gradient is the same call; merged branches; AdamW, the gradients' norm, their
    # scaling and an average, each of 32 parameters and of one.
    assert len(calls) == 3 + 4 + (6 if dtype == "float32" else 12) + 1 + 1 + 2 * 4
    return calls


def test_cuda_kernels_compile(impl, tmp_path, monkeypatch):
    """Every operator, for every type, compiles for A100 and H100 in Jittor's C++14.

    It is what Jittor would compile on a GPU; nvcc has to be installed, but no GPU.
    """
    if impl.name != "jittor":
        pytest.skip("only jittor_impl has kernels of its own")
    nvccs = impl.module("aligned.setup.cuda_toolkit").system_nvccs()
    if not nvccs:
        pytest.skip("no nvcc on this machine")
    calls = sorted(call for dtype in CUDA_TYPES for call in cuda_calls(impl, dtype, monkeypatch))
    headers = ("cuda_bf16.h", "cuda_fp16.h", "map", "string")
    lines = [f"#include <{header}>" for header in headers]
    lines += dict.fromkeys(line for header, *_ in calls for line in header.splitlines())
    lines.append("struct Var { long num; };")  # as far as the code knows Jittor's
    for i, (_, code, inputs, outputs) in enumerate(calls):
        names = [f"in{k}_p" for k in range(len(inputs))]
        names += [f"out{k}_p" for k in range(len(outputs))]
        types = [
            {**CUDA_TYPES, "float64": "double", "int32": "int"}[dtype] for dtype in inputs + outputs
        ]
        types += ["Var"] * len(names)
        names += [name.removesuffix("_p") for name in names]
        arguments = ", ".join(f"{type_}* {name}" for type_, name in zip(types, names))
        head = f"void call{i}({arguments}, std::map<std::string, double>& data)"
        lines.append(f"{head} {{ typedef {types[0]} in0_type; {code} }}")
    source = tmp_path / "kernels.cu"
    source.write_text("\n".join(lines))
    command = [nvccs[0], "-std=c++14", "--use_fast_math", "-c"]
    for capability in (80, 90):
        command += ["-gencode", f"arch=compute_{capability},code=sm_{capability}"]
    command += ["-o", str(tmp_path / "kernels.o"), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_kernel_that_does_not_start_is_named(impl, tmp_path):
    """With a GPU, since no block has so many threads; without, since there is none."""
    if impl.name != "jittor":
        pytest.skip("only jittor_impl has kernels of its own")
    nvccs = impl.module("aligned.setup.cuda_toolkit").system_nvccs()
    if not nvccs:
        pytest.skip("no nvcc on this machine")
    source, program = tmp_path / "launch.cu", tmp_path / "launch"
    source.write_text("""
#include <cstdio>
#include "cuda_launch.h"
template <typename T> __global__ void some_kernel(T* x) { *x = 0; }
int main() {
    try {
        OVERLOCK_LAUNCH(some_kernel<float>, 1, 4096, 0, 0, (float*)nullptr);
    } catch (const std::exception& error) {
        std::puts(error.what());
        return 0;
    }
    return 1;
}
""")
    kernels = impl.module("aligned.launch").KERNELS
    command = [nvccs[0], "-std=c++14", f"-I{kernels}", source, "-o", program]
    subprocess.run(command, check=True, capture_output=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert (
        result.returncode == 0 and "CUDA kernel some_kernel<float> did not start: " in result.stdout
    )


def test_cuda_kernels_on_a_cpu(impl, tmp_path):
    """Thread by thread, in two orders, for all types, CUDA kernels compute what CPU kernels do.

    Their logic is thus tested where there is no GPU too.
    """
    if impl.name != "jittor":
        pytest.skip("only jittor_impl has kernels of its own")
    program = tmp_path / "cuda_on_cpu"
    kernels, source = impl.module("aligned.launch").KERNELS, TESTS / "cuda_on_cpu.cc"
    command = ["g++", "-std=c++14", "-O1", "-march=native", "-fopenmp"]
    command += ["-I", str(kernels), str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    # One thread: the CPU's kernels are too small to gain from more.
    result = subprocess.run([program], capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout


def run_triton(impl, script, *options, **environment):
    """Run a script of this folder in a process of its own, in which Triton is imported anew."""
    if impl.name != "torch":
        pytest.skip("only torch_impl has Triton kernels")
    if not importlib.util.find_spec("triton"):
        pytest.skip("Triton is not installed")
    environment = {**os.environ, **environment}
    command = [sys.executable, TESTS / script, *options]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr


def test_triton_kernels_on_a_cpu(impl):
    """Triton's interpreter runs them: their logic is tested where there is no GPU."""
    run_triton(impl, "triton_run.py")


def test_triton_kernels_on_a_gpu(impl):
    if impl.name == "torch" and not impl.torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")
    run_triton(impl, "triton_run.py", "cuda")


def test_triton_kernels_compile(impl, tmp_path):
    """With or without a GPU, the Triton kernels compile to machine code for A100 and H100."""
    run_triton(impl, "triton_compile.py", TRITON_CACHE_DIR=str(tmp_path))


# (on a GPU, pixels, types of the tensors, whether NATTEN has CUDA (None: it is not installed),
# whether Triton is installed), who computes.
CHOICES = [
    ((True, 196, ["float32"], True, True), "natten"),
    ((True, 3136, ["float32"], True, True), "natten"),
    ((True, 400, ["float32"], False, True), "dense"),
    ((True, 401, ["float32"], False, True), "triton"),
    ((True, 3136, ["float32", "float16"], False, True), "triton"),
    ((True, 3136, ["bfloat16"], False, True), "triton"),
    ((True, 3136, ["float64"], False, True), "dense"),
    ((True, 3136, ["float32"], False, False), "dense"),
    ((False, 3136, ["float32"], True, True), "dense"),
    ((False, 196, ["float32"], True, True), "dense"),
    ((True, 3136, ["float32"], None, True), "triton"),
    ((True, 196, ["float32"], None, True), "dense"),
]


def test_who_computes_na2d_av(impl, monkeypatch):
    if impl.name != "torch":
        pytest.skip("only torch_impl has a choice")
    backend = impl.module("kernels.backend")
    kernels = SimpleNamespace(DTYPES={impl.torch.float32, impl.torch.float16, impl.torch.bfloat16})
    has_cuda = backend.natten_has_cuda.__wrapped__  # which does not remember
    monkeypatch.setattr(backend, "natten_has_cuda", has_cuda)
    for case, chosen in CHOICES:
        on_gpu, pixels, dtypes, natten, triton = case
        package = SimpleNamespace(has_cuda=lambda natten=natten: natten)
        monkeypatch.setattr(backend, "natten", package, raising=False)
        monkeypatch.setattr(backend, "natten_na2d_av", None if natten is None else len)
        found = kernels if triton else None
        monkeypatch.setattr(backend, "triton_kernels", lambda found=found: found)
        dtypes = {getattr(impl.torch, name) for name in dtypes}
        assert backend.choose_na2d_backend(on_gpu, pixels, dtypes) == chosen, case


def test_triton_that_cannot_run(impl, monkeypatch):
    if impl.name != "torch":
        pytest.skip("only torch_impl has Triton kernels")
    monkeypatch.setattr(impl.torch.cuda, "is_available", lambda: False)
    backend = impl.module("kernels.backend")
    compiled = SimpleNamespace(INTERPRETED=False)
    for kernels, why in ((None, "Triton is not installed"), (compiled, "need a GPU")):
        monkeypatch.setattr(backend, "triton_kernels", lambda kernels=kernels: kernels)
        with pytest.raises(ValueError, match=why):
            backend.set_na2d_backend("triton")
