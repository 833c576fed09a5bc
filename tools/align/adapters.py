"""What differs between the frameworks where align.py runs a pair of models that it does not know.

Each adds to its adapter of tools/frameworks.py; arrays that go in and come out are NumPy's.
"""

from contextlib import contextmanager

import numpy as np
from tools.frameworks import Jittor, Torch


class JittorPort(Jittor):
    def __init__(self, aligned, device):
        super().__init__(device)
        self.aligned = aligned

    @contextmanager
    def building(self):
        """Around all that builds and runs the model: with aligned's layers in place of Jittor's."""
        if not self.aligned:
            yield
            return
        with self.module("aligned.swap").swapped():
            yield

    def seed(self, seed):
        self.jt.set_global_seed(seed)

    def state(self, model):
        """{key: Var}, in order."""
        return dict(model.state_dict())

    def trained(self, model):
        """The keys that an optimizer of model.parameters() changes."""
        return [key for key, value in self.state(model).items() if not value.is_stop_grad()]

    def set(self, variable, value):
        variable.update(self.array(value.astype(str(variable.dtype)).reshape(variable.shape)))

    def record(self, module, store):
        """Call store(output, inputs) after each call of `module`."""
        run = module.execute

        def execute(*inputs, **options):
            output = run(*inputs, **options)
            store(output, inputs)
            return output

        module.execute = execute

    def kept(self, x):
        """x as it is now: what follows may work in place."""
        return x.detach()

    def called(self, module):
        """The method of its class that a call runs, and whether another one was meant.

        Jittor calls `execute`: a `forward` that a class defines below it is never called.
        """
        for owner in type(module).__mro__:
            if "execute" in vars(owner):
                return f"{owner.__module__}.{owner.__qualname__}.execute", False
            if "forward" in vars(owner):
                break
        owner = next(owner for owner in type(module).__mro__ if "execute" in vars(owner))
        return f"{owner.__module__}.{owner.__qualname__}.execute", True

    def cross_entropy(self, output, labels):
        return self.jt.nn.cross_entropy_loss(output, self.array(labels))

    def adamw(self, parameters, options):
        return self.jt.optim.AdamW(parameters, **options)

    def step(self, optimizer, loss):
        optimizer.step(loss)

    def gradients_of(self, optimizer, variables):
        """Those of the last step, zero where the loss does not reach."""
        return [variable.opt_grad(optimizer).numpy() for variable in variables]

    def option(self, optimizer, name):
        return optimizer.param_groups[0].get(name, getattr(optimizer, name, None))

    def detached(self, x):
        return x.numpy()


class TorchPort(Torch):
    @contextmanager
    def building(self):
        """Around all that builds and runs the model: in float64 for the reference."""
        yield

    def seed(self, seed):
        self.torch.manual_seed(seed)

    def state(self, model):
        """{key: tensor}, in order."""
        return model.state_dict(keep_vars=True)

    def trained(self, model):
        """The keys that an optimizer of model.parameters() changes."""
        return [key for key, value in self.state(model).items() if value.requires_grad]

    def set(self, variable, value):
        variable.data.copy_(self.torch.from_numpy(np.array(value)))

    def record(self, module, store):
        """Call store(output, inputs) after each call of `module`."""
        module.register_forward_hook(lambda _, inputs, output: store(output, inputs))

    def kept(self, x):
        """x as it is now: what follows may work in place."""
        return x.detach().clone()

    def called(self, module):
        return f"{type(module).__module__}.{type(module).__qualname__}.forward", False

    def array(self, x):
        return self.torch.from_numpy(np.array(x)).to(self.device)

    def cross_entropy(self, output, labels):
        return self.torch.nn.functional.cross_entropy(output, self.array(labels))

    def adamw(self, parameters, options):
        return self.torch.optim.AdamW(parameters, **options)

    def step(self, optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def gradients_of(self, optimizer, variables):
        """Those of the last step, zero where the loss does not reach."""
        return [
            np.zeros(tuple(v.shape), self.dtype) if v.grad is None else v.grad.cpu().numpy()
            for v in variables
        ]

    def option(self, optimizer, name):
        return optimizer.param_groups[0].get(name)

    def detached(self, x):
        return x.detach().cpu().numpy()
