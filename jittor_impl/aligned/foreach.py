"""One operation on many Vars: a few CPU kernels, where Jittor makes operators of every Var.

torch._foreach_... and torch.nn.utils.clip_grad_norm_ do the same. On a GPU they are Jittor's own
operators.
"""

from functools import cache
from itertools import groupby

from .launch import on_gpu, run_code
from .start import jt

GROUP = 32  # Vars to a kernel, as many as compile in a second
HEADERS = ("foreach_cpu.h",), ()


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
def each(call, n):
    """C++ of n calls; in `call`, {a}, {b} and {out} are the i-th of the Vars."""
    calls = (
        call.format(a=f"in{i}", b=f"in{n + i}", out=f"out{i}", last=f"in{n}") for i in range(n)
    )
    return "".join(f"{one};\n" for one in calls), ""


def lerp(starts, ends, weight):
    """Update each Var of `starts` to start + weight * (end - start); they get no gradient."""
    with jt.no_grad():
        for group in grouped(zip(starts, ends)):
            old, towards = zip(*group)
            if on_gpu():
                new = [a + weight * (b - a) for a, b in group]
            else:
                code = each('overlock::lerp({a}_p, {b}_p, {out}_p, {a}->num, data["w"])', len(old))
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
        code = each("out0_p[0] += overlock::sum_of_squares({a}_p, {a}->num)", len(group))
        code = "out0_p[0] = 0;\n" + code[0], ""
        squares += run_code(HEADERS, code, group, [((1,), "float64")], {})
    norm = jt.sqrt(sum(squares)).float32()  # (1,)
    factor = jt.minimum(max_norm / (norm + 1e-6), 1.0)
    for group in groups:
        code = each("overlock::scale({a}_p, {out}_p, {a}->num, {last}_p[0])", len(group))
        like = [(x.shape, x.dtype) for x in group]
        for var, value in zip(group, run_code(HEADERS, code, [*group, factor], like, {})):
            var.update(value)
