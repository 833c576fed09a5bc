"""A dilated reparam block's branches, each a depthwise convolution and a BatchNorm, as one kernel.

For training on the CPU (kernels/reparam_cpu.h). In inference they are merged (functions.py).
"""

from functools import cache
from itertools import chain

from .functions import DepthwiseConvFunction, keeps_size
from .launch import check_channels, has_kernel, run_code
from .start import jt


class ReparamFunction(jt.Function):
    """The sum of norm(conv(x)) over a dilated reparam block's branches, in training on the CPU.

    x (B, C, H, W); of each branch weight (C, 1, K, K), gamma, beta and the running statistics (C,),
    and the number of batches in them, int32; dilations: of each branch. Returns the sum
    (B, C, H, W); `running` are the new statistics and number of each branch, one after another.
    """

    headers = (*DepthwiseConvFunction.headers[0], "reparam_cpu.h"), ()

    def execute(self, x, dilations, eps, momentum, *variables):
        B, C, H, W = x.shape
        branches = [variables[i : i + 6] for i in range(0, len(variables), 6)]
        self.dilations, self.sizes = dilations, {"B": B, "C": C, "H": H, "W": W}
        n = len(branches)
        # Whole vectors of planes, of up to 16 lanes.
        convolved = (n, -(-B * C // 16) * 16, H, W), x.dtype
        statistics = (2, n, C), "float32"
        y, convolved, statistics, *self.running = self.run(
            "reparam",
            "TrainedBranch",
            [x],
            branches,
            [(x.shape, x.dtype), convolved, statistics],
            [[(v.shape, v.dtype) for v in branch[3:]] for branch in branches],
            {"eps": float(eps), "momentum": float(momentum)},
        )
        self.saved = x, convolved, statistics
        self.branches = [(weight, gamma) for weight, gamma, *_ in branches]
        return y

    def grad(self, grad_y):
        given = [
            [(weight.shape, weight.dtype)] + 2 * [(gamma.shape, gamma.dtype)]
            for weight, gamma in self.branches
        ]
        x = self.saved[0]
        grad_x, *grads = self.run(
            "reparam_backward",
            "BranchGradients",
            [*self.saved, grad_y],
            self.branches,
            [(x.shape, x.dtype)],
            given,
            {},
        )
        of_branches = [(*grads[i : i + 3], None, None, None) for i in range(0, len(grads), 3)]
        return grad_x, None, None, None, *chain.from_iterable(of_branches)

    def run(self, kernel, struct, inputs, branches, outputs, of_branches, numbers):
        """The kernel with its own inputs and outputs, and a struct for each branch."""
        code = reparam_code(
            kernel,
            struct,
            (len(inputs), len(branches[0])),
            (len(outputs), len(of_branches[0])),
            tuple((conv.shape[2], d) for (conv, *_), d in zip(branches, self.dilations)),
            tuple(numbers),
        )
        return run_code(
            self.headers,
            (code, ""),
            [*inputs, *chain.from_iterable(branches)],
            [*outputs, *chain.from_iterable(of_branches)],
            {**self.sizes, **numbers},
        )


@cache
def reparam_code(kernel, struct, inputs, outputs, kernels, numbers):
    """The C++ call of a kernel of reparam_cpu.h.

    inputs, outputs: how many it has of its own, and how many for each branch; kernels: size and
    dilation of each branch; numbers: the names of what follows the sizes.
    """

    def pointers(prefix, first, count):
        return [f"{prefix}{i}_p" for i in range(first, first + count)]

    structs = []
    for i, (size, dilation) in enumerate(kernels):
        own = pointers("in", inputs[0] + i * inputs[1], inputs[1])
        own += pointers("out", outputs[0] + i * outputs[1], outputs[1])
        structs.append(f"{{{', '.join(own)}, {size}, {dilation}}}")
    x, *others = pointers("in", 0, inputs[0])
    sizes = [f'(int)data["{name}"]' for name in ("B", "C", "H", "W")]
    arguments = [
        x,
        "branches",
        str(len(kernels)),
        *others,
        *pointers("out", 0, outputs[0]),
        *sizes,
        *(f'(float)data["{name}"]' for name in numbers),
    ]
    return (
        f"overlock::{struct} branches[] = {{{', '.join(structs)}}};\n"
        f"overlock::{kernel}({', '.join(arguments)});"
    )


def reparam(x, branches):
    """The sum of norm(conv(x)) over `branches`, as `has_reparam_kernel` takes them, in training.

    Keeps the running statistics of each BatchNorm.
    """
    check_channels("Conv2d", x, branches[0][0].in_channels)
    norms = [norm for _, norm in branches]
    variables = [
        (conv.weight, norm.weight, norm.bias, *norm.statistics()) for conv, norm in branches
    ]
    function = ReparamFunction()
    y = function(
        x,
        tuple(conv.dilation[0] for conv, _ in branches),
        norms[0].eps,
        norms[0].momentum,
        *chain.from_iterable(variables),
    )
    for i, norm in enumerate(norms):
        norm.keep_statistics(*function.running[3 * i : 3 * i + 3])
    return y


def has_reparam_kernel(x, branches):
    """Whether `reparam` takes x and `branches` on the device in use."""
    alike = {(norm.eps, norm.momentum) for _, norm in branches}
    return (
        has_kernel(ReparamFunction, x, *(v.weight for branch in branches for v in branch))
        and len(alike) == 1
        and x.shape[0] * x.shape[2] * x.shape[3] > 1
        and all(keeps_size(conv) and conv.bias is None for conv, _ in branches)
    )
