"""AdamW as a few CPU kernels.

Jittor's own makes six operators of every parameter, and XXT has 524 parameters.
"""

from functools import cache
from itertools import groupby

from .launch import has_kernel, run_code
from .start import jt

GROUP = 32  # parameters to a kernel, as many as compile in a second
# struct AdamWNumbers of adamw_cpu.h
NUMBERS = ("decay", "gain1", "beta2", "gain2", "step_size", "correction", "eps")


@cache
def kernel_code(n):
    """The kernel for n parameters.

    Inputs are n parameters, n gradients, n first and n second moments; outputs all but gradients.
    """
    numbers = ", ".join(f'(float)data["{name}"]' for name in NUMBERS)
    calls = "".join(
        f"overlock::adamw(in{i}_p, in{n + i}_p, in{2 * n + i}_p, in{3 * n + i}_p, "
        f"out{i}_p, out{n + i}_p, out{2 * n + i}_p, in{i}->num, a);\n"
        for i in range(n)
    )
    return f"overlock::AdamWNumbers a{{{numbers}}};\n{calls}"


def count_axes(state):
    return len(state[0].shape)


class AdamW(jt.optim.AdamW):
    """torch.optim.AdamW: its arguments and defaults, with which Jittor's would not decay.

    On a GPU the step is that of jt.optim.AdamW.
    """

    headers = ("adamw_cpu.h",), ()

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        super().__init__(list(params), lr, eps, betas, weight_decay)

    def step(self, loss=None, retain_graph=False):
        if not has_kernel(AdamW):
            return super().step(loss, retain_graph)
        self.pre_step(loss, retain_graph)
        for group in self.param_groups:
            beta1, beta2 = group.get("betas", self.betas)
            lr = group.get("lr", self.lr)
            values = (
                1 - lr * group.get("weight_decay", self.weight_decay),
                1 - beta1,
                beta2,
                1 - beta2,
                lr / (1 - beta1**self.n_step),
                (1 - beta2**self.n_step) ** 0.5,
                group.get("eps", self.eps),
            )
            numbers = dict(zip(NUMBERS, values))
            states = zip(group["params"], group["grads"], group["m"], group["values"])
            states = [state for state in states if not state[0].is_stop_grad()]
            # A kernel is compiled for given numbers of axes: parameters with as many go together.
            for _, same in groupby(sorted(states, key=count_axes), count_axes):
                same = list(same)
                for i in range(0, len(same), GROUP):
                    self.update(same[i : i + GROUP], numbers)
        self.post_step()

    def update(self, states, numbers):
        """Replace the parameters and moments in `states` by the new ones, with one kernel.

        states: a list of (parameter, gradient, first moment, second moment).
        """
        params, grads, m, v = ([state[k] for state in states] for k in range(4))
        old = [*params, *m, *v]
        code = kernel_code(len(states)), ""
        inputs, outputs = [*params, *grads, *m, *v], [(x.shape, x.dtype) for x in old]
        new = run_code(self.headers, code, inputs, outputs, numbers)
        for var, value in zip(old, new):
            var.update(value)
