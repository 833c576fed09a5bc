"""AdamW as a few CPU kernels.

Jittor's own makes six operators of every parameter, XXT has 524 of them.
"""

from functools import cache
from itertools import groupby

from .launch import has_kernel, run_code
from .start import jt

GROUP = 32  # parameters to a kernel, as many as compile in a second
NUMBERS = (
    "decay",
    "gain1",
    "beta2",
    "gain2",
    "step_size",
    "correction",
    "eps",
)  # struct AdamWNumbers of adamw_cpu.h


@cache
def kernel_code(n):
    """The kernel for n parameters; inputs are n parameters, gradients, first and second moments,
    outputs all but gradients.
    """
    calls = "".join(
        f"overlock::adamw(in{i}_p, in{n + i}_p, in{2 * n + i}_p, in{3 * n + i}_p, out{i}_p, out{n + i}_p, "
        f"out{2 * n + i}_p, in{i}->num, a);\n"
        for i in range(n)
    )
    return (
        "overlock::AdamWNumbers a{"
        + ", ".join(f'(float)data["{name}"]' for name in NUMBERS)
        + "};\n"
        + calls
    )


def count_axes(state):
    return len(state[0].shape)


class AdamW(jt.optim.AdamW):
    """jt.optim.AdamW with the same arguments, moments and numbers; on a GPU it is that itself."""

    headers = ("adamw_cpu.h",), ()

    def step(self, loss=None, retain_graph=False):
        if not has_kernel(AdamW):
            return super().step(loss, retain_graph)
        self.pre_step(loss, retain_graph)
        for group in self.param_groups:
            beta1, beta2 = group.get("betas", self.betas)
            lr = group.get("lr", self.lr)
            numbers = dict(
                zip(
                    NUMBERS,
                    (
                        1 - lr * group.get("weight_decay", self.weight_decay),
                        1 - beta1,
                        beta2,
                        1 - beta2,
                        lr / (1 - beta1**self.n_step),
                        (1 - beta2**self.n_step) ** 0.5,
                        group.get("eps", self.eps),
                    ),
                )
            )
            states = zip(group["params"], group["grads"], group["m"], group["values"])
            states = [state for state in states if not state[0].is_stop_grad()]
            # A kernel is compiled for its arguments' numbers of axes, so parameters with as many go
            # together.
            for _, same in groupby(sorted(states, key=count_axes), count_axes):
                same = list(same)
                for i in range(0, len(same), GROUP):
                    self.update(same[i : i + GROUP], numbers)
        self.post_step()

    def update(self, states, numbers):
        """One kernel: states, a list of (parameter, gradient, first moment, second moment), are
        replaced by the new ones.
        """
        params, grads, m, v = ([state[k] for state in states] for k in range(4))
        old = [*params, *m, *v]
        code = kernel_code(len(states)), ""
        new = run_code(
            self.headers,
            code,
            [*params, *grads, *m, *v],
            [(x.shape, x.dtype) for x in old],
            numbers,
        )
        for var, value in zip(old, new):
            var.update(value)
