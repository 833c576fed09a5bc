"""One framework's side of a pair: builds the model, and writes what align.py compares.

Runs in that framework's environment. A job is a dict: framework ("jittor", "torch" or "torch64"),
factory, kwargs, input, optimizer, optimizer_kwargs, loss, seed, steps, aligned, map (all of them as
align.py's options), weights (the file with PyTorch's initial ones, or None), reference (the file
with what torch64 computed, for runs from perturbed weights, else None) and output (the file to
write).
"""

import importlib
import importlib.util
import json
import re
import sys
import traceback
from pathlib import Path

import numpy as np
from tools.align.compare import PERTURBED_RUNS, largest_errors, of_check
from tools.align.names import UserError, read_map, rename, unmatched
from tools.align.worker import say

# The settings that are compared, where modules of both frameworks have them under these names.
SETTINGS = ("eps", "momentum", "p", "negative_slope", "num_groups", "kernel_size", "stride")
SETTINGS += ("padding", "dilation", "groups", "ceil_mode", "output_size")
# What a layer that drops at random calls its probability.
PROBABILITIES = ("p", "drop_prob", "drop_rate")
# The name of the whole model, whose own is "".
OUTPUT = "the model"
# Two calls on the same input that lie further apart than this, relative to the largest value, draw.
RANDOM = 1e-3


def resolve(spec):
    """The function of "package.module:function" or "path/to/file.py:function"."""
    place, _, name = spec.rpartition(":")
    if not place:
        raise UserError(f"{spec} is not module:function or file.py:function")
    if place.endswith(".py"):
        path = Path(place).resolve()
        if not path.is_file():
            raise UserError(f"there is no file {place}")
        sys.path.insert(0, str(path.parent))
        source = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(source)
        sys.modules[path.stem] = module
        source.loader.exec_module(module)
    else:
        sys.path.insert(0, "")
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise UserError(f"{error}; give file.py:function for a file") from error
    if not hasattr(module, name):
        raise UserError(f"{place} has no {name}")
    return getattr(module, name)


def make_inputs(specs, seed, step):
    """The arrays that the model is called with, and the targets of a loss given by the user.

    specs: paths of .npz files, whose arrays count in their order, those named target... as targets;
    "2,3,224,224" for normally distributed numbers, "2,16:1000" for integers from 0 to 999, drawn
    anew for each step.
    """
    inputs, targets = [], []
    for i, spec in enumerate(specs):
        if spec.endswith(".npz"):
            try:
                with np.load(spec) as arrays:
                    for name in arrays:
                        (targets if name.startswith("target") else inputs).append(arrays[name])
            except (OSError, ValueError) as error:
                raise UserError(f"cannot read {spec}: {error}") from error
            continue
        match = re.fullmatch(r"([1-9]\d*(?:,[1-9]\d*)*)(?::([1-9]\d*))?", spec)
        if not match:
            raise UserError(f"--input {spec} is neither a shape like 2,3,224,224 nor a .npz file")
        shape = tuple(map(int, match[1].split(",")))
        generator = np.random.default_rng([seed, step, i])
        if match[2]:
            inputs.append(generator.integers(0, int(match[2]), shape))
        else:
            inputs.append(generator.standard_normal(shape).astype(np.float32))
    return inputs, targets


