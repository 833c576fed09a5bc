"""Layers as single kernels, forward and backward: what Jittor would compile as dozens of operators.

Fewer operators are fewer minutes of compiling at the first run and fewer passes over memory at every other. The kernels are
files under kernels/; all are for the CPU, those of the depthwise convolution and of the norms for the GPU too. There, scratch
memory of a kernel is one more output, of a size that depends on the shapes alone.
"""
from jittor_setup import jt
from jittor import nn
from ops import cast, check_channels, check_types, launch


def call(headers, code, inputs, shapes, data):
    """`launch` on the CPU alone."""
    return launch((headers, ()), (code, ""), inputs, shapes, data)


NO_BIAS = "(in0_type*)nullptr"


class DepthwiseConv(jt.Function):
    """x (B, C, H, W), weight (C, 1, K, K), bias (C,) or None -> (B, C, H, W), stride 1; plus x itself if residual."""

    headers = ("lanes.h", "inference_cpu.h", "depthwise_cpu.h"), ("cuda_launch.h", "depthwise_cuda.h")

    def execute(self, x, weight, bias, dilation, residual):
        check_types("DepthwiseConv: x, weight and bias", x, weight, *([] if bias is None else [bias]))
        self.x, self.weight, self.has_bias, self.residual = x, weight, bias is not None, residual
        self.data = dict(zip(("B", "C", "H", "W"), x.shape), K=weight.shape[2], dilation=dilation)
        inputs = [x, weight] + ([bias] if self.has_bias else [])
        return self.convolve(inputs, "in2_p" if self.has_bias else NO_BIAS, flip=False)

    def grad(self, grad_y):
        grad_y = cast(grad_y, self.x.dtype)
        grad_x = self.convolve([grad_y, self.weight], NO_BIAS, flip=True)
        C, taps, chunks = self.data["C"], self.data["K"]**2, min(self.data["B"], 16)
        shapes = [self.weight.shape, (C if self.has_bias else 0,), (chunks, C, taps + 1)]
        dtypes = [self.x.dtype, self.x.dtype, "float32"]
        bias = "out1_p" if self.has_bias else NO_BIAS
        code = f"overlock::depthwise_grad_weight(in0_p, in1_p, out0_p, {bias}, "
        grads = launch(self.headers, (f"{code}$B, $C, $H, $W, $K, $dilation);",
                                      f"{code}out2_p, $B, $C, $H, $W, $K, $dilation, $chunks, 0);"),
                       [self.x, grad_y], shapes, {**self.data, "chunks": chunks}, dtypes)
        return grad_x, grads[0], grads[1] if self.has_bias else None, None, None

    def convolve(self, inputs, bias, flip):
        data = {**self.data, "residual": int(self.residual), "flip": int(flip)}
        code = f"overlock::depthwise(in0_p, in1_p, {bias}, out0_p, $B, $C, $H, $W, $K, $dilation, $residual, $flip"
        return launch(self.headers, (f"{code});", f"{code}, 0);"), inputs, [self.x.shape], data)[0]


