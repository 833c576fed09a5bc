"""What differs between Jittor and PyTorch, for align.py, bench.py and the tests.

An adapter of the framework that runs in this process. Arrays that go in and come out are NumPy's;
`module("train")` is train.py of its implementation.
"""

import ctypes
import sys
from importlib import import_module
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


class Adapter:
    """What does not differ. `options` are further ones of train.py, such as ("--na2d", "dense")."""

    def __init__(self, device, options):
        """Raises SystemExit with one line where the framework cannot use the device."""
        self.device, self.options = device, options
        try:
            self.module("program").choose_device(self.train_args())
        except self.module("errors").InputError as error:
            sys.exit(str(error))

    def module(self, name):
        return import_module(f"{self.name}_impl.{name}")

    def train_args(self, *options):
        """train.py's arguments for these options, on the adapter's device."""
        words = ["--device", self.device, *self.options, *options]
        recipe = self.module("recipe").choose_recipe(words)
        return self.module("train").make_parser(recipe).parse_args(words)


class Jittor(Adapter):
    name, suffix, dtype = "jittor", "", np.float32

    def __init__(self, device="cpu", options=()):
        super().__init__(device, options)
        self.jt = self.module("aligned.start").jt

    def place(self, module):
        """The module on the device: here, all are where the operators run."""
        return module

    def prepare(self, model):
        """The model that is run."""
        return model

    def synchronize(self):
        """Wait for the device."""
        self.jt.sync_all(device_sync=self.device == "cuda")

    def array(self, x):
        return self.jt.array(x.astype(np.int32) if x.dtype == np.int64 else x)

    def feature_map(self, x):
        """(B, C, H, W), laid out in memory as the maps inside the network are."""
        return self.array(x)

    def numpy(self, x):
        return x.numpy()

    def is_array(self, x):
        return isinstance(x, self.jt.Var)

    def no_grad(self):
        return self.jt.no_grad()

    def gradients(self, output, grad_output, inputs):
        """Those of sum(output * grad_output) by `inputs`."""
        grads = self.jt.grad((output * self.array(grad_output)).sum(), inputs)
        return [grad.numpy() for grad in grads]

    def step_gradients(self, optimizer, parameters):
        """Those that the optimizer's last step used."""
        return [parameter.opt_grad(optimizer).numpy() for parameter in parameters]

    def record(self, module, store):
        """Call store(output) after each call of `module`, which inference may leave out by fusing.

        Not by a hook, which would prevent fusing.
        """
        run = module.execute

        def execute(*inputs):
            output = run(*inputs)
            store(output)
            return output

        module.execute = execute

    def run_forward_backward(self, function, inputs):
        """function(*inputs), and the gradient of its sum with respect to every input."""
        output = function(*inputs)
        grads = self.jt.grad(output, list(inputs))
        self.jt.sync([output, *grads])

    def run_inference(self, model, images):
        with self.jt.no_grad():
            model(self.jt.array(images)).numpy()

    def fold_batch_norms(self, model):
        """Nothing: inference does it by itself, at every call."""

    def threads(self):
        return ctypes.CDLL("libgomp.so.1").omp_get_max_threads()


class Torch(Adapter):
    name, suffix = "torch", "_torch"

    def __init__(self, device="cpu", options=(), dtype=np.float32, compiles=False):
        super().__init__(device, options)
        import torch

        self.torch, self.dtype, self.compiles = torch, dtype, compiles

    def prepare(self, model):
        """The model that is run: compiled, if this adapter compiles."""
        return self.torch.compile(model) if self.compiles else model

    def place(self, module):
        """The module on the device."""
        return module.to(self.device)

    def synchronize(self):
        """Wait for the device."""
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def array(self, x):
        x = self.torch.from_numpy(np.array(x)).to(self.device)
        return x.requires_grad_() if x.is_floating_point() else x

    def feature_map(self, x):
        """(B, C, H, W), laid out in memory as the maps inside the network are."""
        layout = self.module("kernels.device").memory_format(self.device)
        return self.array(x).contiguous(memory_format=layout)

    def numpy(self, x):
        return x.detach().cpu().numpy()

    def is_array(self, x):
        return self.torch.is_tensor(x)

    def no_grad(self):
        return self.torch.no_grad()

    def gradients(self, output, grad_output, inputs):
        """Those of sum(output * grad_output) by `inputs`."""
        grads = self.torch.autograd.grad(output, inputs, self.array(grad_output))
        return [grad.cpu().numpy() for grad in grads]

    def step_gradients(self, optimizer, parameters):
        """Those that the optimizer's last step used."""
        return [parameter.grad.cpu().numpy() for parameter in parameters]

    def record(self, module, store):
        """Call store(output) after each call of `module`."""
        module.register_forward_hook(lambda _, inputs, output: store(output))

    def run_forward_backward(self, function, inputs):
        """function(*inputs), and the gradient of its sum with respect to every input."""
        output = function(*inputs)
        self.torch.autograd.grad(output, inputs, self.torch.ones_like(output))

    def run_inference(self, model, images):
        with self.torch.inference_mode():
            model(self.feature_map(images))

    def fold_batch_norms(self, model):
        """Fold each into the convolution before it, for a model in evaluation mode."""
        from torch.nn.utils.fusion import fuse_conv_bn_eval

        nn = self.torch.nn
        for module in model.modules():
            layers = list(module) if isinstance(module, nn.Sequential) else []
            for i, (layer, following) in enumerate(zip(layers, layers[1:])):
                if type(layer) is nn.Conv2d and isinstance(following, nn.BatchNorm2d):
                    module[i], module[i + 1] = fuse_conv_bn_eval(layer, following), nn.Identity()

    def threads(self):
        return self.torch.get_num_threads()


def load(name, device="cpu", options=()):
    """The adapter of "jittor" or "torch"."""
    return (Jittor if name == "jittor" else Torch)(device, options)
