// na2d_av on the GPU, forward and both gradients; layouts and formulas as in na2d_av_cpu.h, all arrays of one type T.
// Every number is summed by one thread and nothing is added atomically, so that a run can be repeated bit by bit.
// Include neighbourhood.h and cuda_launch.h before it: Jittor follows no relative #include.
#pragma once
#include <algorithm>
#include <cstdint>

namespace overlock {

// For any shape: one thread computes one number, with two loads to a multiply-add.

template <typename T>
__global__ void na2d_av_forward_kernel(const T* __restrict__ attn, const T* __restrict__ value,
                                       T* __restrict__ out, int64_t total, int H, int W, int K, int dim) {
    for (int64_t id = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; id < total;
         id += (int64_t)gridDim.x * blockDim.x) {
        const int d = id % dim;
        const int64_t pixel = id / dim;
        const int j = pixel % W, i = pixel / W % H;
        const int64_t n = pixel / W / H;
        const T* weights = attn + pixel * K * K;
        const T* window = value + ((n * H + window_start(i, H, K)) * W + window_start(j, W, K)) * dim + d;
        float sum = 0;
        for (int p = 0; p < K; p++)
            for (int q = 0; q < K; q++)
                sum += (float)weights[p * K + q] * (float)window[((int64_t)p * W + q) * dim];
        out[id] = (T)sum;
    }
}

template <typename T>
__global__ void na2d_av_grad_attn_kernel(const T* __restrict__ grad_out, const T* __restrict__ value,
                                         T* __restrict__ grad_attn, int64_t total, int H, int W, int K, int dim) {
    for (int64_t id = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; id < total;
         id += (int64_t)gridDim.x * blockDim.x) {
        const int q = id % K, p = id / K % K;
        const int64_t pixel = id / (K * K);
        const int j = pixel % W, i = pixel / W % H;
        const int64_t n = pixel / W / H;
        const int64_t row = n * H + window_start(i, H, K) + p, column = window_start(j, W, K) + q;
        const T* g = grad_out + pixel * dim;
        const T* v = value + (row * W + column) * dim;
        float sum = 0;
        for (int d = 0; d < dim; d++) sum += (float)g[d] * (float)v[d];
        grad_attn[id] = (T)sum;
    }
}

template <typename T>
__global__ void na2d_av_grad_value_kernel(const T* __restrict__ attn, const T* __restrict__ grad_out,
                                          T* __restrict__ grad_value, int64_t total, int H, int W, int K, int dim) {
    for (int64_t id = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; id < total;
         id += (int64_t)gridDim.x * blockDim.x) {
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
                sum += (float)attn[(query * K + p) * K + q] * (float)grad_out[query * dim + d];
            }
        grad_value[id] = (T)sum;
    }
}

// For maps of some size, the forward pass and grad_value in tiles of 8 x 16 pixels. What the tile's pixels read of a
// map is put into shared memory once, some channels at a time: a 7 x 7 window of 49 loads becomes 14 * 22 / 128 = 2.4.
// A thread sums 4 pixels of a row by 4 channels, so that 4 values and 4 weights serve up to 16 multiply-adds.
constexpr int TILE_H = 8, TILE_W = 16, NA2D_STRIP = 4;

// The channels of a thread stand `groups` apart, and pixels channels + 1: threads side by side
// read other banks of shared memory.
struct Tile {
    int64_t n;
    // j to last: the thread's pixels of row i.
    int top, left, bottom, right, i, j, last, first_channel, channel, groups, step;

    __device__ Tile(int H, int W, int channels) : groups(channels / NA2D_STRIP), step(channels + 1) {
        const int tiles_w = (W + TILE_W - 1) / TILE_W, tiles = (H + TILE_H - 1) / TILE_H * tiles_w,
                  strip = threadIdx.x / groups;
        n = blockIdx.x / tiles;
        top = blockIdx.x % tiles / tiles_w * TILE_H;
        left = blockIdx.x % tiles_w * TILE_W;
        bottom = (top + TILE_H < H ? top + TILE_H : H) - 1;
        right = (left + TILE_W < W ? left + TILE_W : W) - 1;
        i = top + strip / (TILE_W / NA2D_STRIP);
        j = left + strip % (TILE_W / NA2D_STRIP) * NA2D_STRIP;
        last = (j + NA2D_STRIP < W ? j + NA2D_STRIP : W) - 1;
        first_channel = blockIdx.y * channels;
        channel = threadIdx.x % groups;
    }

