"""One operation on many Vars: a few kernels, where Jittor makes operators of every Var.

torch._foreach_... and torch.nn.utils.clip_grad_norm_ do the same.
"""

from functools import cache
from itertools import groupby

from .launch import run_code
from .start import jt

GROUP = 32  # Vars to a kernel, as many as compile in a second
SUMS = 256  # parts of a sum that a GPU computes side by side
HEADERS = (
    ("foreach_cpu.h",),
    ("foreach_cpu.h", "cuda_launch.h", "cuda_sum.h", "foreach_cuda.h"),
)


def axes_and_type(vars):
    return len(vars[0].shape), str(vars[0].dtype)


def grouped(tuples):
    """Lists of `tuples` for one kernel each; the Vars of a tuple have one shape.

    A kernel is compiled for given numbers of axes and types, so those with the same go together.
    """
    for _, same in groupby(sorted(tuples, key=axes_and_type), axes_and_type):
        same = list(same)
        yield from (same[i : i + GROUP] for i in range(0, len(same), GROUP))


@cache
def each(kernel, n, of, arguments, gpu_arguments=""):
    """The C++ call of overlock::`kernel` for n Vars, for CPU and GPU.

    of: what it reads and writes of Var i, two inputs and an output; j is n + i.
    """
    arrays = ",\n".join(f"{{{of.format(i=i, j=n + i)}, in{i}->num}}" for i in range(n))
    given = f"overlock::Arrays<in0_type> arrays[] = {{{arrays}}};\n"
    call = f"{given}overlock::{kernel}(arrays, {n}, {arguments}"
    return f"{call});", f"{call}{gpu_arguments}, 0);"


def lerp(starts, ends, weight):
    """Update each Var of `starts` to start + weight * (end - start); they get no gradient."""
    with jt.no_grad():
        for group in grouped(zip(starts, ends)):
            old, towards = zip(*group)
            code = each("lerp", len(old), "in{i}_p, in{j}_p, out{i}_p", '(float)data["w"]')
            like = [(x.shape, x.dtype) for x in old]
            new = run_code(HEADERS, code, [*old, *towards], like, {"w": weight})
            for var, value in zip(old, new):
                var.update(value)


def clip_grad_norm(grads, max_norm):
    """Scale the Vars of `grads` together so that their norm is at most `max_norm`.

    By torch.nn.utils.clip_grad_norm_'s formula: by max_norm / (norm + 1e-6), if that is below 1.
    """
    groups = [[var for (var,) in group] for group in grouped(zip(grads))]
    squares = []
    for group in groups:
        arguments = "out0_p", ", out1_p, out1->num"
        code = each("sum_of_squares", len(group), "in{i}_p, nullptr, nullptr", *arguments)
        made = [((1,), "float64"), ((SUMS,), "float32")]
        squares.append(run_code(HEADERS, code, group, made, {})[0])
    norm = jt.sqrt(sum(squares)).float32()  # (1,)
    factor = jt.minimum(max_norm / (norm + 1e-6), 1.0)
    for group in groups:
        n = len(group)
        code = each("scale", n, "in{i}_p, nullptr, out{i}_p", f"in{n}_p")
        like = [(x.shape, x.dtype) for x in group]
        for var, value in zip(group, run_code(HEADERS, code, [*group, factor], like, {})):
            var.update(value)
