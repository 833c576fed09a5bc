// na2d_av on the GPU, forward and both gradients; layouts and formulas as in na2d_av_cpu.h.
// One thread computes one number and nothing is added atomically, so that a run can be repeated bit by bit.
// Include neighbourhood.h and cuda_launch.h before it: Jittor follows no relative #include.
#pragma once
#include <cstdint>

namespace overlock {

__global__ void na2d_av_forward_kernel(const float* __restrict__ attn, const float* __restrict__ value,
                                       float* __restrict__ out, int64_t total, int H, int W, int K, int dim) {
    for (int64_t id = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; id < total; id += (int64_t)gridDim.x * blockDim.x) {
        const int d = id % dim;
        const int64_t pixel = id / dim;
        const int j = pixel % W, i = pixel / W % H;
        const int64_t n = pixel / W / H;
        const float* weights = attn + pixel * K * K;
        const float* window = value + ((n * H + window_start(i, H, K)) * W + window_start(j, W, K)) * dim + d;
        float sum = 0;
        for (int p = 0; p < K; p++)
            for (int q = 0; q < K; q++)
                sum += weights[p * K + q] * window[((int64_t)p * W + q) * dim];
        out[id] = sum;
    }
}

__global__ void na2d_av_grad_attn_kernel(const float* __restrict__ grad_out, const float* __restrict__ value,
                                         float* __restrict__ grad_attn, int64_t total, int H, int W, int K, int dim) {
    for (int64_t id = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; id < total; id += (int64_t)gridDim.x * blockDim.x) {
        const int q = id % K, p = id / K % K;
        const int64_t pixel = id / (K * K);
        const int j = pixel % W, i = pixel / W % H;
        const int64_t n = pixel / W / H;
        const int64_t row = n * H + window_start(i, H, K) + p, column = window_start(j, W, K) + q;
        const float* g = grad_out + pixel * dim;
        const float* v = value + (row * W + column) * dim;
        float sum = 0;
        for (int d = 0; d < dim; d++) sum += g[d] * v[d];
        grad_attn[id] = sum;
    }
}

__global__ void na2d_av_grad_value_kernel(const float* __restrict__ attn, const float* __restrict__ grad_out,
                                          float* __restrict__ grad_value, int64_t total, int H, int W, int K, int dim) {
    for (int64_t id = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; id < total; id += (int64_t)gridDim.x * blockDim.x) {
        const int d = id % dim;
        const int64_t pixel = id / dim;
        const int x = pixel % W, y = pixel / W % H;
        const int64_t n = pixel / W / H;
        const int last_i = last_query(y, H, K), last_j = last_query(x, W, K);
        float sum = 0;
        for (int i = first_query(y, H, K); i <= last_i; i++)
            for (int j = first_query(x, W, K); j <= last_j; j++) {
                const int p = y - window_start(i, H, K), q = x - window_start(j, W, K);
                const int64_t query = (n * H + i) * W + j;
                sum += attn[(query * K + p) * K + q] * grad_out[query * dim + d];
            }
        grad_value[id] = sum;
    }
}

constexpr int THREADS = 256;

inline int blocks_for(int64_t total) {
    const int64_t blocks = (total + THREADS - 1) / THREADS;
    // The kernels stride over what is left; an empty batch needs a block too, no grid may be empty.
    return blocks < 1 ? 1 : blocks < 65535 ? (int)blocks : 65535;
}

inline void na2d_av_forward(const float* attn, const float* value, float* out,
                            int64_t N, int H, int W, int K, int dim, cudaStream_t stream) {
    const int64_t total = N * H * W * dim;
    OVERLOCK_LAUNCH(na2d_av_forward_kernel, blocks_for(total), THREADS, 0, stream,
                    attn, value, out, total, H, W, K, dim);
}

inline void na2d_av_grad_attn(const float* grad_out, const float* value, float* grad_attn,
                              int64_t N, int H, int W, int K, int dim, cudaStream_t stream) {
    const int64_t total = N * H * W * K * K;
    OVERLOCK_LAUNCH(na2d_av_grad_attn_kernel, blocks_for(total), THREADS, 0, stream,
                    grad_out, value, grad_attn, total, H, W, K, dim);
}

inline void na2d_av_grad_value(const float* attn, const float* grad_out, float* grad_value,
                               int64_t N, int H, int W, int K, int dim, cudaStream_t stream) {
    const int64_t total = N * H * W * dim;
    OVERLOCK_LAUNCH(na2d_av_grad_value_kernel, blocks_for(total), THREADS, 0, stream,
                    attn, grad_out, grad_value, total, H, W, K, dim);
}

}  // namespace overlock
