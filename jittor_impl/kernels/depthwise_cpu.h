// Depthwise convolution on the CPU, stride 1, padding that keeps the size, any odd kernel and dilation:
// forward and both gradients. x, y (B, C, H, W), weight (C, K, K), bias (C), all contiguous float32.
// No atomics; sums are cut at fixed places, so the thread count changes no bit.
// Include lanes.h and inference_cpu.h before it.
#pragma once

namespace overlock {

// Geometry of one convolution on lanes: the image stands in a frame of zeros, as wide as the taps that can reach it.
struct Taps {
    int H, W, frame_h, frame_w, stride, count = 0;
    std::vector<int> index, offset;  // of each tap that reaches the map: its place in K*K, and in the framed image

    Taps(int H, int W, int K, int dilation) : H(H), W(W) {
        const int reach = K / 2;
        frame_h = dilation * std::min(reach, (H - 1) / dilation);
        frame_w = dilation * std::min(reach, (W - 1) / dilation);
        stride = W + 2 * frame_w;
        for (int p = 0; p < K; p++)
            for (int q = 0; q < K; q++) {
                const int dy = (p - reach) * dilation, dx = (q - reach) * dilation;
                if (std::abs(dy) > frame_h || std::abs(dx) > frame_w) continue;
                index.push_back(p * K + q);
                offset.push_back((dy + frame_h) * stride + dx + frame_w);
                count++;
            }
    }

    int64_t framed_size() const { return (int64_t)(H + 2 * frame_h) * stride; }

