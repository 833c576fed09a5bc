"""Runs the kernels of kernels/: which device has one, which types it takes, and the C++ call of it.

The kernels are C++ and CUDA files. Jittor compiles them at the first call and after a change.
"""

from functools import cache
from pathlib import Path

from .setup.compilation import in_cache
from .start import jt

FOLDER = Path(__file__).resolve().parent
# Beside this folder; within it in a copy of this folder alone (README.md).
KERNELS = next(path for path in (FOLDER / "kernels", FOLDER.parent / "kernels") if path.is_dir())
KERNELS = in_cache(KERNELS.glob("*.h"), jt.compiler.cache_path)
# The maps that kernels read and write, by jt.flags.use_cuda; sums and statistics are float32 for
# each.
TYPES = {0: ("float32",), 1: ("float32", "float16", "bfloat16")}


def on_gpu():
    """Whether operators run on a GPU from now on. The only place that asks."""
    return bool(jt.flags.use_cuda)


def has_kernel(function, *maps):
    """Whether `function`, a class with `headers`, has a kernel for the device and `maps`' types."""
    return bool(function.headers[on_gpu()]) and all(x.dtype in TYPES[on_gpu()] for x in maps)


def check_types(name, *inputs):
    """Raise ValueError, with the types, unless they are all the same."""
    if any(x.dtype != inputs[0].dtype for x in inputs):
        raise ValueError(
            f"{name} must be of one type, got {', '.join(str(x.dtype) for x in inputs)}"
        )


def check_channels(name, x, *counts):
    """Raise ValueError, with the shape, unless each of `counts` is the C of x (B, C, H, W)."""
    for count in counts:
        if x.shape[1] != count:
            raise ValueError(f"{name} of {count} channels got {x.shape[1]}, shape {tuple(x.shape)}")


def cast(x, dtype):
    """x as `dtype`; x itself if it is.

    A gradient may come as float32 to an output that is not, where the two types met.
    """
    return x if x.dtype == dtype else x.cast(dtype)


def launch(
    kernel, headers, inputs, outputs, numbers, scratch=(), gpu_numbers=None, as_struct=False
):
    """Run the C++ function overlock::`kernel`.

    The CPU's is called with (inputs, outputs, numbers), the GPU's with
    (inputs, outputs, scratch, numbers, gpu_numbers, stream).

    Args:
        kernel: its name.
        headers: the files of kernels/ that it needs, a pair for CPU and GPU; () for no kernel.
        inputs: Vars; None is a null pointer.
        outputs: a Var for each new one of its shape and type, or a pair (shape, type); None is
            a null pointer.
        numbers: {name: int or float}, in the order of the kernel's parameters.
        scratch: shapes of float32 memory that the kernel for the GPU works in.
        gpu_numbers: further numbers, which the kernel for the GPU alone takes.
        as_struct: whether `numbers` are one struct.
    Returns:
        The outputs that are not None.
    Raises:
        ValueError: on inputs of a type that the kernels do not take; the message names the types.
    """
    gpu_numbers = gpu_numbers or {}
    given = [x for x in inputs if x is not None]
    made = [
        (out.shape, out.dtype) if isinstance(out, jt.Var) else out
        for out in outputs
        if out is not None
    ]
    code = call_text(
        kernel,
        tuple(x is not None for x in inputs),
        tuple(out is not None for out in outputs),
        len(scratch),
        kinds(numbers),
        kinds(gpu_numbers),
        as_struct,
    )
    results = run_code(
        headers,
        code,
        given,
        made + [(shape, "float32") for shape in scratch],
        {**numbers, **gpu_numbers},
    )
    return results[: len(made)]


def kinds(numbers):
    """A pair: the names, and the types in their order."""
    return tuple(numbers), tuple(map(type, numbers.values()))


@cache
def call_text(kernel, inputs, outputs, scratch, numbers, gpu_numbers, as_struct):
    """The C++ calls for CPU and GPU.

    inputs and outputs say which are given; numbers and gpu_numbers are of `kinds`.
    """

    def pointers(given, prefix):
        place = iter(range(len(given)))
        # Of a type, for the kernels for the GPU are templates.
        return [
            f"{prefix}{next(place)}_p" if is_given else "(in0_type*)nullptr" for is_given in given
        ]

    def values(numbers):
        # Jittor holds every number as a double.
        return [
            f'data["{name}"]' if kind is float else f'(int)data["{name}"]'
            for name, kind in zip(*numbers)
        ]

    arguments, first = pointers(inputs, "in") + pointers(outputs, "out"), sum(outputs)
    memory = [f"out{first + i}_p" for i in range(scratch)]
    own = [f"{{{', '.join(values(numbers))}}}"] if as_struct else values(numbers)
    cpu = ", ".join(arguments + own)
    gpu = ", ".join(arguments + memory + own + values(gpu_numbers) + ["0"])
    return f"overlock::{kernel}({cpu});", f"overlock::{kernel}({gpu});"


def run_code(headers, code, inputs, outputs, numbers):
    """Run C++ `code`, a pair for CPU and GPU like `headers`: `launch` for more than one call.

    In the code, inputs are in0_p, in1_p, ..., outputs, pairs (shape, type), out0_p, ..., and a
    number is data["NAME"]. Numbers are data and not text: another shape needs no new compilation.
    """
    types = TYPES[on_gpu()]
    # The first is a map. Beside it a single integer is a count.
    unfit = [x for x in inputs if x.dtype not in types and (x.dtype, x.numel()) != ("int32", 1)]
    if unfit or inputs[0].dtype not in types:
        got = ", ".join(str(x.dtype) for x in inputs)
        raise ValueError(f"the kernels are for {', '.join(types)}, got {got}; use x.float32()")
    shapes, dtypes = [shape for shape, _ in outputs], [dtype for _, dtype in outputs]
    cpu, gpu = (code[i] if headers[i] else "" for i in (0, 1))
    return jt.code(
        shapes,
        dtypes,
        inputs,
        cpu_header=includes(headers[0]),
        cpu_src=cpu,
        cuda_header=includes(headers[1]),
        cuda_src=gpu,
        data=numbers,
    )


@cache
def includes(names):
    """Jittor follows no relative #include, so a header's own come before it in `names`."""
    return "\n".join(f'#include "{KERNELS / name}"' for name in names)
