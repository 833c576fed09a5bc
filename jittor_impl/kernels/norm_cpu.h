// BatchNorm, LayerNorm over channels and GRN on the CPU, forward and backward. Maps (B, C, P) with P = H*W,
// contiguous float32. Variances in two passes; sums within a map in float32 lanes, over maps in double. Include
// activation_cpu.h before it.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

namespace overlock {

// Mean of a channel over batch and map.
template <typename Term>
inline double channel_mean(int B, int C, int64_t P, int c, Term term) {
    double total = 0;
    for (int n = 0; n < B; n++) {
        const int64_t start = ((int64_t)n * C + c) * P;
        float sum = 0;
        for (int64_t i = 0; i < P; i++) sum += term(start + i);
        total += sum;
    }
    return total / ((double)B * P);
}

// y = activation of the normalised x; mean (C), inv_std (C), and the running statistics after this batch (PyTorch:
// running variance unbiased), with the number of batches in them.
inline void batch_norm_activation(const float* x, const float* weight, const float* bias, const float* running_mean,
                                  const float* running_var, const int* batches, float* y, float* mean, float* inv_std,
                                  float* new_mean, float* new_var, int* new_batches, int B, int C, int64_t P, float eps,
                                  float momentum, int activation) {
    const double count = (double)B * P;
    *new_batches = *batches + 1;
    #pragma omp parallel for schedule(static)
    for (int c = 0; c < C; c++) {
        const float m = channel_mean(B, C, P, c, [&](int64_t i) { return x[i]; });
        const double var = channel_mean(B, C, P, c, [&](int64_t i) { return (x[i] - m) * (x[i] - m); });
        const float inv = 1 / std::sqrt(var + eps), scale = weight[c] * inv, shift = bias[c];
        mean[c] = m;
        inv_std[c] = inv;
        new_mean[c] = running_mean[c] + (m - running_mean[c]) * momentum;
        new_var[c] = running_var[c] + ((float)(var * count / (count - 1)) - running_var[c]) * momentum;
        with_activation(activation, [=](auto f) {
            for (int n = 0; n < B; n++) {
                const int64_t start = ((int64_t)n * C + c) * P;
                for (int64_t i = start; i < start + P; i++) y[i] = f.value((x[i] - m) * scale + shift);
            }
        });
    }
}

inline void batch_norm(const float* x, const float* weight, const float* bias, const float* running_mean,
                       const float* running_var, const int* batches, float* y, float* mean, float* inv_std,
                       float* new_mean, float* new_var, int* new_batches, int B, int C, int64_t P, float eps,
                       float momentum) {
    batch_norm_activation(x, weight, bias, running_mean, running_var, batches, y, mean, inv_std, new_mean, new_var,
                          new_batches, B, C, P, eps, momentum, IDENTITY);
}

inline void batch_norm_activation_backward(const float* x, const float* weight, const float* bias, const float* mean,
                                           const float* inv_std, const float* grad_y, float* grad_x, float* grad_weight,
                                           float* grad_bias, int B, int C, int64_t P, int activation) {
    #pragma omp parallel for schedule(static)
    for (int c = 0; c < C; c++) {
        const float m = mean[c], inv = inv_std[c], scale = weight[c] * inv;
        const float* grad = grad_y;  // of what the activation is taken of
        if (activation != IDENTITY) {
            const float shift = bias[c];
            with_activation(activation, [=](auto f) {
                for (int n = 0; n < B; n++) {
                    const int64_t start = ((int64_t)n * C + c) * P;
                    for (int64_t i = start; i < start + P; i++)
                        grad_x[i] = grad_y[i] * f.derivative((x[i] - m) * scale + shift);
                }
            });
            grad = grad_x;
        }
        const double g_mean = channel_mean(B, C, P, c, [&](int64_t i) { return grad[i]; });
        const double gn_mean = channel_mean(B, C, P, c, [&](int64_t i) { return grad[i] * ((x[i] - m) * inv); });
        grad_bias[c] = g_mean * B * P;
        grad_weight[c] = gn_mean * B * P;
        const float g0 = g_mean, g1 = gn_mean;
        for (int n = 0; n < B; n++) {
            const int64_t start = ((int64_t)n * C + c) * P;
            for (int64_t i = start; i < start + P; i++) grad_x[i] = (grad[i] - g0 - ((x[i] - m) * inv) * g1) * scale;
        }
    }
}

inline void batch_norm_backward(const float* x, const float* weight, const float* mean, const float* inv_std,
                                const float* grad_y, float* grad_x, float* grad_weight, float* grad_bias,
                                int B, int C, int64_t P) {
    batch_norm_activation_backward(x, weight, nullptr, mean, inv_std, grad_y, grad_x, grad_weight, grad_bias, B, C, P,
                                   IDENTITY);
}

// LayerNorm of each pixel over its channels. inv_std and mean: (B, P).
inline void channel_norm(const float* x, const float* weight, const float* bias, float* y, float* mean, float* inv_std,
                         int B, int C, int64_t P, float eps) {
    #pragma omp parallel for schedule(static)
    for (int n = 0; n < B; n++) {
        const float* xn = x + (int64_t)n * C * P;
        float *yn = y + (int64_t)n * C * P, *m = mean + n * P, *inv = inv_std + n * P;
        for (int64_t i = 0; i < P; i++) m[i] = inv[i] = 0;
        for (int c = 0; c < C; c++)
            for (int64_t i = 0; i < P; i++) m[i] += xn[c * P + i];
        for (int64_t i = 0; i < P; i++) m[i] /= C;
        for (int c = 0; c < C; c++)
            for (int64_t i = 0; i < P; i++) inv[i] += (xn[c * P + i] - m[i]) * (xn[c * P + i] - m[i]);
        for (int64_t i = 0; i < P; i++) inv[i] = 1 / std::sqrt(inv[i] / C + eps);
        for (int c = 0; c < C; c++)
            for (int64_t i = 0; i < P; i++) yn[c * P + i] = (xn[c * P + i] - m[i]) * inv[i] * weight[c] + bias[c];
    }
}

inline void channel_norm_backward(const float* x, const float* weight, const float* mean, const float* inv_std,
                                  const float* grad_y, float* grad_x, float* grad_weight, float* grad_bias,
                                  int B, int C, int64_t P) {
    std::vector<float> partial((int64_t)B * C * 2);
    #pragma omp parallel for schedule(static)
    for (int n = 0; n < B; n++) {
        const float *xn = x + (int64_t)n * C * P, *gn = grad_y + (int64_t)n * C * P,
                    *m = mean + n * P, *inv = inv_std + n * P;
        float* out = grad_x + (int64_t)n * C * P;
        std::vector<float> g0(P), g1(P);  // means over the channels of g and of g * normalised x
        for (int c = 0; c < C; c++) {
            float sum_weight = 0, sum_bias = 0;
            for (int64_t i = 0; i < P; i++) {
                const float g = gn[c * P + i], normal = (xn[c * P + i] - m[i]) * inv[i];
                g0[i] += g * weight[c];
                g1[i] += g * weight[c] * normal;
                sum_weight += g * normal;
                sum_bias += g;
            }
            partial[((int64_t)n * C + c) * 2] = sum_weight;
            partial[((int64_t)n * C + c) * 2 + 1] = sum_bias;
        }
        for (int64_t i = 0; i < P; i++) { g0[i] /= C; g1[i] /= C; }
        for (int c = 0; c < C; c++)
            for (int64_t i = 0; i < P; i++) {
                const float normal = (xn[c * P + i] - m[i]) * inv[i];
                out[c * P + i] = (gn[c * P + i] * weight[c] - g0[i] - normal * g1[i]) * inv[i];
            }
    }
    for (int c = 0; c < C; c++) {
        double sum_weight = 0, sum_bias = 0;
        for (int n = 0; n < B; n++) {
            sum_weight += partial[((int64_t)n * C + c) * 2];
            sum_bias += partial[((int64_t)n * C + c) * 2 + 1];
        }
        grad_weight[c] = sum_weight;
        grad_bias[c] = sum_bias;
    }
}

// GRN (ConvNeXt V2): y = (gamma * norm / (mean of the norms + 1e-6) + 1) * x + beta; norms (B, C) over the map.
inline void grn(const float* x, const float* gamma, const float* beta, float* y, float* norms,
                int B, int C, int64_t P) {
    #pragma omp parallel for schedule(static)
    for (int n = 0; n < B; n++) {
        const int64_t start = (int64_t)n * C * P;
        double total = 0;
        for (int c = 0; c < C; c++) {
            float sum = 0;
            for (int64_t i = start + c * P; i < start + (c + 1) * P; i++) sum += x[i] * x[i];
            norms[n * C + c] = std::sqrt(sum);
            total += norms[n * C + c];
        }
        const float inv = 1 / (total / C + 1e-6);
        for (int c = 0; c < C; c++) {
            const float scale = gamma[c] * norms[n * C + c] * inv + 1;
            for (int64_t i = start + c * P; i < start + (c + 1) * P; i++) y[i] = scale * x[i] + beta[c];
        }
    }
}

inline void grn_backward(const float* x, const float* gamma, const float* norms, const float* grad_y,
                         float* grad_x, float* grad_gamma, float* grad_beta, int B, int C, int64_t P) {
    std::vector<float> partial((int64_t)B * C * 2);
    #pragma omp parallel for schedule(static)
    for (int n = 0; n < B; n++) {
        const int64_t start = (int64_t)n * C * P;
        const float* norm = norms + (int64_t)n * C;
        double total = 0, weighted = 0;
        for (int c = 0; c < C; c++) total += norm[c];
        const double inv = 1 / (total / C + 1e-6);
        std::vector<float> dot(C);  // <grad_y, x> of each channel
        for (int c = 0; c < C; c++) {
            float sum = 0, sum_beta = 0;
            for (int64_t i = start + c * P; i < start + (c + 1) * P; i++) {
                sum += grad_y[i] * x[i];
                sum_beta += grad_y[i];
            }
            dot[c] = sum;
            partial[((int64_t)n * C + c) * 2] = sum * norm[c] * inv;
            partial[((int64_t)n * C + c) * 2 + 1] = sum_beta;
            weighted += (double)sum * gamma[c] * norm[c];
        }
        for (int c = 0; c < C; c++) {
            // d loss / d norm[c], through its own scale and through the mean; d norm / d x = x / norm, 0 at 0.
            const double grad_norm = dot[c] * gamma[c] * inv - weighted * inv * inv / C;
            const float scale = gamma[c] * norm[c] * inv + 1, along = norm[c] > 0 ? grad_norm / norm[c] : 0;
            for (int64_t i = start + c * P; i < start + (c + 1) * P; i++) grad_x[i] = scale * grad_y[i] + along * x[i];
        }
    }
    for (int c = 0; c < C; c++) {
        double sum_gamma = 0, sum_beta = 0;
        for (int n = 0; n < B; n++) {
            sum_gamma += partial[((int64_t)n * C + c) * 2];
            sum_beta += partial[((int64_t)n * C + c) * 2 + 1];
        }
        grad_gamma[c] = sum_gamma;
        grad_beta[c] = sum_beta;
    }
}

}  // namespace overlock
