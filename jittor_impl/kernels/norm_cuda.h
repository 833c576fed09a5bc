// BatchNorm and LayerNorm over channels on the GPU, forward and backward. Maps (B, C, P) of type T, P = H*W,
// B*P < 2^31; weights and biases of type Param; statistics, sums and arithmetic in float32, whatever T is.
// Sums over a channel are cut into chunks: a thread sums a few values, a block its threads pairwise (cuda_sum.h), and a
// second kernel the chunks in double. So one channel keeps many blocks busy, no sum has more than some dozens of
// roundings in a row, and the order is one of the shape alone. Means are summed as differences from a value of the same
// channel, so that a mean far from 0 costs no digits; variances about the mean, in a second pass that finds its chunk
// in the cache.
// Include cuda_launch.h and cuda_sum.h before it.
#pragma once
#include <cmath>
#include <cstdint>

namespace overlock {

constexpr int NORM_PIXELS = 32;  // of a block of channel_norm: threads side by side read pixels side by side

// Element e of channel c: the channel's values are counted through the batch, image by image.
__device__ inline int64_t element(unsigned e, int c, int C, unsigned P) {
    return ((int64_t)(e / P) * C + c) * P + e % P;
}

// The elements of this block's chunk; channels are blockIdx.x, chunks blockIdx.y.
struct Chunk {
    unsigned first, end;
    __device__ Chunk(int count, int chunk, int chunks)
        : first((int64_t)count * chunk / chunks), end((int64_t)count * (chunk + 1) / chunks) {}
};

// moments (chunks, C, 2): mean of the chunk and sum of the squares about it.
template <typename T>
__global__ void batch_norm_moments_kernel(const T* __restrict__ x, float* __restrict__ moments,
                                          int C, int P, int count) {
    OVERLOCK_SHARED(shared);
    const int c = blockIdx.x;
    const Chunk chunk(count, blockIdx.y, gridDim.y);
    const float origin = x[element(chunk.first, c, C, P)];
    float sum = 0, squares = 0;
    for (unsigned e = chunk.first + threadIdx.x; e < chunk.end; e += blockDim.x)
        sum += (float)x[element(e, c, C, P)] - origin;
    const float mean = origin + block_sum(sum, shared) / (chunk.end - chunk.first);
    for (unsigned e = chunk.first + threadIdx.x; e < chunk.end; e += blockDim.x) {
        const float centred = (float)x[element(e, c, C, P)] - mean;
        squares += centred * centred;
    }
    squares = block_sum(squares, shared);
    if (threadIdx.x > 0) return;
    float* out = moments + ((int64_t)blockIdx.y * C + c) * 2;
    out[0] = mean;
    out[1] = squares;
}

// A thread for each channel.
__global__ void batch_norm_statistics_kernel(
        const float* __restrict__ moments, const float* __restrict__ running_mean,
        const float* __restrict__ running_var, const int* __restrict__ batches, float* __restrict__ mean,
        float* __restrict__ inv_std, float* __restrict__ new_mean, float* __restrict__ new_var,
        int* __restrict__ new_batches, int C, int count, int chunks, float eps, float momentum) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) return;
    if (c == 0) *new_batches = *batches + 1;
    double m = 0, squares = 0;
    for (int k = 0; k < chunks; k++) {
        const Chunk chunk(count, k, chunks);
        m += (double)(chunk.end - chunk.first) * moments[((int64_t)k * C + c) * 2];
    }
    m /= count;
    for (int k = 0; k < chunks; k++) {
        const Chunk chunk(count, k, chunks);
        const float* of_chunk = moments + ((int64_t)k * C + c) * 2;
        squares += of_chunk[1] + (chunk.end - chunk.first) * (of_chunk[0] - m) * (of_chunk[0] - m);
    }
    mean[c] = m;
    inv_std[c] = 1 / sqrt(squares / count + eps);
    new_mean[c] = running_mean[c] + ((float)m - running_mean[c]) * momentum;
    new_var[c] = running_var[c] + ((float)(squares / (count - 1)) - running_var[c]) * momentum;
}

template <typename T, typename Param>
__global__ void batch_norm_apply_kernel(const T* __restrict__ x, const Param* __restrict__ weight,
                                        const Param* __restrict__ bias, const float* __restrict__ mean,
                                        const float* __restrict__ inv_std, T* __restrict__ y, int C, int P, int count) {
    const int c = blockIdx.x;
    const Chunk chunk(count, blockIdx.y, gridDim.y);
    const float m = mean[c], scale = (float)weight[c] * inv_std[c], shift = bias[c];
    for (unsigned e = chunk.first + threadIdx.x; e < chunk.end; e += blockDim.x) {
        const int64_t i = element(e, c, C, P);
        y[i] = (T)(((float)x[i] - m) * scale + shift);
    }
}

