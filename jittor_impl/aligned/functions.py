"""Functions with kernels of their own, each in place of dozens of Jittor's operators.

Fewer operators are fewer minutes of compiling at the first run and fewer passes over memory at
every other. The classes named ...Function are those kernels, forward and backward. Where a kernel
is for the CPU alone, or does not take every shape, the function in small letters beside it chooses
between the kernel and Jittor's own operators.

Shapes are (B, C, H, W) unless a comment says otherwise.
"""

from functools import cache, lru_cache

import numpy as np
from .launch import cast, check_channels, check_types, has_kernel, launch, on_gpu, run_code
from .start import jt, nn

linear = nn.linear  # the same as PyTorch's, under PyTorch's name


def cross_entropy(logits, target):
    """torch.nn.functional.cross_entropy of logits (n, classes), the mean over n.

    target: class indices (n,), or probabilities (n, classes).
    """
    if target.ndim == 1:
        return nn.cross_entropy_loss(logits, target)
    return -(target * nn.log_softmax(logits, dim=1)).sum(1).mean()


def cross_entropy_loss(output, target, weight=None, ignore_index=None, reduction="mean"):
    """nn.cross_entropy_loss of Jittor with PyTorch's rounding: output (n, classes), target (n,).

    Or (n, classes, H, W) and (n, H, W). Labels that are no class count as ignored. Jittor's own
    sums exponentials in float32, off by 1e-6 at 1000 classes, and gives the rest of a sum that
    should be 0 to the gradient of the largest logit.
    """
    if output.ndim == 4:
        # (n, classes, H, W) -> (n * H * W, classes)
        output = output.permute((0, 2, 3, 1)).reshape(-1, output.shape[1])
    logits = output.float64()
    logits = logits - logits.max([1], keepdims=True).stop_grad()
    # (n,) or (n, H, W) -> (n, classes), 1 at the label
    labels = target.reshape(-1).broadcast(logits, [1])
    one_hot = (labels.index(1) == labels).float64()
    counted = (one_hot if weight is None else one_hot * weight).sum(1)
    if ignore_index is not None:
        counted = counted * (target.reshape(-1) != ignore_index)
    loss = (logits.exp().sum(1).log() - (logits * one_hot).sum(1)) * counted
    if reduction == "none":
        return cast(loss, output.dtype).reshape(target.shape)
    loss = loss.sum() / counted.sum() if reduction == "mean" else loss.sum()
    return cast(loss, output.dtype)


def without_gradient():
    """Whether operators record nothing for a backward pass: inside `with jt.no_grad()`."""
    return bool(jt.flags.no_grad)


class NA2dAVFunction(jt.Function):
    """`ops.na2d_av`: attn (B, heads, H, W, K*K), value (B, heads, H, W, dim) -> like value."""

    headers = (
        ("neighbourhood.h", "lanes.h", "product.h", "na2d_av_cpu.h"),
        ("neighbourhood.h", "cuda_launch.h", "na2d_av_cuda.h"),
    )

    def execute(self, attn, value, kernel_size):
        check_types("na2d_av: attn and value", attn, value)
        B, heads, H, W, dim = value.shape
        self.attn, self.value = attn, value
        self.sizes = {"N": B * heads, "H": H, "W": W, "K": kernel_size, "dim": dim}
        return self.run("na2d_av_forward", [attn, value], value)

    def grad(self, grad_out):
        grad_out = cast(grad_out, self.value.dtype)
        grad_attn = self.run("na2d_av_grad_attn", [grad_out, self.value], self.attn)
        grad_value = self.run("na2d_av_grad_value", [self.attn, grad_out], self.value)
        return grad_attn, grad_value, None

    def run(self, kernel, inputs, like):
        return launch(kernel, self.headers, inputs, [like], self.sizes)[0]