def fits_gpu(kernel_size, dilation):
    """Whether the GPU's depthwise kernels take it: 256 strips of 4 taps and 48 KiB of shared memory (depthwise_cuda.h)."""
    side = 16 + 2 * dilation * (kernel_size // 2)
    return kernel_size * -(-kernel_size // 4) < 256 and 4 * (side**2 + max(256, kernel_size**2)) <= 48 * 1024


# The activations that a convolution takes along in inference, as inference_cpu.h calls them.
ACTIVATIONS = {nn.GELU: "overlock::GELU", nn.SiLU: "overlock::SILU", type(None): "overlock::IDENTITY"}


def bias_and_norm(conv, norm, inputs):
    """Append `conv`'s bias and the values of the BatchNorm `norm`, if there are, to `inputs`. Returns both in C++."""
    def pointer(var):
        inputs.append(var)
        return f"in{len(inputs) - 1}_p"
    bias = "nullptr" if conv.bias is None else pointer(conv.bias)
    if norm is None:
        return bias, "{}"
    return bias, f"{{{', '.join(map(pointer, (norm.weight, norm.bias, norm.running_mean, norm.running_var)))}, {norm.eps}f}}"


def merged_depthwise(x, branches, activation=None):
    """activation(sum of norm(conv(x)) over `branches`), pairs (depthwise convolution that keeps the map's size, BatchNorm or
    None), the one with the largest kernel first and not dilated: as one convolution.

    For inference: uses the running statistics and has no gradient.
    """
    inputs, code = [x], []
    for conv, norm in branches:
        inputs.append(conv.weight)
        weight = f"in{len(inputs) - 1}_p"
        bias, norm = bias_and_norm(conv, norm, inputs)
        code.append(f"{{{weight}, {bias}, {conv.kernel_size[0]}, {conv.dilation[0]}, {norm}}}")
    code = (f"overlock::Branch branches[] = {{{', '.join(code)}}};\n"
            f"overlock::merged_depthwise(in0_p, branches, {len(branches)}, {ACTIVATIONS[type(activation)]}, out0_p, $B, $C, $H, $W);")
    return call(DepthwiseConv.headers[0], code, inputs, [x.shape], dict(zip(("B", "C", "H", "W"), x.shape)))[0]


DENSE_HEADERS = "lanes.h", "product.h", "inference_cpu.h", "convolution_cpu.h"
DENSE_GEOMETRY = "{$B, $C, $H, $W, $O, $K, $L, $stride, $padding, $dilation}"


def dense_geometry(x, weight, stride, padding, dilation):
    """The numbers of DENSE_GEOMETRY, and the shape of the output. Raises ValueError if the map is too small."""
    (B, C, H, W), (O, _, K, L) = x.shape, weight.shape
    shape = (B, O, *((n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in ((H, K), (W, L))))
    if min(shape[2:]) < 1:
        raise ValueError(f"Conv2d: a map of {H}x{W} with padding {padding} is smaller than the kernel of {K}x{L}")
    return {"B": B, "C": C, "H": H, "W": W, "O": O, "K": K, "L": L,
            "stride": stride, "padding": padding, "dilation": dilation}, shape


class DenseConv(jt.Function):
    """x (B, C, H, W), weight (O, C, K, L), bias (O,) or None -> (B, O, H', W'), as torch's conv2d with one group."""

    def execute(self, x, weight, bias, stride, padding, dilation):
        self.x, self.weight, self.has_bias = x, weight, bias is not None
        self.data, shape = dense_geometry(x, weight, stride, padding, dilation)
        inputs = [x, weight] + ([bias] if self.has_bias else [])
        return self.run(f"convolution(in0_p, in1_p, {'in2_p' if self.has_bias else 'nullptr'}, out0_p", inputs, [shape])[0]

    def grad(self, grad_y):
        grad_x = self.run("convolution_grad_x(in0_p, in1_p, out0_p", [grad_y, self.weight], [self.x.shape])
        shapes = [self.weight.shape] + ([(self.data["O"],)] if self.has_bias else [])
        grads = self.run(f"convolution_grad_weight(in0_p, in1_p, out0_p, {'out1_p' if self.has_bias else 'nullptr'}",
                         [self.x, grad_y], shapes)
        return *grad_x, *grads, *[None] * (4 - self.has_bias)

    def run(self, code, inputs, shapes):
        return call(DENSE_HEADERS, f"overlock::{code}, {DENSE_GEOMETRY});", inputs, shapes, self.data)


def dense_norm(x, conv, norm, activation):
    """activation(norm(conv(x))), norm a BatchNorm or None: for inference, like `merged_depthwise`."""
    data, shape = dense_geometry(x, conv.weight, conv.stride[0], conv.padding[0], conv.dilation[0])
    inputs = [x, conv.weight]
    bias, norm = bias_and_norm(conv, norm, inputs)
    code = f"overlock::convolution(in0_p, in1_p, {bias}, out0_p, {DENSE_GEOMETRY}, {norm}, {ACTIVATIONS[type(activation)]});"
    return call(DENSE_HEADERS, code, inputs, [shape], data)[0]


class ContMix(jt.Function):
    """contmix.py's function of the same name as one kernel; proj_weight (k1² + k2², S*S, 1, 1), proj_bias (k1² + k2²,)."""

    geometry = "{$B, $heads, $H, $W, $regions, $query_dim, $value_dim, $K1, $K2}"

    def execute(self, query, key, proj_weight, proj_bias, rpb1, rpb2, x):
        B, C, H, W = x.shape
        heads = rpb1.shape[0]
        K1, K2 = (rpb1.shape[1] + 1) // 2, (rpb2.shape[1] + 1) // 2
        self.data = {"B": B, "heads": heads, "H": H, "W": W, "regions": key.shape[2] * key.shape[3],
                     "query_dim": query.shape[1] // heads, "value_dim": C // (2 * heads), "K1": K1, "K2": K2}
        inputs = [query, key, proj_weight, proj_bias, rpb1, rpb2, x]
        code = "contmix(in0_p, in1_p, in2_p, in3_p, in4_p, in5_p, in6_p, out0_p, "
        if jt.flags.no_grad:
            return self.run(f"{code}nullptr", inputs, [x.shape])[0]
        out, attn = self.run(f"{code}out1_p", inputs, [x.shape, (B, heads, H, W, K1**2 + K2**2)])
        self.saved = query, key, proj_weight, x, attn
        self.shapes = [v.shape for v in inputs]
        return out

    def grad(self, grad_out):
        return self.run("contmix_backward(in0_p, in1_p, in2_p, in3_p, in4_p, in5_p, out0_p, out1_p, out2_p, out3_p, "
                        "out4_p, out5_p, out6_p", [*self.saved, grad_out], self.shapes)

    def run(self, code, inputs, shapes):
        return call(("neighbourhood.h", "lanes.h", "product.h", "na2d_av_cpu.h", "contmix_cpu.h"),
                    f"overlock::{code}, {self.geometry});", inputs, shapes, self.data)


class Separable(jt.Function):
    """rows @ x @ cols.T: x (B, C, H, W), constants rows (h, H) and cols (w, W) -> (B, C, h, w)."""

    def execute(self, x, rows, cols):
        self.matrices, self.shape = (rows, cols), x.shape
        return self.run(x, (*x.shape[:2], rows.shape[0], cols.shape[0]), transposed=False)

    def grad(self, grad_out):
        return self.run(grad_out, self.shape, transposed=True), None, None

    def run(self, x, shape, transposed):
        data = {"planes": x.shape[0] * x.shape[1], "H": x.shape[2], "W": x.shape[3], "h": shape[2], "w": shape[3],
                "transposed": int(transposed)}
        return call(("lanes.h", "product.h", "separable_cpu.h"), "overlock::separable(in0_p, in1_p, in2_p, out0_p, "
                    "$planes, $H, $W, $h, $w, $transposed);", [x, *self.matrices], [shape], data)[0]


NORM_HEADERS = ("norm_cpu.h",), ("cuda_launch.h", "cuda_sum.h", "norm_cuda.h")


def norm_chunks(x):
    """Into how many parts the GPU cuts the sums over a channel of x (B, C, H, W): a block for every 2048 values of it."""
    return min(max(-(-x.shape[0] * x.shape[2] * x.shape[3] // 2048), 1), 1024)


class BatchNorm(jt.Function):
    """BatchNorm of a batch x (B, C, H, W); moves the running statistics of `layer`, which are float32."""

    def execute(self, x, weight, bias, layer):
        check_types("BatchNorm: weight and bias", weight, bias)
        check_channels("BatchNorm", x, *(v.numel() for v in (weight, bias, layer.running_mean, layer.running_var)))
        if layer.running_mean.dtype != "float32" or layer.running_var.dtype != "float32":
            raise ValueError(f"BatchNorm: the running statistics must be float32, got {layer.running_mean.dtype} and "
                             f"{layer.running_var.dtype}")
        B, C, H, W = x.shape
        self.data = {"B": B, "C": C, "P": H * W, "chunks": norm_chunks(x)}
        numbers = {**self.data, "eps": layer.eps, "momentum": layer.momentum}
        code = "overlock::batch_norm(in0_p, in1_p, in2_p, in3_p, in4_p, out0_p, out1_p, out2_p, out3_p, out4_p, "
        numbers_code = '$B, $C, $P, data["eps"], data["momentum"]'
        y, mean, inv_std, running_mean, running_var, _ = launch(
            NORM_HEADERS, (f"{code}{numbers_code});", f"{code}out5_p, {numbers_code}, $chunks, 0);"),
            [x, weight, bias, layer.running_mean, layer.running_var],
            [x.shape, (C,), (C,), (C,), (C,), (self.data["chunks"], C, 2)], numbers, [x.dtype] + ["float32"] * 5)
        layer.running_mean.update(running_mean)
        layer.running_var.update(running_var)
        self.saved = x, weight, mean, inv_std
        return y

    def grad(self, grad_y):
        return *norm_backward("batch_norm_backward", *self.saved, grad_y, self.data), None


class ChannelNorm(jt.Function):
    """LayerNorm of each pixel of x (B, C, H, W) over its channels."""

    def execute(self, x, weight, bias, eps):
        check_types("ChannelNorm: weight and bias", weight, bias)
        check_channels("ChannelNorm", x, weight.numel(), bias.numel())
        B, C, H, W = x.shape
        self.data = {"B": B, "C": C, "P": H * W, "chunks": norm_chunks(x)}
        code = 'overlock::channel_norm(in0_p, in1_p, in2_p, out0_p, out1_p, out2_p, $B, $C, $P, data["eps"]'
        y, mean, inv_std = launch(NORM_HEADERS, (f"{code});", f"{code}, 0);"), [x, weight, bias],
                                  [x.shape, (B, H * W), (B, H * W)], {**self.data, "eps": eps}, [x.dtype, "float32", "float32"])
        self.saved = x, weight, mean, inv_std
        return y

    def grad(self, grad_y):
        return *norm_backward("channel_norm_backward", *self.saved, grad_y, self.data), None


def norm_backward(kernel, x, weight, mean, inv_std, grad_y, data):
    """Gradients of x, weight and bias, by a kernel of NORM_HEADERS."""
    code = f"overlock::{kernel}(in0_p, in1_p, in2_p, in3_p, in4_p, out0_p, out1_p, out2_p, "
    return launch(NORM_HEADERS, (f"{code}$B, $C, $P);", f"{code}out3_p, $B, $C, $P, $chunks, 0);"),
                  [x, weight, mean, inv_std, cast(grad_y, x.dtype)],
                  [x.shape, weight.shape, weight.shape, (data["chunks"] + 1, data["C"], 2)], data,
                  [x.dtype, weight.dtype, weight.dtype, "float32"])[:3]


class GRN(jt.Function):
    """Global Response Normalization of x (B, C, H, W) with gamma and beta (1, C, 1, 1)."""

    headers = ("norm_cpu.h",), ("cuda_launch.h", "cuda_sum.h", "grn_cuda.h")

    def execute(self, x, gamma, beta):
        check_types("GRN: gamma and beta", gamma, beta)
        check_channels("GRN", x, gamma.numel(), beta.numel())
        B, C, H, W = x.shape
        self.data = {"B": B, "C": C, "P": H * W}
        code = "overlock::grn(in0_p, in1_p, in2_p, out0_p, out1_p, "
        y, norms, _ = launch(self.headers, (f"{code}$B, $C, $P);", f"{code}out2_p, $B, $C, $P, 0);"), [x, gamma, beta],
                             [x.shape, (B, C), (B, 2)], self.data, [x.dtype, "float32", "float32"])
        self.saved = x, gamma, norms
        return y

    def grad(self, grad_y):
        x, gamma, norms = self.saved
        code = "overlock::grn_backward(in0_p, in1_p, in2_p, in3_p, out0_p, out1_p, out2_p, "
        return tuple(launch(self.headers, (f"{code}$B, $C, $P);", f"{code}out3_p, out4_p, $B, $C, $P, 0);"),
                            [x, gamma, norms, cast(grad_y, x.dtype)],
                            [x.shape, gamma.shape, gamma.shape, (*norms.shape, 2), (norms.shape[0], 2)], self.data,
                            [x.dtype, gamma.dtype, gamma.dtype, "float32", "float32"])[:3])