    // Rows x cols of a map (H, W, dim) -> shared memory, (rows, cols, step), with zeros for channels beyond dim.
    template <typename T>
    __device__ void load(const T* map, int W, int dim, Span rows, Span cols, float* shared) const {
        const int channels = groups * NA2D_STRIP;
        for (int k = threadIdx.x; k < rows.count * cols.count * channels; k += blockDim.x) {
            const int pixel = k / channels, c = k % channels, d = first_channel + c;
            const int64_t at = (int64_t)(rows.first + pixel / cols.count) * W + cols.first + pixel % cols.count;
            shared[pixel * step + c] = d < dim ? (float)map[at * dim + d] : 0;
        }
        __syncthreads();
    }

    // sum[t][s]: of pixel j + t and this thread's channel s.
    template <typename T>
    __device__ void store(const float (*sum)[NA2D_STRIP], int H, int W, int dim, T* out) const {
        for (int t = 0; t < NA2D_STRIP && j + t <= right; t++)
            for (int s = 0; s < NA2D_STRIP; s++) {
                const int d = first_channel + channel + s * groups;
                if (d < dim) out[(((n * H + i) * W) + j + t) * dim + d] = (T)sum[t][s];
            }
    }
};

template <typename T>
__global__ void na2d_av_forward_tiled_kernel(const T* __restrict__ attn, const T* __restrict__ value,
                                             T* __restrict__ out, int H, int W, int K, int dim, int channels) {
    OVERLOCK_SHARED(shared);
    const Tile tile(H, W, channels);
    const Span rows = windows_of(tile.top, tile.bottom, H, K), cols = windows_of(tile.left, tile.right, W, K);
    tile.load(value + tile.n * H * W * dim, W, dim, rows, cols, shared);
    if (tile.i > tile.bottom || tile.j > tile.right) return;
    const Span reach = windows_of(tile.j, tile.last, W, K);  // the columns of this thread's pixels
    const int row = window_start(tile.i, H, K);
    const T* weights = attn + ((tile.n * H + tile.i) * W + tile.j) * K * K;
    float sum[NA2D_STRIP][NA2D_STRIP] = {};
    // From the first column to each pixel's window; beyond every column for a pixel that is none.
    int shift[NA2D_STRIP];
    for (int t = 0; t < NA2D_STRIP; t++)
        shift[t] = tile.j + t < W ? window_start(tile.j + t, W, K) - reach.first : reach.count;
    for (int p = 0; p < K; p++)
        for (int x = 0; x < reach.count; x++) {
            const int pixel = (row + p - rows.first) * cols.count + reach.first + x - cols.first;
            const float* v = shared + pixel * tile.step + tile.channel;
            for (int t = 0; t < NA2D_STRIP; t++) {
                const int q = x - shift[t];
                const float w = q >= 0 && q < K ? (float)weights[(t * K + p) * K + q] : 0;
                for (int s = 0; s < NA2D_STRIP; s++) sum[t][s] += w * v[s * tile.groups];
            }
        }
    tile.store(sum, H, W, dim, out);
}

template <typename T>
__global__ void na2d_av_grad_value_tiled_kernel(const T* __restrict__ attn, const T* __restrict__ grad_out,
                                                T* __restrict__ grad_value, int H, int W, int K, int dim,
                                                int channels) {
    OVERLOCK_SHARED(shared);
    const Tile tile(H, W, channels);
    const Span rows = queries_of(tile.top, tile.bottom, H, K), cols = queries_of(tile.left, tile.right, W, K);
    tile.load(grad_out + tile.n * H * W * dim, W, dim, rows, cols, shared);
    if (tile.i > tile.bottom || tile.j > tile.right) return;
    const Span query_rows = queries_of(tile.i, tile.i, H, K), query_cols = queries_of(tile.j, tile.last, W, K);
    float sum[NA2D_STRIP][NA2D_STRIP] = {};
    for (int i = query_rows.first; i < query_rows.first + query_rows.count; i++)
        for (int j = query_cols.first; j < query_cols.first + query_cols.count; j++) {
            const float* g = shared + ((i - rows.first) * cols.count + j - cols.first) * tile.step + tile.channel;
            const int p = tile.i - window_start(i, H, K), q = tile.j - window_start(j, W, K);
            const T* weights = attn + (((tile.n * H + i) * W + j) * K + p) * K;
            for (int t = 0; t < NA2D_STRIP; t++) {
                const float w = q + t >= 0 && q + t < K ? (float)weights[q + t] : 0;
                for (int s = 0; s < NA2D_STRIP; s++) sum[t][s] += w * g[s * tile.groups];
            }
        }
    tile.store(sum, H, W, dim, grad_value);
}