class ContMixFunction(jt.Function):
    """`contmix.contmix` as one kernel.

    proj_weight (k1² + k2², S*S, 1, 1) and proj_bias (k1² + k2²,) are its 1x1 convolution's.
    """

    headers = (
        (
            "neighbourhood.h",
            "lanes.h",
            "product.h",
            "na2d_av_cpu.h",
            "activation_cpu.h",
            "contmix_cpu.h",
        ),
        (),
    )

    def execute(self, query, key, proj_weight, proj_bias, rpb1, rpb2, x):
        B, C, H, W = x.shape
        heads = rpb1.shape[0]
        K1, K2 = (rpb1.shape[1] + 1) // 2, (rpb2.shape[1] + 1) // 2
        self.geometry = {
            "B": B,
            "heads": heads,
            "H": H,
            "W": W,
            "regions": key.shape[2] * key.shape[3],
            "query_dim": query.shape[1] // heads,
            "value_dim": C // (2 * heads),
            "K1": K1,
            "K2": K2,
        }
        self.inputs = [query, key, proj_weight, proj_bias, rpb1, rpb2, x]
        attn = None if without_gradient() else ((B, heads, H, W, K1**2 + K2**2), x.dtype)
        out, *self.attn = self.run("contmix", self.inputs, [x, attn])
        return out

    def grad(self, grad_out):
        query, key, proj_weight, _, _, _, x = self.inputs
        saved = [query, key, proj_weight, x, *self.attn]
        return self.run("contmix_backward", [*saved, grad_out], self.inputs)

    def run(self, kernel, inputs, outputs):
        return launch(kernel, self.headers, inputs, outputs, self.geometry, as_struct=True)


class DepthwiseConvFunction(jt.Function):
    """Depthwise convolution with stride 1 that keeps the map's size; plus x itself if `residual`.

    x (B, C, H, W), weight (C, 1, K, K), bias (C,) or None -> (B, C, H, W).
    """

    headers = (
        ("lanes.h", "activation_cpu.h", "inference_cpu.h", "depthwise_cpu.h"),
        ("cuda_launch.h", "depthwise_cuda.h"),
    )

    def execute(self, x, weight, bias, dilation, residual):
        tensors = [x, weight] if bias is None else [x, weight, bias]
        check_types("DepthwiseConv: x, weight and bias", *tensors)
        self.x, self.weight, self.bias = x, weight, bias
        B, C, H, W = x.shape
        self.sizes = {"B": B, "C": C, "H": H, "W": W, "K": weight.shape[2], "dilation": dilation}
        self.sizes["residual"] = int(residual)
        return launch("depthwise", self.headers, [x, weight, bias], [x], self.sizes)[0]

    def grad(self, grad_y):
        chunks = min(self.sizes["B"], 16)
        grad_x, grad_weight, *grad_bias = launch(
            "depthwise_gradients",
            self.headers,
            [self.x, self.weight, cast(grad_y, self.x.dtype)],
            [self.x, self.weight, self.bias],
            self.sizes,
            scratch=[(chunks, self.sizes["C"], self.sizes["K"] ** 2 + 1)],
            gpu_numbers={"chunks": chunks},
        )
        return grad_x, grad_weight, *(grad_bias or [None]), None, None


