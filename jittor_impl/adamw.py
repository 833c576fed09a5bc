"""AdamW as a few CPU kernels. Jittor's own makes six operators of every parameter, XXT has 524 of them."""
from itertools import groupby

from aligned_nn import on_cpu
from fused import call
from jittor_setup import jt

GROUP = 32  # parameters to a kernel, as many as compile in a second


class AdamW(jt.optim.AdamW):
    """jt.optim.AdamW with the same arguments, moments and numbers; on a GPU it is that itself."""

    def step(self, loss=None, retain_graph=False):
        if not on_cpu():
            return super().step(loss, retain_graph)
        self.pre_step(loss, retain_graph)
        for group in self.param_groups:
            beta1, beta2 = group.get("betas", self.betas)
            lr = group.get("lr", self.lr)
            numbers = {"decay": 1 - lr * group.get("weight_decay", self.weight_decay), "gain1": 1 - beta1, "beta2": beta2, "gain2": 1 - beta2,
                       "step_size": lr / (1 - beta1**self.n_step), "correction": (1 - beta2**self.n_step)**0.5,
                       "eps": group.get("eps", self.eps)}
            states = zip(group["params"], group["grads"], group["m"], group["values"])
            states = [state for state in states if not state[0].is_stop_grad()]
            # A kernel is compiled for the ranks of its arguments, so parameters of one rank go together.
            for _, same in groupby(sorted(states, key=lambda state: len(state[0].shape)), lambda state: len(state[0].shape)):
                same = list(same)
                for i in range(0, len(same), GROUP):
                    self.update(same[i:i + GROUP], numbers)
        self.post_step()

    def update(self, states, numbers):
        """One kernel: states, a list of (parameter, gradient, first moment, second moment), are replaced by the new ones."""
        n = len(states)
        calls = "".join(f"overlock::adamw(in{i}_p, in{n + i}_p, in{2 * n + i}_p, in{3 * n + i}_p, out{i}_p, out{n + i}_p, "
                        f"out{2 * n + i}_p, in{i}->num, a);\n" for i in range(n))
        code = "overlock::AdamW a{" + ", ".join(f'(float)data["{name}"]' for name in numbers) + "};\n" + calls
        params, grads, m, v = ([state[k] for state in states] for k in range(4))
        old = [*params, *m, *v]
        new = call(("adamw_cpu.h",), code, [*params, *grads, *m, *v], [var.shape for var in old], numbers)
        for var, value in zip(old, new):
            var.update(value)