// How the tiled kernels are launched. channels: how many of them go into shared memory at a time, 16, 8 or 4; 0 where
// tiles do not pay: no neighbours to share with, fewer channels than a thread takes, over half of the tiles' pixels
// outside the map, or a window too large for shared memory. `span`: windows_of or queries_of, what a tile reads.
struct Tiling { int channels = 0, threads; size_t shared_bytes; dim3 grid; };

inline Tiling choose_tiling(int64_t N, int H, int W, int K, int dim, Span span(int, int, int, int)) {
    const auto longest = [=](int size, int tile) {
        int longest = 0;
        for (int a = 0; a < size; a += tile)
            longest = std::max(longest, span(a, std::min(a + tile, size) - 1, size, K).count);
        return longest;
    };
    const int64_t tiles = (int64_t)blocks_of(H, TILE_H) * blocks_of(W, TILE_W);
    if (N == 0 || K == 1 || dim < NA2D_STRIP || tiles * TILE_H * TILE_W > 2 * (int64_t)H * W) return {};
    Tiling tiling;
    for (int channels = 16; channels >= NA2D_STRIP; channels /= 2) {
        tiling.shared_bytes = (size_t)longest(H, TILE_H) * longest(W, TILE_W) * (channels + 1) * sizeof(float);
        if (channels >= 2 * dim || tiling.shared_bytes > 48 * 1024) continue;
        tiling.channels = channels;
        tiling.threads = TILE_H * TILE_W / NA2D_STRIP * (channels / NA2D_STRIP);
        tiling.grid = dim3(tiles * N, blocks_of(dim, channels));
        break;
    }
    return tiling;
}

constexpr int THREADS = 256;

inline int blocks_for(int64_t total) {
    return std::min(blocks_of(total, THREADS), 65535);  // the kernels stride over what is left
}

template <typename T>
void na2d_av_forward(const T* attn, const T* value, T* out, int64_t N, int H, int W, int K, int dim,
                     cudaStream_t stream) {
    const Tiling tiling = choose_tiling(N, H, W, K, dim, windows_of);
    const int64_t total = N * H * W * dim;
    if (tiling.channels)
        OVERLOCK_LAUNCH(na2d_av_forward_tiled_kernel, tiling.grid, tiling.threads, tiling.shared_bytes, stream,
                        attn, value, out, H, W, K, dim, tiling.channels);
    else
        OVERLOCK_LAUNCH(na2d_av_forward_kernel, blocks_for(total), THREADS, 0, stream,
                        attn, value, out, total, H, W, K, dim);
}

template <typename T>
void na2d_av_grad_attn(const T* grad_out, const T* value, T* grad_attn, int64_t N, int H, int W, int K, int dim,
                       cudaStream_t stream) {
    const int64_t total = N * H * W * K * K;
    OVERLOCK_LAUNCH(na2d_av_grad_attn_kernel, blocks_for(total), THREADS, 0, stream,
                    grad_out, value, grad_attn, total, H, W, K, dim);
}

template <typename T>
void na2d_av_grad_value(const T* attn, const T* grad_out, T* grad_value, int64_t N, int H, int W, int K, int dim,
                        cudaStream_t stream) {
    const Tiling tiling = choose_tiling(N, H, W, K, dim, queries_of);
    const int64_t total = N * H * W * dim;
    if (tiling.channels)
        OVERLOCK_LAUNCH(na2d_av_grad_value_tiled_kernel, tiling.grid, tiling.threads, tiling.shared_bytes, stream,
                        attn, grad_out, grad_value, H, W, K, dim, tiling.channels);
    else
        OVERLOCK_LAUNCH(na2d_av_grad_value_kernel, blocks_for(total), THREADS, 0, stream,
                        attn, grad_out, grad_value, total, H, W, K, dim);
}

}  // namespace overlock
