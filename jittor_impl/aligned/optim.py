"""AdamW as a few kernels.

Jittor's own makes six operators of every parameter, and XXT has 524 parameters.
"""

from functools import cache

from . import foreach
from .foreach import grouped
from .launch import run_code
from .start import jt

# struct AdamWNumbers of adamw_cpu.h
NUMBERS = ("decay", "gain1", "beta2", "gain2", "step_size", "correction", "eps")


@cache
def kernel_code(n):
    """The kernel for n parameters, for CPU and GPU.

    Inputs are n parameters, n gradients, n first and n second moments; outputs all but gradients.
    """
    numbers = ", ".join(f'(float)data["{name}"]' for name in NUMBERS)
    arrays = [
        f"in{i}_p, in{n + i}_p, in{2 * n + i}_p, in{3 * n + i}_p, "
        f"out{i}_p, out{n + i}_p, out{2 * n + i}_p, in{i}->num"
        for i in range(n)
    ]
    given = f"overlock::AdamWNumbers a{{{numbers}}};\n"
    cpu = "".join(f"overlock::adamw({names}, a);\n" for names in arrays)
    parameters = ",\n".join(f"{{{names}}}" for names in arrays)
    gpu = (
        f"overlock::AdamWParameter<in0_type> parameters[] = {{{parameters}}};\n"
        f"overlock::adamw(parameters, {n}, a, 0);"
    )
    return given + cpu, given + gpu


class AdamW(jt.optim.AdamW):
    """torch.optim.AdamW: its arguments and defaults, with which Jittor's would not decay."""

    headers = ("adamw_cpu.h",), ("adamw_cpu.h", *foreach.HEADERS[1], "adamw_cuda.h")

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        super().__init__(list(params), lr, eps, betas, weight_decay)

    def backward(self, loss, retain_graph=False):
        """Add the gradients of `loss` to those since the last step."""
        steps = self.n_step
        super().backward(loss, retain_graph)
        # Jittor counts backward passes here, which with accumulated gradients are more than steps.
        self.n_step = steps

    def clip_grad_norm(self, max_norm, norm_type=2):
        if norm_type != 2:
            return super().clip_grad_norm(max_norm, norm_type)
        states = [zip(group["params"], group["grads"]) for group in self.param_groups]
        foreach.clip_grad_norm([g for s in states for p, g in s if not p.is_stop_grad()], max_norm)

    def step(self, loss=None, retain_graph=False):
        self.pre_step(loss, retain_graph)
        self.n_step += 1
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
            for same in grouped(states):
                self.update(same, numbers)
        self.post_step()

    def update(self, states, numbers):
        """Replace the parameters and moments in `states` by the new ones, with one kernel.

        states: a list of (parameter, gradient, first moment, second moment).
        """
        params, grads, m, v = ([state[k] for state in states] for k in range(4))
        old = [*params, *m, *v]
        inputs, outputs = [*params, *grads, *m, *v], [(x.shape, x.dtype) for x in old]
        new = run_code(self.headers, kernel_code(len(states)), inputs, outputs, numbers)
        for var, value in zip(old, new):
            var.update(value)
