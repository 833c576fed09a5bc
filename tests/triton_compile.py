"""Compile na2d_av's Triton kernels to machine code for T4, A100, RTX 40 and H100.

`python tests/triton_compile.py` needs no GPU.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import triton
from triton.compiler import ASTSource
from torch_impl.kernels import na2d_av_triton

KERNELS = [
    na2d_av_triton.forward_kernel,
    na2d_av_triton.grad_attn_kernel,
    na2d_av_triton.grad_value_kernel,
]
# {constant: value}. Triton makes a constant of an argument that is 1.
SIZES = {"K": 13, "dim": 14, "PIXELS": 64, "WEIGHTS": 64, "DIM": 16}
ONES = {
    **dict.fromkeys(("K", "dim", "PIXELS", "DIM", "H", "W", "tiles", "reach"), 1),
    "WEIGHTS": 1024,
}
# (compute capability, constants, types of the tensors: attn's first).
CASES = [
    (80, SIZES, "fp32", "fp32"),
    (80, SIZES, "fp16", "fp16"),
    (80, SIZES, "bf16", "bf16"),
    (80, SIZES, "fp32", "fp16"),
    (80, ONES, "fp32", "fp32"),
    (80, {**SIZES, "tiles": 1}, "fp32", "fp32"),
    (90, SIZES, "fp32", "fp32"),
    (90, SIZES, "fp32", "bf16"),
    (75, SIZES, "fp32", "fp16"),
    (89, SIZES, "fp32", "fp32"),
]


def machine_code(kernel, capability, types, constants):
    """{stage: text or bytes}; types: {argument: its type}, constants: {argument: value}."""
    if triton.__version__ >= "3":
        from triton.backends.compiler import GPUTarget

        types = {**types, **dict.fromkeys(constants, "constexpr")}
        types = {name: types[name] for name in kernel.arg_names}
        source = ASTSource(kernel, types, constants)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm
    # Triton 2's compile ends by linking a launcher with libcuda, the GPU's driver:
    # run its stages without it.
    from triton.compiler.backends.cuda import CUDABackend

    position = kernel.arg_names.index
    source = ASTSource(
        kernel,
        {position(name): t for name, t in types.items()},
        {position(name): value for name, value in constants.items()},
    )
    backend = CUDABackend(("cuda", capability))
    options = backend.parse_options({})
    stages, results = {}, {}
    backend.add_stages(stages, options)
    metadata = {"target": ("cuda", capability), **options.__dict__, **source.metadata()}
    code = source.make_ir(options)
    for name, stage in stages.items():
        code = results[name] = stage(code, metadata)
    return results


for capability, sizes, attn_type, value_type in CASES:
    for kernel in KERNELS:
        names = kernel.arg_names
        constants = {name: sizes[name] for name in names if name in sizes}
        pointers = {name: f"*{attn_type if 'attn' in name else value_type}" for name in names[:3]}
        types = {name: pointers.get(name, "i32") for name in names if name not in constants}
        code = machine_code(kernel, capability, types, constants)
        assert f".target sm_{capability}" in code["ptx"] and code["cubin"][:4] == b"\x7fELF"
        print(
            f"{kernel.__name__} sm_{capability} attn {attn_type} value {value_type} {constants}: "
            f"{len(code['cubin'])} bytes"
        )