class Side:
    def __init__(self, f, job):
        self.f, self.job, self.notes = f, job, []

    def array(self, x):
        return self.f.array(x.astype(self.f.dtype) if x.dtype.kind == "f" else x)

    def inputs(self, step=0):
        inputs, targets = make_inputs(self.job["input"], self.job["seed"], step)
        return [self.array(x) for x in inputs], [self.array(x) for x in targets]

    def build(self):
        """The model with the weights that both start from, and no dropout."""
        f, job = self.f, self.job
        f.seed(job["seed"])
        model = resolve(job["factory"])(**job["kwargs"])
        if job["weights"]:
            with np.load(job["weights"]) as arrays:
                load_weights(f, model, of_check(arrays, "weights"), read_map(job["map"]))
        self.settings = {name: self.settings_of(m) for name, m in model.named_modules()}
        for module in model.modules():
            if re.search("drop|stochasticdepth", type(module).__name__.lower()):
                for name in PROBABILITIES:
                    if isinstance(getattr(module, name, None), (int, float)):
                        setattr(module, name, 0.0)
        return f.place(model.double() if f.dtype == np.float64 else model)

    def settings_of(self, module):
        """What the report says of a module: its class, its settings, what a call of it runs."""
        settings = {}
        for name in SETTINGS:
            value = getattr(module, name, None)
            if isinstance(value, (bool, int, float)):
                settings[name] = [value]
            elif isinstance(value, (tuple, list)) and all(isinstance(v, int) for v in value):
                settings[name] = list(value)
        called, ignored = self.f.called(module)
        leaf = len(list(module.modules())) == 1
        kind = type(module).__name__
        return dict(kind=kind, leaf=leaf, settings=settings, called=called, ignored=ignored)

    def watch(self, model):
        """A dict that every call fills: {"module[part], call 2": array}, in order of execution."""
        outputs, reference = {}, self.f.dtype == np.float64

        def store_as(name):
            def store(output, inputs):
                call, label = 1, name
                while any(key == label or key.startswith(f"{label}[") for key in outputs):
                    call += 1
                    label = f"{name}, call {call}"
                # The input of a layer of one's own explains a departure of it.
                if reference and self.settings[module_name(name)]["leaf"]:
                    for _, array in self.flat_parts(inputs)[:1]:
                        outputs[f"into {label}"] = self.f.kept(array)
                for part, array in self.flat_parts(output):
                    outputs[f"{label}{part}"] = self.f.kept(array)

            return store

        for name, module in model.named_modules():
            self.f.record(module, store_as(name or OUTPUT))
        return outputs

    def flat_parts(self, value):
        """Of `flat`, the part that is arrays: a block may return None or a number beside them."""
        if self.f.is_array(value):
            return [("", value)]
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, (tuple, list)):
            items = enumerate(value)
        else:
            return []
        return [(f"[{key}]{part}", array) for key, v in items for part, array in self.flat_parts(v)]

    def loss(self, output, targets, step=0):
        """The user's; else cross entropy on random labels for one output (n, classes), or the sum
        over all outputs of the mean of their squares."""
        if self.job["loss"]:
            return resolve(self.job["loss"])(output, *targets)
        parts = self.flat_parts(output)
        if len(parts) == 1 and len(parts[0][1].shape) == 2 and parts[0][1].shape[1] > 1:
            n, classes = parts[0][1].shape
            labels = np.random.default_rng([self.job["seed"], step, 99]).integers(0, classes, n)
            return self.f.cross_entropy(parts[0][1], labels)
        return sum((array * array).mean() for _, array in parts)

    def optimizer(self, model):
        if self.job["optimizer"]:
            return resolve(self.job["optimizer"])(list(model.parameters()))
        return self.f.adamw(list(model.parameters()), self.job["optimizer_kwargs"])

    def numpy(self, outputs, mode):
        """Empty `outputs`, as {"forward/mode name": array}, and "into/..." for what went in."""
        arrays = {}
        for name, array in outputs.items():
            check = "into" if name.startswith("into ") else "forward"
            arrays[f"{check}/{mode} {name.removeprefix('into ')}"] = self.f.detached(array)
        outputs.clear()
        return arrays

    def first_step(self):
        """Everything but the losses of many steps, {"check/name": array}."""
        f, model = self.f, self.build()
        arrays = {}
        if f.dtype == np.float32:
            weights = f.state(model).items()
            arrays = {f"weights/{key}": f.detached(value).copy() for key, value in weights}
        inputs, _ = self.inputs()
        outputs = self.watch(model)
        model.eval()
        with f.no_grad():
            model(*inputs)
        arrays |= self.numpy(outputs, "evaluation")
        arrays |= self.train(model, outputs)
        about = dict(modules=self.settings, trained=self.trained, optimizer=self.optimizer_name)
        if f.dtype == np.float32:
            again = self.build()
            f.seed(self.job["seed"] + 1)
            about["random"] = differing(arrays, self.train(again, self.watch(again)))
        arrays["about"] = np.array(json.dumps(about))
        return arrays

    def train(self, model, outputs):
        """What one step of training computes, {"check/name": array}."""
        f = self.f
        model.train()
        self.trained = f.trained(model)
        optimizer = self.optimizer(model)
        self.optimizer_name = type(optimizer).__name__
        loss = self.step(model, optimizer)
        arrays = self.numpy(outputs, "training") | self.loss_and_gradients(loss, model, optimizer)
        for key, value in f.state(model).items():
            check = "step" if key in self.trained else "buffers"
            arrays[f"{check}/{key}"] = f.detached(value)
        for name in ("lr", "eps", "weight_decay"):
            value = f.option(optimizer, name)
            arrays[f"options/{name}"] = np.array(np.nan if value is None else value)
        return arrays

    def step(self, model, optimizer, step=0):
        """Train on the inputs of this step: the loss before it, (1,)."""
        inputs, targets = self.inputs(step)
        loss = self.loss(model(*inputs), targets, step)
        self.f.step(optimizer, loss)
        return self.f.detached(loss).reshape(1)

    def loss_and_gradients(self, loss, model, optimizer):
        """{"check/name": array} of the step that was just made."""
        state, trained = self.f.state(model), self.f.trained(model)
        gradients = self.f.gradients_of(optimizer, [state[key] for key in trained])
        found = {f"gradients/{key}": value for key, value in zip(trained, gradients)}
        return {"loss/total": loss} | found

    def many_steps(self, model):
        """Losses before each of the steps, (steps,); loss and gradients of the first step."""
        model.train()
        optimizer, losses = self.optimizer(model), []
        for step in range(max(self.job["steps"], 1)):
            loss = self.step(model, optimizer, step)
            losses.append(loss[0])
            if step == 0:
                first = self.loss_and_gradients(loss, model, optimizer)
        return np.array(losses), first

    def perturbed_runs(self):
        """What rounding may do: losses (runs, steps), and the largest errors of the first step."""
        losses = []

        def firsts():
            for run in range(PERTURBED_RUNS):
                model = self.build()
                perturb(self.f.state(model), self.f, [self.job["seed"], run])
                found, first = self.many_steps(model)
                losses.append(found)
                yield first

        with np.load(self.job["reference"]) as reference:
            errors = largest_errors(firsts(), reference)
        return {"losses": np.array(losses), **errors}


