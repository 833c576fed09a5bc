// Depthwise convolution on the GPU, forward and both gradients; arguments as in depthwise_cpu.h, all of one type T.
// No atomics: every number is summed by one thread or in one order, so that a run can be repeated bit by bit.
// A thread computes a strip of 4 numbers: 4 pixels of a row, or the gradients of 4 taps of a row, so that what it loads
// from shared memory serves several multiply-adds. Undilated, neighbours share all but one value: 2 loads to 4
// multiply-adds forward, 11 to 16 for the taps, where a number to a thread takes 2 to each.
// Include cuda_launch.h before it.
#pragma once
#include <algorithm>
#include <cstdint>

namespace overlock {

constexpr int DEPTHWISE_SIDE = 16, DEPTHWISE_PIXELS = DEPTHWISE_SIDE * DEPTHWISE_SIDE;  // a tile of the map
constexpr int STRIP = 4, TAP_THREADS = 256;

// A tile of a map with all pixels that its windows reach, zeros outside the map: (side, side) at `tile`.
template <typename T>
__device__ void load_tile(const T* map, int H, int W, int top, int left, int side, float* tile) {
    for (int i = threadIdx.x; i < side * side; i += blockDim.x) {
        const int y = top + i / side, x = left + i % side;
        tile[i] = y >= 0 && y < H && x >= 0 && x < W ? (float)map[(int64_t)y * W + x] : 0;
    }
}

// Grid: (tiles, C, B); a thread for each strip of a tile.
template <typename T>
__global__ void depthwise_kernel(const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias,
                                 T* __restrict__ y, int C, int H, int W, int K, int dilation,
                                 bool residual, bool flip) {
    OVERLOCK_SHARED(shared);
    const int taps = K * K, reach = dilation * (K / 2), side = DEPTHWISE_SIDE + 2 * reach, c = blockIdx.y;
    const int tiles_w = (W + DEPTHWISE_SIDE - 1) / DEPTHWISE_SIDE;
    const int top = blockIdx.x / tiles_w * DEPTHWISE_SIDE, left = blockIdx.x % tiles_w * DEPTHWISE_SIDE;
    const int64_t start = ((int64_t)blockIdx.z * C + c) * H * W;
    float *w = shared, *tile = shared + taps;
    for (int k = threadIdx.x; k < taps; k += blockDim.x)
        w[k] = (float)weight[(int64_t)c * taps + (flip ? taps - 1 - k : k)];
    load_tile(x + start, H, W, top - reach, left - reach, side, tile);
    __syncthreads();
    const int i = threadIdx.x / (DEPTHWISE_SIDE / STRIP), j = threadIdx.x % (DEPTHWISE_SIDE / STRIP) * STRIP;
    float sum[STRIP], value[STRIP];
    for (int s = 0; s < STRIP; s++) sum[s] = bias ? (float)bias[c] : 0;
    for (int p = 0; p < K; p++) {
        const float* row = tile + (i + p * dilation) * side + j;
        for (int s = 0; s < STRIP; s++) value[s] = row[s];
        for (int q = 0; q < K; q++) {
            for (int s = 0; s < STRIP; s++) sum[s] += w[p * K + q] * value[s];
            if (q + 1 == K) break;
            for (int s = 0; s < STRIP; s++)
                value[s] = dilation == 1 && s + 1 < STRIP ? value[s + 1] : row[(q + 1) * dilation + s];
        }
    }
    for (int s = 0; s < STRIP && top + i < H && left + j + s < W; s++) {
        if (residual) sum[s] += tile[(i + reach) * side + j + s + reach];
        y[start + (int64_t)(top + i) * W + left + j + s] = (T)sum[s];
    }
}

// Grid: (C, chunks of the batch). partial (chunks, C, K*K + 1); the last sum is the bias'. As many groups of threads as
// fit share the pixels: each takes every so manieth strip of 4 pixels of a tile, and the groups are summed up in their
// order. The last strip of a row of taps may have taps beyond the kernel: they read what lies behind, within shared
// memory, and are dropped.
template <typename T>
__global__ void depthwise_grad_weight_kernel(const T* __restrict__ x, const T* __restrict__ grad_y,
                                             float* __restrict__ partial,
                                             int B, int C, int H, int W, int K, int dilation) {
    OVERLOCK_SHARED(shared);
    const int sums = K * K + 1, reach = dilation * (K / 2), side = DEPTHWISE_SIDE + 2 * reach, c = blockIdx.x;
    // The strips that the taps make, and one more thread, which sums the bias' gradient.
    const int per_row = (K + STRIP - 1) / STRIP, strips = K * per_row, groups = TAP_THREADS / (strips + 1);
    const int group = threadIdx.x / (strips + 1), strip = threadIdx.x % (strips + 1),
              p = strip / per_row, q = strip % per_row * STRIP;
    const int first = (int64_t)blockIdx.y * B / gridDim.y, end = (int64_t)(blockIdx.y + 1) * B / gridDim.y;
    float *tile = shared, *grad = tile + side * side;
    float sum[STRIP] = {0};
    for (int n = first; n < end; n++)
        for (int top = 0; top < H; top += DEPTHWISE_SIDE)
            for (int left = 0; left < W; left += DEPTHWISE_SIDE) {
                const int64_t start = ((int64_t)n * C + c) * H * W;
                __syncthreads();
                load_tile(x + start, H, W, top - reach, left - reach, side, tile);
                load_tile(grad_y + start, H, W, top, left, DEPTHWISE_SIDE, grad);
                __syncthreads();
                for (int pixel = group * STRIP; group < groups && pixel < DEPTHWISE_PIXELS; pixel += groups * STRIP) {
                    const int i = pixel / DEPTHWISE_SIDE, j = pixel % DEPTHWISE_SIDE;
                    const float *g = grad + pixel, *row = tile + (i + p * dilation) * side + j;
                    if (strip == strips) {
                        for (int t = 0; t < STRIP; t++) sum[0] += g[t];
                    } else if (dilation == 1) {
                        float value[2 * STRIP - 1];
                        for (int t = 0; t < 2 * STRIP - 1; t++) value[t] = row[q + t];
                        for (int t = 0; t < STRIP; t++)
                            for (int s = 0; s < STRIP; s++) sum[s] += g[t] * value[s + t];
                    } else {
                        for (int t = 0; t < STRIP; t++)
                            for (int s = 0; s < STRIP; s++) sum[s] += g[t] * row[(q + s) * dilation + t];
                    }
                }
            }
    __syncthreads();
    float* results = shared;  // (groups, strips + 1, STRIP), where the tiles were
    for (int s = 0; s < STRIP && group < groups; s++) results[threadIdx.x * STRIP + s] = sum[s];
    __syncthreads();
    for (int k = threadIdx.x; k < sums; k += blockDim.x) {
        const int at = k == K * K ? strips * STRIP : (k / K * per_row + k % K / STRIP) * STRIP + k % K % STRIP;
        float total = 0;
        for (int g = 0; g < groups; g++) total += results[g * (strips + 1) * STRIP + at];
        partial[((int64_t)blockIdx.y * C + c) * sums + k] = total;
    }
}

template <typename T>
__global__ void depthwise_sum_kernel(const float* __restrict__ partial, T* __restrict__ grad_weight,
                                     T* __restrict__ grad_bias, int chunks, int C, int taps) {
    const int id = blockIdx.x * blockDim.x + threadIdx.x;
    if (id >= C * (taps + 1)) return;
    float total = 0;
    for (int chunk = 0; chunk < chunks; chunk++) total += partial[(int64_t)chunk * C * (taps + 1) + id];
    const int c = id / (taps + 1), k = id % (taps + 1);
    if (k < taps) grad_weight[(int64_t)c * taps + k] = (T)total;
    else if (grad_bias) grad_bias[c] = (T)total;
}

// bias: null for none. flip: with the kernel turned by 180 degrees, the gradient with respect to x, given that of y.
template <typename T>
void depthwise_pass(const T* x, const T* weight, const T* bias, T* y, int B, int C, int H, int W, int K, int dilation,
                    bool residual, bool flip, cudaStream_t stream) {
    const int side = DEPTHWISE_SIDE + 2 * dilation * (K / 2);
    const int tiles = blocks_of(H, DEPTHWISE_SIDE) * blocks_of(W, DEPTHWISE_SIDE);
    const dim3 grid(tiles, C, B);
    OVERLOCK_LAUNCH(depthwise_kernel, grid, DEPTHWISE_PIXELS / STRIP, (K * K + side * side) * sizeof(float), stream,
                    x, weight, bias, y, C, H, W, K, dilation, residual, flip);
}

template <typename T>
void depthwise(const T* x, const T* weight, const T* bias, T* y, int B, int C, int H, int W, int K, int dilation,
               bool residual, cudaStream_t stream) {
    depthwise_pass(x, weight, bias, y, B, C, H, W, K, dilation, residual, false, stream);
}

// grad_bias: null for none. partial: scratch memory, (chunks, C, K*K + 1).
template <typename T>
void depthwise_gradients(const T* x, const T* weight, const T* grad_y, T* grad_x, T* grad_weight, T* grad_bias,
                         float* partial, int B, int C, int H, int W, int K, int dilation, bool residual, int chunks,
                         cudaStream_t stream) {
    depthwise_pass(grad_y, weight, (const T*)nullptr, grad_x, B, C, H, W, K, dilation, residual, true, stream);
    const int side = DEPTHWISE_SIDE + 2 * dilation * (K / 2), tiles = side * side + DEPTHWISE_PIXELS;
    const size_t bytes = std::max(tiles, TAP_THREADS * STRIP) * sizeof(float);
    const dim3 grid(C, chunks);
    OVERLOCK_LAUNCH(depthwise_grad_weight_kernel, grid, TAP_THREADS, bytes, stream,
                    x, grad_y, partial, B, C, H, W, K, dilation);
    OVERLOCK_LAUNCH(depthwise_sum_kernel, blocks_of(C * (K * K + 1), TAP_THREADS), TAP_THREADS, 0, stream,
                    partial, grad_weight, grad_bias, chunks, C, K * K);
}

}  // namespace overlock