// sums (chunks, C, 2): of grad_y * normalised x and of grad_y.
// Statistics are those of channels or, per_pixel, of pixels.
template <typename T>
__global__ void norm_grad_sums_kernel(const T* __restrict__ x, const T* __restrict__ grad_y,
                                      const float* __restrict__ mean, const float* __restrict__ inv_std,
                                      bool per_pixel, float* __restrict__ sums, int C, int P, int count) {
    OVERLOCK_SHARED(shared);
    const int c = blockIdx.x;
    const Chunk chunk(count, blockIdx.y, gridDim.y);
    float sum_weight = 0, sum_bias = 0;
    for (unsigned e = chunk.first + threadIdx.x; e < chunk.end; e += blockDim.x) {
        const int64_t i = element(e, c, C, P);
        const int64_t of = per_pixel ? (int64_t)e : c;
        const float g = grad_y[i];
        sum_weight += g * (((float)x[i] - mean[of]) * inv_std[of]);
        sum_bias += g;
    }
    sum_weight = block_sum(sum_weight, shared);
    sum_bias = block_sum(sum_bias, shared);
    if (threadIdx.x > 0) return;
    float* out = sums + ((int64_t)blockIdx.y * C + c) * 2;
    out[0] = sum_weight;
    out[1] = sum_bias;
}

// A thread for each channel sums the chunks; the totals, (C, 2), go behind them in float32 too.
template <typename Param>
__global__ void norm_grad_totals_kernel(float* sums, Param* __restrict__ grad_weight, Param* __restrict__ grad_bias,
                                        int C, int chunks) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) return;
    double sum_weight = 0, sum_bias = 0;
    for (int k = 0; k < chunks; k++) {
        sum_weight += sums[((int64_t)k * C + c) * 2];
        sum_bias += sums[((int64_t)k * C + c) * 2 + 1];
    }
    float* totals = sums + ((int64_t)chunks * C + c) * 2;
    totals[0] = sum_weight;
    totals[1] = sum_bias;
    grad_weight[c] = (Param)totals[0];
    grad_bias[c] = (Param)totals[1];
}

template <typename T, typename Param>
__global__ void batch_norm_grad_x_kernel(const T* __restrict__ x, const Param* __restrict__ weight,
                                         const float* __restrict__ mean, const float* __restrict__ inv_std,
                                         const float* __restrict__ totals, const T* __restrict__ grad_y,
                                         T* __restrict__ grad_x, int C, int P, int count) {
    const int c = blockIdx.x;
    const Chunk chunk(count, blockIdx.y, gridDim.y);
    const float m = mean[c], inv = inv_std[c], scale = (float)weight[c] * inv;
    const float gn_mean = totals[c * 2] / count, g_mean = totals[c * 2 + 1] / count;
    for (unsigned e = chunk.first + threadIdx.x; e < chunk.end; e += blockDim.x) {
        const int64_t i = element(e, c, C, P);
        grad_x[i] = (T)(((float)grad_y[i] - g_mean - (((float)x[i] - m) * inv) * gn_mean) * scale);
    }
}

// The pixel and the channels of a thread of channel_norm: NORM_PIXELS pixels to a block,
// whose channels are dealt out in turn.
struct PixelChannels {
    int64_t pixel, start;  // of all; of channel 0 in the map
    int first, step, C;
    __device__ PixelChannels(int channels, int P, int count)
        : pixel((int64_t)blockIdx.x * NORM_PIXELS + threadIdx.x % NORM_PIXELS),
          start(pixel / P * channels * P + pixel % P),
          first(threadIdx.x / NORM_PIXELS), step(SUM_THREADS / NORM_PIXELS), C(pixel < count ? channels : 0) {}
    __device__ float sum(float value, float* shared) const { return group_sum(value, step, NORM_PIXELS, shared); }
};

// mean and inv_std: (B, P).
template <typename T, typename Param>
__global__ void channel_norm_kernel(const T* __restrict__ x, const Param* __restrict__ weight,
                                    const Param* __restrict__ bias, T* __restrict__ y,
                                    float* __restrict__ mean, float* __restrict__ inv_std,
                                    int channels, int P, int count, float eps) {
    OVERLOCK_SHARED(shared);
    const PixelChannels mine(channels, P, count);
    const float origin = mine.C ? (float)x[mine.start] : 0;
    float sum = 0, squares = 0;
    for (int c = mine.first; c < mine.C; c += mine.step) sum += (float)x[mine.start + (int64_t)c * P] - origin;
    const float m = origin + mine.sum(sum, shared) / channels;
    for (int c = mine.first; c < mine.C; c += mine.step) {
        const float centred = (float)x[mine.start + (int64_t)c * P] - m;
        squares += centred * centred;
    }
    const float inv = 1 / sqrtf(mine.sum(squares, shared) / channels + eps);
    for (int c = mine.first; c < mine.C; c += mine.step) {
        const int64_t i = mine.start + (int64_t)c * P;
        y[i] = (T)(((float)x[i] - m) * inv * (float)weight[c] + (float)bias[c]);
    }
    if (mine.C && mine.first == 0) {
        mean[mine.pixel] = m;
        inv_std[mine.pixel] = inv;
    }
}