def fits_gpu(kernel_size, dilation):
    """Whether the GPU's depthwise kernels take it.

    They take fewer than 256 strips of 4 taps, in 48 KiB of shared memory (depthwise_cuda.h).
    """
    side = 16 + 2 * dilation * (kernel_size // 2)
    shared = 4 * (side**2 + max(256, kernel_size**2))
    return kernel_size * -(-kernel_size // 4) < 256 and shared <= 48 * 1024


def keeps_size(conv):
    """Whether `conv` is depthwise, odd, the same along both axes, and keeps the size of the map."""
    (k, k2), (d, d2) = conv.kernel_size, conv.dilation
    same = (d * (k // 2),) * 2
    return (
        conv.groups == conv.in_channels == conv.out_channels
        and (k, d) == (k2, d2)
        and k % 2 == 1
        and conv.stride == (1, 1)
        and conv.padding == same
    )


class DenseConvFunction(jt.Function):
    """torch's conv2d with one group.

    x (B, C, H, W), weight (O, C, K, L), bias (O,) or None -> (B, O, H', W'). Jittor's own uses
    oneDNN, adds the bias by further operators and takes half as long again (docs/performance.md).
    """

    headers = (
        (
            "lanes.h",
            "product.h",
            "activation_cpu.h",
            "inference_cpu.h",
            "convolution_cpu.h",
        ),
        (),
    )

    def execute(self, x, weight, bias, stride, padding, dilation):
        self.x, self.weight = x, weight
        # Asked now: when this function has been recorded, Jittor calls its inputs stopped as well.
        self.like = [None if v is None or v.is_stop_grad() else v for v in (x, weight, bias)]
        self.geometry, shape = dense_geometry(x, weight, stride, padding, dilation)
        return self.run("convolution", [x, weight, bias], [(shape, x.dtype)])[0]

    def grad(self, grad_y):
        # One kernel, which leaves out what is stopped: the image of the stem (train.py).
        made = iter(self.run("convolution_gradients", [self.x, self.weight, grad_y], self.like))
        return *(None if v is None else next(made) for v in self.like), None, None, None

    def run(self, kernel, inputs, outputs):
        return launch(kernel, self.headers, inputs, outputs, self.geometry, as_struct=True)


def dense_geometry(x, weight, stride, padding, dilation):
    """The numbers of `struct Convolution` (convolution_cpu.h), and the shape of the output.

    Raises ValueError if the map is too small.
    """
    (B, C, H, W), (outs, _, K, L) = x.shape, weight.shape
    out = [(n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in ((H, K), (W, L))]
    if min(out) < 1:
        raise ValueError(
            f"Conv2d: a map of {H}x{W} with padding {padding} is smaller than the kernel of {K}x{L}"
        )
    geometry = {
        "B": B,
        "C": C,
        "H": H,
        "W": W,
        "O": outs,
        "K": K,
        "L": L,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
    }
    return geometry, (B, outs, *out)


def is_dense(conv):
    """Whether `conv` has one group and is the same along both axes."""
    return conv.groups == 1 and all(a == b for a, b in (conv.stride, conv.padding, conv.dilation))


def convolve(x, conv, own, residual=False):
    """The convolution `conv`, a Conv2d, of x; plus x itself if `residual`.

    By a kernel where there is one for its shape, the type of x and the device, else by `own`,
    Jittor's own operators.
    """
    check_channels("Conv2d", x, conv.in_channels)
    if is_dense(conv) and has_kernel(DenseConvFunction) and not residual:
        numbers = conv.stride[0], conv.padding[0], conv.dilation[0]
        return DenseConvFunction.apply(x, conv.weight, conv.bias, *numbers)
    k, d = conv.kernel_size[0], conv.dilation[0]
    if (
        keeps_size(conv)
        and has_kernel(DepthwiseConvFunction, x)
        and (not on_gpu() or fits_gpu(k, d))
    ):
        weight, bias = (None if v is None else cast(v, x.dtype) for v in (conv.weight, conv.bias))
        return DepthwiseConvFunction.apply(x, weight, bias, d, residual)
    return x + own(x) if residual else own(x)


# The activations that kernels apply, as activation_cpu.h counts them.
ACTIVATIONS = {type(None): 0, nn.GELU: 1, nn.SiLU: 2}


class ActivationFunction(jt.Function):
    """GELU or SiLU of x, of any shape; `activation` is one of ACTIVATIONS."""

    headers = ("activation_cpu.h",), ()

    def execute(self, x, activation):
        self.x, self.numbers = x, {"n": x.numel(), "activation": ACTIVATIONS[type(activation)]}
        return self.run("activation", [x])

    def grad(self, grad_y):
        return self.run("activation_backward", [self.x, grad_y]), None

    def run(self, kernel, inputs):
        return launch(kernel, self.headers, inputs, [self.x], self.numbers)[0]


def bias_and_norm(conv, norm, inputs):
    """Append the bias of `conv` and the values of the BatchNorm `norm`, if there are, to `inputs`.

    Returns both in C++.
    """

    def pointer(var):
        inputs.append(var)
        return f"in{len(inputs) - 1}_p"

    bias = "nullptr" if conv.bias is None else pointer(conv.bias)
    if norm is None:
        return bias, "{}"
    values = norm.weight, norm.bias, norm.running_mean, norm.running_var
    return bias, f"{{{', '.join(map(pointer, values))}, {norm.eps}f}}"


def fused_convolution(x, conv, norm=None, activation=None):
    """activation(norm(conv(x))) as one kernel; a BatchNorm2d or None, one of ACTIVATIONS or None.

    For inference on a CPU, and a convolution that `has_fused_kernel`: it uses the running
    statistics and has no gradient.
    """
    check_channels("Conv2d", x, conv.in_channels)
    if not is_dense(conv):
        return merged_depthwise(x, [(conv, norm)], activation)
    numbers, shape = dense_geometry(
        x, conv.weight, conv.stride[0], conv.padding[0], conv.dilation[0]
    )
    geometry = ", ".join(f'(int)data["{name}"]' for name in numbers)
    inputs = [x, conv.weight]
    bias, norm = bias_and_norm(conv, norm, inputs)
    code = (
        f"overlock::convolution(in0_p, in1_p, {bias}, out0_p, {{{geometry}}}, "
        f"{norm}, (overlock::Activation){ACTIVATIONS[type(activation)]});"
    )
    return run_code(DenseConvFunction.headers, (code, ""), inputs, [(shape, x.dtype)], numbers)[0]


def has_fused_kernel(conv):
    """Whether `fused_convolution` takes `conv` on the device in use."""
    return has_kernel(DenseConvFunction) and (
        is_dense(conv) or keeps_size(conv) and conv.dilation == (1, 1)
    )


MERGED_HEADERS = (
    DepthwiseConvFunction.headers[0],
    ("inference_cpu.h", *DepthwiseConvFunction.headers[1], "merged_cuda.h"),
)


def merged_depthwise(x, branches, activation=None):
    """activation(sum of norm(conv(x)) over `branches`) as one convolution.

    branches: pairs of a depthwise convolution that `keeps_size` and a BatchNorm2d or None, the one
    with the largest kernel first and not dilated. For inference: it uses the running statistics and
    has no gradient. On a GPU there is no activation.
    """
    check_channels("Conv2d", x, branches[0][0].in_channels)
    inputs, parts = [x], []
    for conv, norm in branches:
        inputs.append(conv.weight)
        weight = f"in{len(inputs) - 1}_p"
        bias, norm = bias_and_norm(conv, norm, inputs)
        parts.append(f"{{{weight}, {bias}, {conv.kernel_size[0]}, {conv.dilation[0]}, {norm}}}")
    sizes = dict(zip(("B", "C", "H", "W"), x.shape))
    numbers = ", ".join(f'(int)data["{name}"]' for name in sizes)
    given = f"overlock::Branch branches[] = {{{', '.join(parts)}}};\n"
    call = f"overlock::merged_depthwise(in0_p, branches, {len(branches)}, "
    cpu = f"{given}{call}(overlock::Activation){ACTIVATIONS[type(activation)]}, out0_p, {numbers});"
    gpu = f"{given}{call}out0_p, out1_p, out2_p, {numbers}, 0);"
    outputs, weight = [(x.shape, x.dtype)], branches[0][0].weight
    if on_gpu():  # which merges in memory
        outputs += [(weight.shape, x.dtype), ((x.shape[1],), x.dtype)]
    return run_code(MERGED_HEADERS, (cpu, gpu), inputs, outputs, sizes)[0]


def has_merged_kernel(x, branches):
    """Whether `merged_depthwise` takes x and `branches` on the device in use."""
    (conv, _), K = branches[0], branches[0][0].kernel_size[0]
    single = all(conv.weight.dtype == norm.weight.dtype == "float32" for conv, norm in branches)
    fits = has_kernel(DepthwiseConvFunction, x) and keeps_size(conv) and conv.dilation == (1, 1)
    return fits and single and (not on_gpu() or fits_gpu(K, 1))


class SeparableFunction(jt.Function):
    """rows @ x @ cols.T: x (B, C, H, W), constants rows (h, H) and cols (w, W) -> (B, C, h, w).

    Pooling and interpolation are linear and act on each axis by itself. As two products with small
    constant matrices they are exact to rounding, gradients included, and need no scatter backward.
    """

    headers = ("lanes.h", "separable_cpu.h"), ("cuda_launch.h", "separable_cuda.h")

    def execute(self, x, rows, cols):
        self.matrices, self.shape, self.dtype = (rows, cols), x.shape, x.dtype
        return self.run(x, (*x.shape[:2], rows.shape[0], cols.shape[0]), transposed=False)

    def grad(self, grad_out):
        return self.run(cast(grad_out, self.dtype), self.shape, transposed=True), None, None

    def run(self, x, shape, transposed):
        B, C, H, W = x.shape
        sizes = {
            "planes": B * C,
            "H": H,
            "W": W,
            "h": shape[2],
            "w": shape[3],
            "transposed": int(transposed),
        }
        return launch("separable", self.headers, [x, *self.matrices], [(shape, x.dtype)], sizes)[0]


def adaptive_avg_pool2d(x, size):
    """torch.nn.functional.adaptive_avg_pool2d: (B, C, H, W) -> (B, C, *size)."""
    if tuple(size) == (1, 1):
        return x.mean((2, 3), keepdims=True)  # (B, C, 1, 1)
    matrices = (pooling_matrix(n, out) for n, out in zip(x.shape[2:], size))
    return SeparableFunction.apply(x, *matrices)


def interpolate(x, size, mode, align_corners):
    """torch.nn.functional.interpolate: (B, C, H, W) -> (B, C, *size).

    For mode "bilinear" with align_corners=False alone.
    """
    if mode != "bilinear" or align_corners:
        raise ValueError(
            f"interpolate: only bilinear with align_corners=False, got {mode}, {align_corners}"
        )
    matrices = (bilinear_matrix(n, out) for n, out in zip(x.shape[2:], size))
    return SeparableFunction.apply(x, *matrices)


@lru_cache(maxsize=16)
def kept(make, *sizes):
    return constant(make(*sizes).astype(np.int32))


def uploaded(make, *sizes):
    """The array of integers make(*sizes); on a GPU, where it stays for later calls."""
    return kept(make, *sizes) if on_gpu() else make(*sizes)


def permute(x, axes):
    """torch.permute. On a GPU by the operator that has a version for it, whichever axes move.

    Jittor's x.permute has none where the last axis moves, and would go by way of the host.
    """
    return jt.fuse_transpose(x, axes) if on_gpu() else x.permute(axes)


def constant(array):
    """A Var that no optimizer trains and no gradient reaches."""
    return jt.array(array).stop_grad()


@cache
def pooling_matrix(size, out_size):
    """(out_size, size): output i is the mean of a window of the inputs.

    The window goes from floor(i*size/out_size) to ceil((i+1)*size/out_size) - 1.
    """
    matrix = np.zeros((out_size, size), np.float32)
    for i in range(out_size):
        first, end = i * size // out_size, -(-(i + 1) * size // out_size)
        matrix[i, first:end] = 1 / (end - first)
    return constant(matrix)


@cache
def bilinear_matrix(size, out_size):
    """(out_size, size): output i samples the input at max((i + 0.5) * size / out_size - 0.5, 0)."""
    matrix = np.zeros((out_size, size), np.float32)
    scale = np.float32(size) / np.float32(out_size)
    for i in range(out_size):
        position = max(np.float32(i + 0.5) * scale - np.float32(0.5), np.float32(0))
        low = min(int(position), size - 1)
        high = min(low + 1, size - 1)
        matrix[i, low] += 1 - (position - low)
        matrix[i, high] += position - low
    return constant(matrix)


NORM_HEADERS = (
    ("activation_cpu.h", "norm_cpu.h"),
    ("cuda_launch.h", "cuda_sum.h", "norm_cuda.h"),
)


def norm_chunks(x):
    """Into how many parts the GPU cuts the sums over a channel of x: one for every 2048 values."""
    return min(max(-(-x.shape[0] * x.shape[2] * x.shape[3] // 2048), 1), 1024)


def norm_backward(kernel, saved, grad_y, **numbers):
    """Gradients of x, weight and bias by a kernel of NORM_HEADERS.

    saved: x, weight, and what else the kernel reads; numbers: what it takes beside the sizes.
    """
    x, weight, *_ = saved
    B, C, H, W = x.shape
    chunks = norm_chunks(x)
    return launch(
        kernel,
        NORM_HEADERS,
        [*saved, cast(grad_y, x.dtype)],
        [x, weight, weight],
        {"B": B, "C": C, "P": H * W, **numbers},
        scratch=[(chunks + 1, C, 2)],
        gpu_numbers={"chunks": chunks},
    )


def batch_norm(x, weight, bias, statistics, momentum, eps, kernel="batch_norm", **numbers):
    """BatchNorm's kernel: y, mean and inv_std (C,), and the new running statistics.

    statistics: running mean and variance (C,), and the number of batches in them, int32; numbers:
    what `kernel` takes beside the sizes, eps and momentum.
    """
    B, C, H, W = x.shape
    chunks = norm_chunks(x)
    sizes = {"B": B, "C": C, "P": H * W, "eps": float(eps), "momentum": float(momentum)}
    return launch(
        kernel,
        NORM_HEADERS,
        [x, weight, bias, *statistics],
        [x, *[((C,), "float32")] * 2, *statistics],
        {**sizes, **numbers},
        scratch=[(chunks, C, 2)],
        gpu_numbers={"chunks": chunks},
    )


class BatchNormFunction(jt.Function):
    """BatchNorm of a batch x (B, C, H, W), variance in two passes.

    statistics: running mean and (unbiased) variance, float32 (C,), and the number of batches in
    them, int32; afterwards the function's own `statistics` are the new ones. activation: one of
    ACTIVATIONS, applied to the result, on the CPU alone. Returns y.
    """

    headers = NORM_HEADERS

    def execute(self, x, weight, bias, statistics, momentum, eps, activation=None):
        running_mean, running_var, _ = statistics
        check_types("BatchNorm: weight and bias", weight, bias)
        check_channels(
            "BatchNorm", x, *(v.numel() for v in (weight, bias, running_mean, running_var))
        )
        if running_mean.dtype != "float32" or running_var.dtype != "float32":
            raise ValueError(
                "BatchNorm: the running statistics must be float32, got "
                f"{running_mean.dtype} and {running_var.dtype}"
            )
        self.kernel, self.numbers = "batch_norm", {}
        if activation is not None:
            self.kernel = "batch_norm_activation"
            self.numbers = {"activation": ACTIVATIONS[type(activation)]}
        values = x, weight, bias, statistics, momentum, eps
        y, mean, inv_std, *self.statistics = batch_norm(*values, self.kernel, **self.numbers)
        # The activation is taken again, of what the bias is part of.
        self.saved = x, weight, *([] if activation is None else [bias]), mean, inv_std
        return y

    def grad(self, grad_y):
        grads = norm_backward(f"{self.kernel}_backward", self.saved, grad_y, **self.numbers)
        return *grads, None, None, None, None


class SqueezeExciteFunction(jt.Function):
    """x * sigmoid(conv2(gelu(conv1(mean of x over the map)))), on the CPU.

    x (B, C, H, W); weight1 (inner, C, 1, 1), bias1 (inner,), weight2 (C, inner, 1, 1), bias2 (C,).
    """

    headers = ("activation_cpu.h", "channel_cpu.h"), ()

    def execute(self, x, weight1, bias1, weight2, bias2):
        check_channels("SEModule", x, weight1.shape[1])
        (B, C, H, W), inner = x.shape, weight1.shape[0]
        self.sizes = {"B": B, "C": C, "P": H * W, "inner": inner}
        y, *saved = self.run(
            "squeeze_excite",
            [x, weight1, bias1, weight2, bias2],
            [x, *(((B, n), "float32") for n in (C, inner, C))],
        )
        self.saved = x, weight1, weight2, *saved
        self.like = x, weight1, bias1, weight2, bias2
        return y

    def grad(self, grad_y):
        return self.run("squeeze_excite_backward", [*self.saved, grad_y], self.like)

    def run(self, kernel, inputs, outputs):
        return launch(kernel, self.headers, inputs, outputs, self.sizes, as_struct=True)


class LayerScaleFunction(jt.Function):
    """x (B, C, H, W) * weight + bias, by channel, on the CPU; weight (C, 1, 1, 1), bias (C,)."""

    headers = SqueezeExciteFunction.headers

    def execute(self, x, weight, bias):
        check_channels("LayerScale", x, weight.numel(), bias.numel())
        self.saved, self.like = (x, weight), (x, weight, bias)
        B, C, H, W = x.shape
        self.sizes = {"B": B, "C": C, "P": H * W}
        return launch("layer_scale", self.headers, [x, weight, bias], [x], self.sizes)[0]

    def grad(self, grad_y):
        inputs = [*self.saved, grad_y]
        return launch("layer_scale_backward", self.headers, inputs, self.like, self.sizes)


@cache
def channel_copies(parts, gathers):
    """C++ that copies `parts` maps side by side into one if `gathers`, else one into them."""
    lines = ['int B = data["B"], C = data["C"]; int64_t P = data["P"], at = 0;']
    for i in range(parts):
        n = f'(int)data["C{i}"]'
        gather, part = f"in{i}_p, {n}, out0_p + at, C", f"in0_p + at, C, out{i}_p, {n}"
        lines.append(f"overlock::copy_channels({gather if gathers else part}, {n}, B, P);")
        lines.append(f"at += {n} * P;")
    return "\n".join(lines)


class CatFunction(jt.Function):
    """torch.cat along the channels, of maps (B, any, H, W), on the CPU."""

    headers = SqueezeExciteFunction.headers

    def execute(self, *maps):
        self.channels = [x.shape[1] for x in maps]
        return self.gather(maps)

    def grad(self, grad_y):
        return self.part(grad_y, self.channels)

    def gather(self, maps):
        B, _, H, W = maps[0].shape
        channels = [x.shape[1] for x in maps]
        if any(tuple(x.shape) != (B, n, H, W) for x, n in zip(maps, channels)):
            raise ValueError(f"cat_channels: maps {[tuple(x.shape) for x in maps]} differ in size")
        whole = (B, sum(channels), H, W), maps[0].dtype
        return self.copy(maps, [whole], channels, True)[0]

    def part(self, x, channels):
        B, C, H, W = x.shape
        if sum(channels) != C:
            raise ValueError(f"split_channels: {tuple(channels)} are not the {C} channels of x")
        return self.copy([x], [((B, n, H, W), x.dtype) for n in channels], channels, False)

    def copy(self, inputs, outputs, channels, gathers):
        B, _, H, W = inputs[0].shape
        numbers = {"B": B, "C": sum(channels), "P": H * W}
        numbers.update((f"C{i}", n) for i, n in enumerate(channels))
        code = channel_copies(len(channels), gathers)
        return run_code(self.headers, (code, ""), inputs, outputs, numbers)


class SplitFunction(CatFunction):
    """torch.split of x (B, C, H, W) along the channels, on the CPU; `channels` sum to C."""

    def execute(self, x, channels):
        self.shapes = [(x.shape[0], n, *x.shape[2:]) for n in channels]
        return self.part(x, channels)

    def grad(self, *grads):
        # Of a part that is not used there is none.
        grads = [jt.zeros(s) if g is None else g for g, s in zip(grads, self.shapes)]
        return self.gather(grads), None


def cat_channels(maps):
    """torch.cat(maps, dim=1), of maps (B, any, H, W)."""
    return CatFunction.apply(*maps) if has_kernel(CatFunction, *maps) else jt.cat(maps, dim=1)


def split_channels(x, channels):
    """torch.split(x, channels, dim=1) of x (B, C, H, W)."""
    if has_kernel(SplitFunction, x):
        return SplitFunction.apply(x, channels)
    return jt.split(x, channels, dim=1)


class LayerNormFunction(jt.Function):
    """LayerNorm of each pixel of x (B, C, H, W) over its channels, variance in two passes.

    weight and bias are (C,).
    """

    headers = NORM_HEADERS

    def execute(self, x, weight, bias, eps):
        check_types("LayerNorm: weight and bias", weight, bias)
        check_channels("LayerNorm", x, weight.numel(), bias.numel())
        B, C, H, W = x.shape
        numbers = {"B": B, "C": C, "P": H * W, "eps": float(eps)}
        per_pixel = ((B, H * W), "float32")
        y, mean, inv_std = launch(
            "channel_norm", NORM_HEADERS, [x, weight, bias], [x, per_pixel, per_pixel], numbers
        )
        self.saved = x, weight, mean, inv_std
        return y

    def grad(self, grad_y):
        return *norm_backward("channel_norm_backward", self.saved, grad_y), None


class GRNFunction(jt.Function):
    """Global Response Normalization of x (B, C, H, W) with gamma and beta (1, C, 1, 1).

    Where a channel is 0 its norm's gradient is 0, as in PyTorch, not NaN.
    """

    headers = NORM_HEADERS[0], ("cuda_launch.h", "cuda_sum.h", "grn_cuda.h")

    def execute(self, x, gamma, beta):
        check_types("GRN: gamma and beta", gamma, beta)
        check_channels("GRN", x, gamma.numel(), beta.numel())
        B, C, H, W = x.shape
        self.sizes = {"B": B, "C": C, "P": H * W}
        outputs = [x, ((B, C), "float32")]
        y, norms = launch(
            "grn", self.headers, [x, gamma, beta], outputs, self.sizes, scratch=[(B, 2)]
        )
        self.saved = x, gamma, norms
        return y

    def grad(self, grad_y):
        x, gamma, norms = self.saved
        B, C = norms.shape
        return launch(
            "grn_backward",
            self.headers,
            [*self.saved, cast(grad_y, x.dtype)],
            [x, gamma, gamma],
            self.sizes,
            scratch=[(B, C, 2), (B, 2)],
        )
