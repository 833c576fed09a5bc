"""Layers as single kernels, forward and backward: what Jittor would compile as dozens of operators.

Fewer operators are fewer minutes of compiling at the first run and fewer passes over memory at every other. The kernels are
files under kernels/; all are for the CPU, that of the depthwise convolution for the GPU too.
"""
from jittor_setup import jt
from jittor import nn
from ops import launch


def call(headers, code, inputs, shapes, data):
    """`launch` on the CPU alone."""
    return launch((headers, ()), (code, ""), inputs, shapes, data)


class DepthwiseConv(jt.Function):
    """x (B, C, H, W), weight (C, 1, K, K), bias (C,) or None -> (B, C, H, W), stride 1; plus x itself if residual."""

    headers = ("lanes.h", "inference_cpu.h", "depthwise_cpu.h"), ("cuda_launch.h", "depthwise_cuda.h")

    def execute(self, x, weight, bias, dilation, residual):
        self.x, self.weight, self.has_bias, self.residual = x, weight, bias is not None, residual
        self.data = dict(zip(("B", "C", "H", "W"), x.shape), K=weight.shape[2], dilation=dilation)
        inputs = [x, weight] + ([bias] if self.has_bias else [])
        return self.convolve(inputs, "in2_p" if self.has_bias else "nullptr", flip=False)

    def grad(self, grad_y):
        grad_x = self.convolve([grad_y, self.weight], "nullptr", flip=True)
        C, taps, chunks = self.data["C"], self.data["K"]**2, min(self.data["B"], 16)
        # The third output is scratch memory of the GPU's kernel.
        shapes = [self.weight.shape, (C if self.has_bias else 0,), (chunks, C, taps + 1)]
        bias = "out1_p" if self.has_bias else "nullptr"
        code = f"overlock::depthwise_grad_weight(in0_p, in1_p, out0_p, {bias}, "
        grads = launch(self.headers, (f"{code}$B, $C, $H, $W, $K, $dilation);",
                                      f"{code}out2_p, $B, $C, $H, $W, $K, $dilation, $chunks, 0);"),
                       [self.x, grad_y], shapes, {**self.data, "chunks": chunks})
        return grad_x, grads[0], grads[1] if self.has_bias else None, None, None

    def convolve(self, inputs, bias, flip):
        data = {**self.data, "residual": int(self.residual), "flip": int(flip)}
        code = f"overlock::depthwise(in0_p, in1_p, {bias}, out0_p, $B, $C, $H, $W, $K, $dilation, $residual, $flip"
        return launch(self.headers, (f"{code});", f"{code}, 0);"), inputs, [self.x.shape], data)[0]


def fits_gpu(kernel_size, dilation):
    """Whether the GPU's depthwise kernel takes it: 512 sums and 48 KiB of shared memory to a block (depthwise_cuda.h)."""
    side = 16 + 2 * dilation * (kernel_size // 2)
    return kernel_size**2 + 1 <= 512 and 4 * (side**2 + 512) <= 48 * 1024


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


class BatchNorm(jt.Function):
    """BatchNorm of a batch x (B, C, H, W); moves the running statistics of `layer`."""

    def execute(self, x, weight, bias, layer):
        B, C, H, W = x.shape
        self.data = {"B": B, "C": C, "P": H * W}
        numbers = {**self.data, "eps": layer.eps, "momentum": layer.momentum}
        y, mean, inv_std, running_mean, running_var = call(
            ("norm_cpu.h",),
            "overlock::batch_norm(in0_p, in1_p, in2_p, in3_p, in4_p, out0_p, out1_p, out2_p, out3_p, out4_p, "
            '$B, $C, $P, data["eps"], data["momentum"]);',
            [x, weight, bias, layer.running_mean, layer.running_var], [x.shape, (C,), (C,), (C,), (C,)], numbers)
        layer.running_mean.update(running_mean)
        layer.running_var.update(running_var)
        self.saved = x, weight, mean, inv_std
        return y

    def grad(self, grad_y):
        x, weight, mean, inv_std = self.saved
        grads = call(("norm_cpu.h",),
                     "overlock::batch_norm_backward(in0_p, in1_p, in2_p, in3_p, in4_p, out0_p, out1_p, out2_p, $B, $C, $P);",
                     [x, weight, mean, inv_std, grad_y], [x.shape, weight.shape, weight.shape], self.data)
        return *grads, None


class ChannelNorm(jt.Function):
    """LayerNorm of each pixel of x (B, C, H, W) over its channels."""

    def execute(self, x, weight, bias, eps):
        B, C, H, W = x.shape
        self.data = {"B": B, "C": C, "P": H * W}
        y, mean, inv_std = call(
            ("norm_cpu.h",),
            'overlock::channel_norm(in0_p, in1_p, in2_p, out0_p, out1_p, out2_p, $B, $C, $P, data["eps"]);',
            [x, weight, bias], [x.shape, (B, H * W), (B, H * W)], {**self.data, "eps": eps})
        self.saved = x, weight, mean, inv_std
        return y

    def grad(self, grad_y):
        x, weight, mean, inv_std = self.saved
        grads = call(("norm_cpu.h",),
                     "overlock::channel_norm_backward(in0_p, in1_p, in2_p, in3_p, in4_p, out0_p, out1_p, out2_p, $B, $C, $P);",
                     [x, weight, mean, inv_std, grad_y], [x.shape, weight.shape, weight.shape], self.data)
        return *grads, None


class GRN(jt.Function):
    """Global Response Normalization of x (B, C, H, W) with gamma and beta (1, C, 1, 1)."""

    def execute(self, x, gamma, beta):
        B, C, H, W = x.shape
        self.data = {"B": B, "C": C, "P": H * W}
        y, norms = call(("norm_cpu.h",), "overlock::grn(in0_p, in1_p, in2_p, out0_p, out1_p, $B, $C, $P);",
                        [x, gamma, beta], [x.shape, (B, C)], self.data)
        self.saved = x, gamma, norms
        return y

    def grad(self, grad_y):
        x, gamma, norms = self.saved
        return tuple(call(("norm_cpu.h",),
                          "overlock::grn_backward(in0_p, in1_p, in2_p, in3_p, out0_p, out1_p, out2_p, $B, $C, $P);",
                          [x, gamma, norms, grad_y], [x.shape, gamma.shape, gamma.shape], self.data))