template <typename T, typename Param>
__global__ void channel_norm_grad_x_kernel(const T* __restrict__ x, const Param* __restrict__ weight,
                                           const float* __restrict__ mean, const float* __restrict__ inv_std,
                                           const T* __restrict__ grad_y, T* __restrict__ grad_x,
                                           int channels, int P, int count) {
    OVERLOCK_SHARED(shared);
    const PixelChannels mine(channels, P, count);
    const float m = mine.C ? mean[mine.pixel] : 0, inv = mine.C ? inv_std[mine.pixel] : 0;
    float g_mean = 0, gn_mean = 0;
    for (int c = mine.first; c < mine.C; c += mine.step) {
        const int64_t i = mine.start + (int64_t)c * P;
        const float g = (float)grad_y[i] * (float)weight[c];
        g_mean += g;
        gn_mean += g * (((float)x[i] - m) * inv);
    }
    g_mean = mine.sum(g_mean, shared) / channels;
    gn_mean = mine.sum(gn_mean, shared) / channels;
    for (int c = mine.first; c < mine.C; c += mine.step) {
        const int64_t i = mine.start + (int64_t)c * P;
        grad_x[i] = (T)(((float)grad_y[i] * (float)weight[c] - g_mean - (((float)x[i] - m) * inv) * gn_mean) * inv);
    }
}

// moments: scratch memory, (chunks, C, 2).
template <typename T, typename Param>
void batch_norm(const T* x, const Param* weight, const Param* bias, const float* running_mean, const float* running_var,
                const int* batches, T* y, float* mean, float* inv_std, float* new_mean, float* new_var,
                int* new_batches, float* moments, int B, int C, int P, float eps, float momentum, int chunks,
                cudaStream_t stream) {
    const int count = B * P;
    const dim3 grid(C, chunks);
    OVERLOCK_LAUNCH(batch_norm_moments_kernel, grid, SUM_THREADS, SUM_BYTES, stream, x, moments, C, P, count);
    OVERLOCK_LAUNCH(batch_norm_statistics_kernel, blocks_of(C, SUM_THREADS), SUM_THREADS, 0, stream,
                    moments, running_mean, running_var, batches, mean, inv_std, new_mean, new_var, new_batches,
                    C, count, chunks, eps, momentum);
    OVERLOCK_LAUNCH(batch_norm_apply_kernel, grid, SUM_THREADS, 0, stream,
                    x, weight, bias, mean, inv_std, y, C, P, count);
}

template <typename T, typename Param>
void norm_grad_parameters(const T* x, const T* grad_y, const float* mean, const float* inv_std, bool per_pixel,
                          float* sums, Param* grad_weight, Param* grad_bias,
                          int C, int P, int count, int chunks, cudaStream_t stream) {
    OVERLOCK_LAUNCH(norm_grad_sums_kernel, dim3(C, chunks), SUM_THREADS, SUM_BYTES, stream,
                    x, grad_y, mean, inv_std, per_pixel, sums, C, P, count);
    OVERLOCK_LAUNCH(norm_grad_totals_kernel, blocks_of(C, SUM_THREADS), SUM_THREADS, 0, stream,
                    sums, grad_weight, grad_bias, C, chunks);
}

// sums: scratch memory, (chunks + 1, C, 2).
template <typename T, typename Param>
void batch_norm_backward(const T* x, const Param* weight, const float* mean, const float* inv_std, const T* grad_y,
                         T* grad_x, Param* grad_weight, Param* grad_bias, float* sums,
                         int B, int C, int P, int chunks, cudaStream_t stream) {
    const int count = B * P;
    norm_grad_parameters(x, grad_y, mean, inv_std, false, sums, grad_weight, grad_bias, C, P, count, chunks, stream);
    OVERLOCK_LAUNCH(batch_norm_grad_x_kernel, dim3(C, chunks), SUM_THREADS, 0, stream, x, weight, mean, inv_std,
                    sums + (int64_t)chunks * C * 2, grad_y, grad_x, C, P, count);
}

template <typename T, typename Param>
void channel_norm(const T* x, const Param* weight, const Param* bias, T* y, float* mean, float* inv_std,
                  int B, int C, int P, float eps, cudaStream_t stream) {
    OVERLOCK_LAUNCH(channel_norm_kernel, blocks_of((int64_t)B * P, NORM_PIXELS), SUM_THREADS, SUM_BYTES, stream,
                    x, weight, bias, y, mean, inv_std, C, P, B * P, eps);
}

// sums: scratch memory, (chunks + 1, C, 2).
template <typename T, typename Param>
void channel_norm_backward(const T* x, const Param* weight, const float* mean, const float* inv_std, const T* grad_y,
                           T* grad_x, Param* grad_weight, Param* grad_bias, float* sums,
                           int B, int C, int P, int chunks, cudaStream_t stream) {
    const int count = B * P;
    norm_grad_parameters(x, grad_y, mean, inv_std, true, sums, grad_weight, grad_bias, C, P, count, chunks, stream);
    OVERLOCK_LAUNCH(channel_norm_grad_x_kernel, blocks_of(count, NORM_PIXELS), SUM_THREADS, SUM_BYTES, stream,
                    x, weight, mean, inv_std, grad_y, grad_x, C, P, count);
}

}  // namespace overlock
