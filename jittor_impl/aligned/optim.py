"""AdamW as a few CPU kernels. Jittor's own makes six operators of every parameter, XXT has 524 of them."""
from functools import lru_cache
from itertools import groupby

from aligned_nn import on_cpu
from fused import call
from jittor_setup import jt

GROUP = 32  # parameters to a kernel, as many as compile in a second
NUMBERS = ("decay", "gain1", "beta2", "gain2", "step_size", "correction", "eps")  # struct AdamW of adamw_cpu.h


@lru_cache(maxsize=None)
def kernel_code(n):
    """The kernel for n parameters; inputs are n parameters, gradients, first and second moments, outputs all but gradients."""
    calls = "".join(f"overlock::adamw(in{i}_p, in{n + i}_p, in{2 * n + i}_p, in{3 * n + i}_p, out{i}_p, out{n + i}_p, "
                    f"out{2 * n + i}_p, in{i}->num, a);\n" for i in range(n))
    return "overlock::AdamW a{" + ", ".join(f'(float)data["{name}"]' for name in NUMBERS) + "};\n" + calls


def rank(state):
    return len(state[0].shape)


class AdamW(jt.optim.AdamW):
    """jt.optim.AdamW with the same arguments, moments and numbers; on a GPU it is that itself."""

    def step(self, loss=None, retain_graph=False):
        if not on_cpu():
            return super().step(loss, retain_graph)
        self.pre_step(loss, retain_graph)
        for group in self.param_groups:
            beta1, beta2 = group.get("betas", self.betas)
            lr = group.get("lr", self.lr)
            numbers = dict(zip(NUMBERS, (
                1 - lr * group.get("weight_decay", self.weight_decay), 1 - beta1, beta2, 1 - beta2,
                lr / (1 - beta1**self.n_step), (1 - beta2**self.n_step)**0.5, group.get("eps", self.eps))))
            states = zip(group["params"], group["grads"], group["m"], group["values"])
            states = [state for state in states if not state[0].is_stop_grad()]
            # A kernel is compiled for the ranks of its arguments, so parameters of one rank go together.
            for _, same in groupby(sorted(states, key=rank), rank):
                same = list(same)
                for i in range(0, len(same), GROUP):
                    self.update(same[i:i + GROUP], numbers)
        self.post_step()

    def update(self, states, numbers):
        """One kernel: states, a list of (parameter, gradient, first moment, second moment), are replaced by the new ones."""
        params, grads, m, v = ([state[k] for state in states] for k in range(4))
        old = [*params, *m, *v]
        new = call(("adamw_cpu.h",), kernel_code(len(states)), [*params, *grads, *m, *v], [var.shape for var in old], numbers)
        for var, value in zip(old, new):
            var.update(value)