def differing(arrays, again):
    """The first module that computed something else in another run of the same step, or None."""
    for name in (name for name in arrays if name.startswith("forward/training ")):
        gap = np.abs(arrays[name] - again[name]).max(initial=0)
        if gap > RANDOM * np.abs(arrays[name]).max(initial=0):
            return name.removeprefix("forward/training ")
    return None


def load_weights(f, model, weights, patterns):
    """Give the model PyTorch's weights, or raise UserError with the keys that do not fit."""
    state = f.state(model)
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    given = {rename(key, patterns): value for key, value in weights.items()}
    complaints = unmatched(shapes, {key: value.shape for key, value in given.items()})
    if complaints:
        raise UserError("\n  ".join(["the weights do not fit", *complaints]))
    for key in state.keys() & given.keys():
        f.set(state[key], given[key])


def module_name(label):
    """The name of the module, "" for the model, of a name that `watch` gave."""
    name = re.sub(r"(, call \d+)?(\[[^\]]*\])*$", "", label)
    return "" if name == OUTPUT else name


def perturb(state, f, seed):
    """Change every float in `state` by one unit in the last place, up or down as `seed` says."""
    generator = np.random.default_rng(seed)
    for variable in state.values():
        value = f.detached(variable)
        if value.dtype == np.float32:
            up = generator.random(value.shape) >= 0.5
            direction = np.where(up, np.float32(np.inf), np.float32(-np.inf))
            f.set(variable, np.nextafter(value, direction))


def run(path):
    """Do the jobs in the JSON file `path`, one after another.

    A mistake of the user's ends the program with what is wrong.
    """
    from tools.align.adapters import JittorPort, TorchPort

    for job in json.loads(Path(path).read_text()):
        if job["framework"] == "jittor":
            f = JittorPort(job["aligned"], job["device"])
        else:
            dtype = np.float64 if job["framework"] == "torch64" else np.float32
            f = TorchPort(job["device"], dtype=dtype)
        try:
            with f.building():
                np.savez(job["output"], **measured(Side(f, job)))
        except UserError as error:
            say(error)
        except Exception as error:  # of a model that is not ours
            say(where(error))


def measured(side):
    """What a job writes."""
    if side.job["reference"]:
        return side.perturbed_runs()
    arrays = side.first_step()
    if side.f.dtype == np.float32 and side.job["steps"]:
        arrays["losses"], _ = side.many_steps(side.build())
    return arrays


def where(error):
    """One line: what was raised, and where."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    message = (str(error).strip() or "no message").splitlines()
    return f"{type(error).__name__}: {message[0]} ({frame.filename}:{frame.lineno})"
