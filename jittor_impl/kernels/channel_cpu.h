// What acts on whole channels on the CPU, forward and backward: squeeze-and-excitation, LayerScale, and copies.
// Maps (B, C, P) with P = H*W, contiguous float32. Include activation_cpu.h before it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace overlock {

struct SqueezeExciteSizes {
    int B, C, P, inner;
};

// y = x * gate, gate = sigmoid(w2 * gelu(w1 * mean + b1) + b2), mean of each channel over the map.
// w1 (inner, C), b1 (inner), w2 (C, inner), b2 (C). For the backward pass: mean (B, C), hidden (B, inner), what GELU is
// taken of, and gate (B, C).
inline void squeeze_excite(const float* x, const float* w1, const float* b1, const float* w2, const float* b2, float* y,
                           float* mean, float* hidden, float* gate, const SqueezeExciteSizes& s) {
    #pragma omp parallel for schedule(static)
    for (int n = 0; n < s.B; n++) {
        float *m = mean + (int64_t)n * s.C, *h = hidden + (int64_t)n * s.inner, *g = gate + (int64_t)n * s.C;
        const float* xn = x + (int64_t)n * s.C * s.P;
        float* yn = y + (int64_t)n * s.C * s.P;
        for (int c = 0; c < s.C; c++) {
            float sum = 0;
            for (int i = 0; i < s.P; i++) sum += xn[(int64_t)c * s.P + i];
            m[c] = sum / s.P;
        }
        std::vector<float> active(s.inner);
        for (int j = 0; j < s.inner; j++) {
            float sum = 0;
            for (int c = 0; c < s.C; c++) sum += w1[(int64_t)j * s.C + c] * m[c];
            h[j] = sum + b1[j];
            active[j] = Gelu::value(h[j]);
        }
        for (int c = 0; c < s.C; c++) {
            float sum = 0;
            for (int j = 0; j < s.inner; j++) sum += w2[(int64_t)c * s.inner + j] * active[j];
            const float scale = g[c] = 1 / (1 + exp_of(-(sum + b2[c])));
            for (int i = 0; i < s.P; i++) yn[(int64_t)c * s.P + i] = xn[(int64_t)c * s.P + i] * scale;
        }
    }
}

// Of a linear layer, within a parallel region, by all threads: grad_weight (outs, ins) and grad_bias (outs), from the
// gradient of its output (B, outs) and its input (B, ins).
inline void linear_grad_weight(const float* grad, const float* input, float* grad_weight, float* grad_bias,
                               int B, int outs, int ins) {
    #pragma omp for schedule(static)
    for (int o = 0; o < outs; o++) {
        float* row = grad_weight + (int64_t)o * ins;
        std::fill_n(row, ins, 0.f);
        float sum = 0;
        for (int n = 0; n < B; n++) {
            const float g = grad[(int64_t)n * outs + o];
            sum += g;
            for (int i = 0; i < ins; i++) row[i] += g * input[(int64_t)n * ins + i];
        }
        grad_bias[o] = sum;
    }
}

inline void squeeze_excite_backward(const float* x, const float* w1, const float* w2, const float* mean,
                                    const float* hidden, const float* gate, const float* grad_y, float* grad_x,
                                    float* grad_w1, float* grad_b1, float* grad_w2, float* grad_b2,
                                    const SqueezeExciteSizes& s) {
    // Gradients of what the sigmoid and GELU are taken of, and GELU.
    std::vector<float> grad_z((int64_t)s.B * s.C), grad_h((int64_t)s.B * s.inner), active(grad_h.size());
    #pragma omp parallel
    {
        std::vector<float> grad_mean(s.C), grad_active(s.inner);
        #pragma omp for schedule(static)
        for (int n = 0; n < s.B; n++) {
            const int64_t start = (int64_t)n * s.C * s.P;
            const float *h = hidden + (int64_t)n * s.inner, *g = gate + (int64_t)n * s.C;
            float *gz = grad_z.data() + (int64_t)n * s.C, *gh = grad_h.data() + (int64_t)n * s.inner;
            std::fill(grad_active.begin(), grad_active.end(), 0.f);
            for (int c = 0; c < s.C; c++) {
                float sum = 0;
                for (int64_t i = start + (int64_t)c * s.P, end = i + s.P; i < end; i++) sum += grad_y[i] * x[i];
                gz[c] = sum * g[c] * (1 - g[c]);
                for (int j = 0; j < s.inner; j++) grad_active[j] += gz[c] * w2[(int64_t)c * s.inner + j];
            }
            std::fill(grad_mean.begin(), grad_mean.end(), 0.f);
            for (int j = 0; j < s.inner; j++) {
                active[(int64_t)n * s.inner + j] = Gelu::value(h[j]);
                gh[j] = grad_active[j] * Gelu::derivative(h[j]);
                for (int c = 0; c < s.C; c++) grad_mean[c] += gh[j] * w1[(int64_t)j * s.C + c];
            }
            for (int c = 0; c < s.C; c++) {
                const float scale = g[c], shift = grad_mean[c] / s.P;
                for (int64_t i = start + (int64_t)c * s.P, end = i + s.P; i < end; i++)
                    grad_x[i] = grad_y[i] * scale + shift;
            }
        }
        linear_grad_weight(grad_z.data(), active.data(), grad_w2, grad_b2, s.B, s.C, s.inner);
        linear_grad_weight(grad_h.data(), mean, grad_w1, grad_b1, s.B, s.inner, s.C);
    }
}

// y = x * weight + bias; weight and bias (C).
inline void layer_scale(const float* x, const float* weight, const float* bias, float* y, int B, int C, int64_t P) {
    #pragma omp parallel for schedule(static)
    for (int64_t plane = 0; plane < (int64_t)B * C; plane++) {
        const float scale = weight[plane % C], shift = bias[plane % C];
        for (int64_t i = plane * P; i < (plane + 1) * P; i++) y[i] = x[i] * scale + shift;
    }
}

inline void layer_scale_backward(const float* x, const float* weight, const float* grad_y, float* grad_x,
                                 float* grad_weight, float* grad_bias, int B, int C, int64_t P) {
    #pragma omp parallel for schedule(static)
    for (int c = 0; c < C; c++) {
        const float scale = weight[c];
        double sum_weight = 0, sum_bias = 0;
        for (int n = 0; n < B; n++) {
            const int64_t start = ((int64_t)n * C + c) * P;
            float of_weight = 0, of_bias = 0;
            for (int64_t i = start; i < start + P; i++) {
                of_weight += grad_y[i] * x[i];
                of_bias += grad_y[i];
                grad_x[i] = grad_y[i] * scale;
            }
            sum_weight += of_weight;
            sum_bias += of_bias;
        }
        grad_weight[c] = sum_weight;
        grad_bias[c] = sum_bias;
    }
}

// `count` channels of each of B images of P pixels, from maps of from_channels to maps of to_channels.
inline void copy_channels(const float* from, int from_channels, float* to, int to_channels, int count, int B,
                          int64_t P) {
    #pragma omp parallel for schedule(static)
    for (int n = 0; n < B; n++) std::copy_n(from + n * from_channels * P, count * P, to + n * to_channels * P);
}

}  // namespace overlock
