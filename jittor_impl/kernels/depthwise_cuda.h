// Depthwise convolution on the GPU, forward and both gradients; arguments as in depthwise_cpu.h.
// No atomics: every number is summed by one thread or in one order, so that a run can be repeated bit by bit.
// Include cuda_launch.h before it.
#pragma once
#include <cstdint>

namespace overlock {

constexpr int DEPTHWISE_SIDE = 16, DEPTHWISE_THREADS = DEPTHWISE_SIDE * DEPTHWISE_SIDE;  // a tile of the map, a thread each

// A tile of a map with all pixels that its windows reach, zeros outside the map: (side, side) at `tile`.
__device__ inline void load_tile(const float* map, int H, int W, int top, int left, int side, float* tile) {
    for (int i = threadIdx.x; i < side * side; i += blockDim.x) {
        const int y = top + i / side, x = left + i % side;
        tile[i] = y >= 0 && y < H && x >= 0 && x < W ? map[(int64_t)y * W + x] : 0;
    }
}

// Grid: (tiles, C, B).
__global__ void depthwise_kernel(const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias,
                                 float* __restrict__ y, int C, int H, int W, int K, int dilation, bool residual, bool flip) {
    OVERLOCK_SHARED(shared);
    const int taps = K * K, reach = dilation * (K / 2), side = DEPTHWISE_SIDE + 2 * reach, c = blockIdx.y;
    const int tiles_w = (W + DEPTHWISE_SIDE - 1) / DEPTHWISE_SIDE;
    const int top = blockIdx.x / tiles_w * DEPTHWISE_SIDE, left = blockIdx.x % tiles_w * DEPTHWISE_SIDE;
    const int64_t start = ((int64_t)blockIdx.z * C + c) * H * W;
    float *w = shared, *tile = shared + taps;
    for (int k = threadIdx.x; k < taps; k += blockDim.x) w[k] = weight[(int64_t)c * taps + (flip ? taps - 1 - k : k)];
    load_tile(x + start, H, W, top - reach, left - reach, side, tile);
    __syncthreads();
    const int i = threadIdx.x / DEPTHWISE_SIDE, j = threadIdx.x % DEPTHWISE_SIDE;
    if (top + i >= H || left + j >= W) return;
    float sum = bias ? bias[c] : 0;
    for (int p = 0; p < K; p++)
        for (int q = 0; q < K; q++) sum += w[p * K + q] * tile[(i + p * dilation) * side + j + q * dilation];
    if (residual) sum += tile[(i + reach) * side + j + reach];
    y[start + (int64_t)(top + i) * W + left + j] = sum;
}

// Grid: (C, chunks of the batch). partial (chunks, C, K*K + 1); the last sum is the bias'. Groups of threads share the taps:
// each group sums over every so manieth pixel of a tile, and the groups are summed up in their order.
__global__ void depthwise_grad_weight_kernel(const float* __restrict__ x, const float* __restrict__ grad_y,
                                             float* __restrict__ partial, int B, int C, int H, int W, int K, int dilation) {
    OVERLOCK_SHARED(shared);
    const int sums = K * K + 1, reach = dilation * (K / 2), side = DEPTHWISE_SIDE + 2 * reach, c = blockIdx.x;
    const int groups = sums < (int)blockDim.x ? blockDim.x / sums : 1, group = threadIdx.x / sums;
    const int first = (int64_t)blockIdx.y * B / gridDim.y, end = (int64_t)(blockIdx.y + 1) * B / gridDim.y;
    float *tile = shared, *grad = tile + side * side, *results = grad + DEPTHWISE_THREADS;
    float sum[2] = {0, 0};  // of taps threadIdx.x and, where there are more taps than threads, threadIdx.x + blockDim.x
    for (int n = first; n < end; n++)
        for (int top = 0; top < H; top += DEPTHWISE_SIDE)
            for (int left = 0; left < W; left += DEPTHWISE_SIDE) {
                const int64_t start = ((int64_t)n * C + c) * H * W;
                __syncthreads();
                load_tile(x + start, H, W, top - reach, left - reach, side, tile);
                load_tile(grad_y + start, H, W, top, left, DEPTHWISE_SIDE, grad);
                __syncthreads();
                for (int s = 0; s < 2; s++) {
                    const int tap = groups > 1 ? threadIdx.x % sums : threadIdx.x + s * blockDim.x;
                    if (tap >= sums || (groups > 1 && (group >= groups || s > 0))) continue;
                    const bool is_bias = tap == sums - 1;
                    const int offset = tap / K * dilation * side + tap % K * dilation;
                    for (int p = groups > 1 ? group : 0; p < DEPTHWISE_THREADS; p += groups) {
                        const int at = p / DEPTHWISE_SIDE * side + p % DEPTHWISE_SIDE;
                        sum[s] += grad[p] * (is_bias ? 1 : tile[at + offset]);
                    }
                }
            }
    float* out = partial + ((int64_t)blockIdx.y * C + c) * sums;
    if (groups == 1) {
        for (int s = 0; s < 2; s++)
            if (threadIdx.x + s * blockDim.x < sums) out[threadIdx.x + s * blockDim.x] = sum[s];
        return;
    }
    if (group < groups) results[threadIdx.x] = sum[0];
    __syncthreads();
    if (threadIdx.x >= sums) return;
    float total = 0;
    for (int g = 0; g < groups; g++) total += results[g * sums + threadIdx.x];
    out[threadIdx.x] = total;
}

__global__ void depthwise_sum_kernel(const float* __restrict__ partial, float* __restrict__ grad_weight,
                                     float* __restrict__ grad_bias, int chunks, int C, int taps) {
    const int id = blockIdx.x * blockDim.x + threadIdx.x;
    if (id >= C * (taps + 1)) return;
    float total = 0;
    for (int chunk = 0; chunk < chunks; chunk++) total += partial[(int64_t)chunk * C * (taps + 1) + id];
    const int c = id / (taps + 1), k = id % (taps + 1);
    if (k < taps) grad_weight[(int64_t)c * taps + k] = total;
    else if (grad_bias) grad_bias[c] = total;
}

inline void depthwise(const float* x, const float* weight, const float* bias, float* y, int B, int C, int H, int W, int K,
                      int dilation, bool residual, bool flip, cudaStream_t stream) {
    const int side = DEPTHWISE_SIDE + 2 * dilation * (K / 2);
    const int tiles = ((H + DEPTHWISE_SIDE - 1) / DEPTHWISE_SIDE) * ((W + DEPTHWISE_SIDE - 1) / DEPTHWISE_SIDE);
    const dim3 grid(tiles, C, B);
    OVERLOCK_LAUNCH(depthwise_kernel, grid, DEPTHWISE_THREADS, (K * K + side * side) * sizeof(float), stream,
                    x, weight, bias, y, C, H, W, K, dilation, residual, flip);
}

// partial: scratch memory, (chunks, C, K*K + 1).
inline void depthwise_grad_weight(const float* x, const float* grad_y, float* grad_weight, float* grad_bias, float* partial,
                                  int B, int C, int H, int W, int K, int dilation, int chunks, cudaStream_t stream) {
    const int side = DEPTHWISE_SIDE + 2 * dilation * (K / 2);
    const dim3 grid(C, chunks);
    OVERLOCK_LAUNCH(depthwise_grad_weight_kernel, grid, DEPTHWISE_THREADS,
                    (side * side + 2 * DEPTHWISE_THREADS) * sizeof(float), stream, x, grad_y, partial, B, C, H, W, K, dilation);
    const int sums = C * (K * K + 1);
    OVERLOCK_LAUNCH(depthwise_sum_kernel, (sums + DEPTHWISE_THREADS - 1) / DEPTHWISE_THREADS, DEPTHWISE_THREADS, 0, stream,
                    partial, grad_weight, grad_bias, chunks, C, K * K);
}

}  // namespace overlock