    // (H*W, 8) into the middle of the frame; the frame itself is zero already.
    void place(const Lanes* image, Lanes* framed) const {
        for (int i = 0; i < H; i++)
            std::memcpy(framed + (int64_t)(i + frame_h) * stride + frame_w, image + (int64_t)i * W, W * sizeof(Lanes));
    }
};

// R x T pixels at once: enough independent sums to hide the latency of a multiply-add.
template <int R, int T>
inline void convolve_tile(const Taps& taps, const Lanes* framed, const Lanes* weight, Lanes* out) {
    Lanes sum[R][T] = {};
    for (int k = 0; k < taps.count; k++) {
        const Lanes w = weight[k];
        const Lanes* x = framed + taps.offset[k];
        for (int r = 0; r < R; r++)
            for (int t = 0; t < T; t++) sum[r][t] += w * x[r * taps.stride + t];
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) out[(int64_t)r * taps.W + t] = sum[r][t];
}

template <int R>
inline void convolve_rows(const Taps& taps, const Lanes* framed, const Lanes* weight, Lanes* out) {
    int j = 0;
    if (R == 1)
        for (; j + 8 <= taps.W; j += 8) convolve_tile<R, 8>(taps, framed + j, weight, out + j);
    for (; j + 4 <= taps.W; j += 4) convolve_tile<R, 4>(taps, framed + j, weight, out + j);
    for (; j + 2 <= taps.W; j += 2) convolve_tile<R, 2>(taps, framed + j, weight, out + j);
    for (; j < taps.W; j++) convolve_tile<R, 1>(taps, framed + j, weight, out + j);
}

inline void convolve(const Taps& taps, const Lanes* framed, const Lanes* weight, Lanes* out) {
    int i = 0;
    if (taps.W < 8)
        for (; i + 2 <= taps.H; i += 2)
            convolve_rows<2>(taps, framed + (int64_t)i * taps.stride, weight, out + (int64_t)i * taps.W);
    for (; i < taps.H; i++)
        convolve_rows<1>(taps, framed + (int64_t)i * taps.stride, weight, out + (int64_t)i * taps.W);
}

// y = x * weight (+ bias) (+ x if residual). flip: correlate with the kernel turned by 180 degrees, which turns
// the forward pass into the gradient with respect to x.
inline void depthwise(const float* x, const float* weight, const float* bias, float* y, int B, int C, int H, int W,
                      int K, int dilation, bool residual, bool flip, Activation activation = IDENTITY) {
    const Taps taps(H, W, K, dilation);
    const int groups = (C + LANES - 1) / LANES;
    const int64_t pixels = (int64_t)H * W;
    Scratch weights;
    weights.resize((int64_t)groups * taps.count);
    for (int c = 0; c < C; c++)
        for (int k = 0; k < taps.count; k++) {
            const int tap = flip ? K * K - 1 - taps.index[k] : taps.index[k];
            reinterpret_cast<float*>(weights.data + (int64_t)(c / LANES) * taps.count + k)[c % LANES] =
                weight[c * K * K + tap];
        }
    #pragma omp parallel
    {
        Scratch image, framed, out;
        image.resize(pixels);
        framed.resize(taps.framed_size());
        out.resize(pixels);
        #pragma omp for collapse(2) schedule(static)
        for (int n = 0; n < B; n++)
            for (int group = 0; group < groups; group++) {
                const int c = group * LANES, channels = std::min(LANES, C - c);
                const int64_t start = ((int64_t)n * C + c) * pixels;
                to_lanes(x + start, channels, pixels, image.data);
                taps.place(image.data, framed.data);
                convolve(taps, framed.data, weights.data + (int64_t)group * taps.count, out.data);
                if (bias || residual) {
                    Lanes b = {};
                    for (int e = 0; bias && e < channels; e++) b[e] = bias[c + e];
                    if (residual)
                        for (int64_t i = 0; i < pixels; i++) out.data[i] += image.data[i] + b;
                    else
                        for (int64_t i = 0; i < pixels; i++) out.data[i] += b;
                }
                from_lanes(out.data, channels, pixels, y + start);
                activate(activation, y + start, channels * pixels);
            }
    }
}

// N taps at once: sum[k] += gradient of each output pixel * the input pixel under tap k.
template <int N>
inline void correlate(const Taps& taps, const Lanes* framed, const Lanes* grad, const int* offset, Lanes* sums) {
    Lanes sum[N] = {};
    for (int i = 0; i < taps.H; i++) {
        const Lanes* x = framed + (int64_t)i * taps.stride;
        const Lanes* g = grad + (int64_t)i * taps.W;
        for (int j = 0; j < taps.W; j++)
            for (int k = 0; k < N; k++) sum[k] += g[j] * x[j + offset[k]];
    }
    for (int k = 0; k < N; k++) sums[k] += sum[k];
}

// grad_weight (C, K, K) and, unless null, grad_bias (C).
inline void depthwise_grad_weight(const float* x, const float* grad_y, float* grad_weight, float* grad_bias,
                                  int B, int C, int H, int W, int K, int dilation) {
    const Taps taps(H, W, K, dilation);
    const int groups = (C + LANES - 1) / LANES;
    const int64_t pixels = (int64_t)H * W;
    const int chunks = std::min(B, 16), sums = taps.count + 1;  // the last sum is the bias'
    Scratch partial;
    partial.resize((int64_t)chunks * groups * sums);
    #pragma omp parallel
    {
        Scratch image, framed, grad;
        image.resize(pixels);
        framed.resize(taps.framed_size());
        grad.resize(pixels);
        #pragma omp for collapse(2) schedule(static)
        for (int chunk = 0; chunk < chunks; chunk++)
            for (int group = 0; group < groups; group++) {
                Lanes* sum = partial.data + ((int64_t)chunk * groups + group) * sums;
                const int c = group * LANES, channels = std::min(LANES, C - c);
                for (int n = (int64_t)chunk * B / chunks; n < (int64_t)(chunk + 1) * B / chunks; n++) {
                    const int64_t start = ((int64_t)n * C + c) * pixels;
                    to_lanes(x + start, channels, pixels, image.data);
                    taps.place(image.data, framed.data);
                    to_lanes(grad_y + start, channels, pixels, grad.data);
                    int k = 0;
                    for (; k + 8 <= taps.count; k += 8)
                        correlate<8>(taps, framed.data, grad.data, taps.offset.data() + k, sum + k);
                    for (; k + 4 <= taps.count; k += 4)
                        correlate<4>(taps, framed.data, grad.data, taps.offset.data() + k, sum + k);
                    for (; k < taps.count; k++)
                        correlate<1>(taps, framed.data, grad.data, taps.offset.data() + k, sum + k);
                    if (grad_bias) {
                        Lanes total = {};
                        for (int64_t i = 0; i < pixels; i++) total += grad.data[i];
                        sum[taps.count] += total;
                    }
                }
            }
    }
    std::fill(grad_weight, grad_weight + (int64_t)C * K * K, 0.f);  // taps that reach no pixel
    for (int c = 0; c < C; c++) {
        for (int k = 0; k < sums; k++) {
            float total = 0;
            for (int chunk = 0; chunk < chunks; chunk++)
                total += reinterpret_cast<float*>(
                    partial.data + ((int64_t)chunk * groups + c / LANES) * sums + k)[c % LANES];
            if (k < taps.count) grad_weight[(int64_t)c * K * K + taps.index[k]] = total;
            else if (grad_bias) grad_bias[c] = total;
        }
    }
}

// y in inference: the sum of all branches as one convolution by a merged kernel of the first branch's size
// (UniRepLKNet's dilated reparam block), and an activation.
inline void merged_depthwise(const float* x, const Branch* branches, int count, Activation activation, float* y,
                             int B, int C, int H, int W) {
    const int K = branches[0].kernel;
    std::vector<float> weight((int64_t)C * K * K), bias(C);
    for (int n = 0; n < count; n++) {
        const Branch& b = branches[n];
        const int first = K / 2 - b.dilation * (b.kernel / 2);
        for (int c = 0; c < C; c++) {
            const float scale = b.norm.scale(c);
            for (int p = 0; p < b.kernel; p++)
                for (int q = 0; q < b.kernel; q++)
                    weight[((int64_t)c * K + first + p * b.dilation) * K + first + q * b.dilation] +=
                        scale * b.weight[((int64_t)c * b.kernel + p) * b.kernel + q];
            bias[c] += b.norm.shift(c, b.bias);
        }
    }
    depthwise(x, weight.data(), bias.data(), y, B, C, H, W, K, 1, false, false, activation);
}

}  // namespace overlock
