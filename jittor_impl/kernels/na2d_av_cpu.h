// na2d_av on the CPU, forward and both gradients. Every array is contiguous:
//   attn (N, H, W, K*K), value and out (N, H, W, dim), N = batch * heads.
// Each result is written by one thread, in one order: no atomics, the same bits whatever the thread count.
// Include neighbourhood.h before it: Jittor follows no relative #include.
#pragma once
#include <cstdint>
#include <type_traits>

namespace overlock {

// Channels are worked in blocks that fit vector registers: 16, then 8, 4, 2, 1 of what is left.
template <typename Block>
inline void for_channel_blocks(int dim, Block block) {
    int d = 0;
    for (; d + 16 <= dim; d += 16) block(d, std::integral_constant<int, 16>());
    if (d + 8 <= dim) { block(d, std::integral_constant<int, 8>()); d += 8; }
    if (d + 4 <= dim) { block(d, std::integral_constant<int, 4>()); d += 4; }
    if (d + 2 <= dim) { block(d, std::integral_constant<int, 2>()); d += 2; }
    if (d < dim) block(d, std::integral_constant<int, 1>());
}

inline void na2d_av_forward(const float* attn, const float* value, float* out,
                            int64_t N, int H, int W, int K, int dim) {
    #pragma omp parallel for collapse(2) schedule(static)
    for (int64_t n = 0; n < N; n++)
        for (int i = 0; i < H; i++)
            for (int j = 0; j < W; j++) {
                const int64_t pixel = (n * H + i) * W + j;
                const float* weights = attn + pixel * K * K;
                const int r = window_start(i, H, K), c = window_start(j, W, K);
                const float* window = value + ((n * H + r) * W + c) * dim;
                for_channel_blocks(dim, [&](int d, auto size) {
                    constexpr int D = decltype(size)::value;
                    float sum[D] = {};
                    for (int p = 0; p < K; p++)
                        for (int q = 0; q < K; q++) {
                            const float weight = weights[p * K + q];
                            const float* v = window + ((int64_t)p * W + q) * dim + d;
                            for (int e = 0; e < D; e++) sum[e] += weight * v[e];
                        }
                    for (int e = 0; e < D; e++) out[pixel * dim + d + e] = sum[e];
                });
            }
}

// grad_attn[i, j, p*K + q] = <grad_out[i, j], value[r(i) + p, c(j) + q]>
inline void na2d_av_grad_attn(const float* grad_out, const float* value, float* grad_attn,
                              int64_t N, int H, int W, int K, int dim) {
    #pragma omp parallel for collapse(2) schedule(static)
    for (int64_t n = 0; n < N; n++)
        for (int i = 0; i < H; i++)
            for (int j = 0; j < W; j++) {
                const int64_t pixel = (n * H + i) * W + j;
                const float* g = grad_out + pixel * dim;
                float* grad = grad_attn + pixel * K * K;
                const int r = window_start(i, H, K), c = window_start(j, W, K);
                const float* window = value + ((n * H + r) * W + c) * dim;
                for (int p = 0; p < K; p++)
                    for (int q = 0; q < K; q++) {
                        const float* v = window + ((int64_t)p * W + q) * dim;
                        float sum = 0;
                        for (int e = 0; e < dim; e++) sum += g[e] * v[e];
                        grad[p * K + q] = sum;
                    }
            }
}

// grad_value[y, x] = sum of attn * grad_out over the pixels whose window contains (y, x): a gather, so that
// each thread writes its own pixels only.
inline void na2d_av_grad_value(const float* attn, const float* grad_out, float* grad_value,
                               int64_t N, int H, int W, int K, int dim) {
    #pragma omp parallel for collapse(2) schedule(static)
    for (int64_t n = 0; n < N; n++)
        for (int y = 0; y < H; y++)
            for (int x = 0; x < W; x++) {
                const int last_i = last_query(y, H, K), last_j = last_query(x, W, K);
                for_channel_blocks(dim, [&](int d, auto size) {
                    constexpr int D = decltype(size)::value;
                    float sum[D] = {};
                    for (int i = first_query(y, H, K); i <= last_i; i++)
                        for (int j = first_query(x, W, K); j <= last_j; j++) {
                            const int p = y - window_start(i, H, K), q = x - window_start(j, W, K);
                            const int64_t pixel = (n * H + i) * W + j;
                            const float weight = attn[(pixel * K + p) * K + q];
                            const float* g = grad_out + pixel * dim + d;
                            for (int e = 0; e < D; e++) sum[e] += weight * g[e];
                        }
                    for (int e = 0; e < D; e++) grad_value[((n * H + y) * W + x) * dim + d + e] = sum[e];
                });
            }
}

}  // namespace overlock
