// GRN on the GPU, forward and backward; formulas as in norm_cpu.h. Maps (B, C, P) of type T, P = H*W; gamma and beta of
// type Param; norms (B, C), sums and arithmetic in float32. Include cuda_launch.h and cuda_sum.h before it.
#pragma once
#include <cmath>
#include <cstdint>

namespace overlock {

// The pixels of one map that a thread works on: `lanes` threads share a map, a block has SUM_THREADS / lanes maps.
struct MapPixels {
    int64_t map, first, end;
    int lanes;
    __device__ MapPixels(int64_t maps, int64_t P, int lanes)
        : map((int64_t)blockIdx.x * (SUM_THREADS / lanes) + threadIdx.x / lanes), first(map * P + threadIdx.x % lanes),
          end(map < maps ? (map + 1) * P : 0), lanes(lanes) {}
    __device__ float sum(float value, float* shared) const { return group_sum(value, lanes, 1, shared); }
    __device__ bool writes(int64_t maps) const { return map < maps && threadIdx.x % lanes == 0; }
};

// A large map keeps a whole block busy; of small ones a block takes several.
inline int map_lanes(int64_t P) { return P <= 1024 ? 32 : SUM_THREADS; }

template <typename T>
__global__ void grn_norms_kernel(const T* __restrict__ x, float* __restrict__ norms, int64_t maps, int64_t P,
                                 int lanes) {
    OVERLOCK_SHARED(shared);
    const MapPixels mine(maps, P, lanes);
    float sum = 0;
    for (int64_t i = mine.first; i < mine.end; i += lanes) sum += (float)x[i] * (float)x[i];
    sum = mine.sum(sum, shared);
    if (mine.writes(maps)) norms[mine.map] = sqrtf(sum);
}

// dots (B, C, 2): sums of grad_y * x and of grad_y over each map.
template <typename T>
__global__ void grn_dots_kernel(const T* __restrict__ x, const T* __restrict__ grad_y, float* __restrict__ dots,
                                int64_t maps, int64_t P, int lanes) {
    OVERLOCK_SHARED(shared);
    const MapPixels mine(maps, P, lanes);
    float dot = 0, sum = 0;
    for (int64_t i = mine.first; i < mine.end; i += lanes) {
        dot += (float)grad_y[i] * (float)x[i];
        sum += (float)grad_y[i];
    }
    dot = mine.sum(dot, shared);
    sum = mine.sum(sum, shared);
    if (!mine.writes(maps)) return;
    dots[mine.map * 2] = dot;
    dots[mine.map * 2 + 1] = sum;
}

// A block for each image; images (B, 2): 1 / (mean of the norms + 1e-6), and d loss / d norm through that mean,
// negative, given the dots; without dots 0.
template <typename Param>
__global__ void grn_images_kernel(const float* __restrict__ norms, const float* __restrict__ dots,
                                  const Param* __restrict__ gamma, float* __restrict__ images, int C) {
    OVERLOCK_SHARED(shared);
    const int64_t start = (int64_t)blockIdx.x * C;
    float total = 0, weighted = 0;
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        total += norms[start + c];
        if (dots) weighted += dots[(start + c) * 2] * (float)gamma[c] * norms[start + c];
    }
    total = block_sum(total, shared);
    weighted = block_sum(weighted, shared);
    if (threadIdx.x > 0) return;
    const float inverse = 1 / (total / C + 1e-6f);
    images[blockIdx.x * 2] = inverse;
    images[blockIdx.x * 2 + 1] = weighted * inverse * inverse / C;
}

template <typename T, typename Param>
__global__ void grn_apply_kernel(const T* __restrict__ x, const Param* __restrict__ gamma,
                                 const Param* __restrict__ beta, const float* __restrict__ norms,
                                 const float* __restrict__ images, T* __restrict__ y,
                                 int64_t maps, int C, int64_t P, int lanes) {
    const MapPixels mine(maps, P, lanes);
    if (mine.map >= maps) return;
    const int c = mine.map % C;
    const float scale = (float)gamma[c] * norms[mine.map] * images[mine.map / C * 2] + 1, shift = beta[c];
    for (int64_t i = mine.first; i < mine.end; i += lanes) y[i] = (T)(scale * (float)x[i] + shift);
}

template <typename T, typename Param>
__global__ void grn_grad_x_kernel(const T* __restrict__ x, const Param* __restrict__ gamma,
                                  const float* __restrict__ norms, const float* __restrict__ dots,
                                  const float* __restrict__ images, const T* __restrict__ grad_y,
                                  T* __restrict__ grad_x, int64_t maps, int C, int64_t P, int lanes) {
    const MapPixels mine(maps, P, lanes);
    if (mine.map >= maps) return;
    const float norm = norms[mine.map], inverse = images[mine.map / C * 2], through_mean = images[mine.map / C * 2 + 1];
    const float weight = (float)gamma[mine.map % C] * inverse, scale = weight * norm + 1;
    // d norm / d x = x / norm, 0 at 0.
    const float along = norm > 0 ? (dots[mine.map * 2] * weight - through_mean) / norm : 0;
    for (int64_t i = mine.first; i < mine.end; i += lanes)
        grad_x[i] = (T)(scale * (float)grad_y[i] + along * (float)x[i]);
}

// A thread for each channel.
template <typename Param>
__global__ void grn_grad_parameters_kernel(const float* __restrict__ norms, const float* __restrict__ dots,
                                           const float* __restrict__ images, Param* __restrict__ grad_gamma,
                                           Param* __restrict__ grad_beta, int B, int C) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) return;
    double sum_gamma = 0, sum_beta = 0;
    for (int n = 0; n < B; n++) {
        const int64_t map = (int64_t)n * C + c;
        sum_gamma += dots[map * 2] * norms[map] * images[n * 2];
        sum_beta += dots[map * 2 + 1];
    }
    grad_gamma[c] = (Param)(float)sum_gamma;
    grad_beta[c] = (Param)(float)sum_beta;
}

// images: scratch memory, (B, 2).
template <typename T, typename Param>
void grn(const T* x, const Param* gamma, const Param* beta, T* y, float* norms, float* images,
         int B, int C, int64_t P, cudaStream_t stream) {
    const int64_t maps = (int64_t)B * C;
    const int lanes = map_lanes(P), blocks = blocks_of(maps, SUM_THREADS / lanes);
    const float* no_dots = nullptr;
    OVERLOCK_LAUNCH(grn_norms_kernel, blocks, SUM_THREADS, SUM_BYTES, stream, x, norms, maps, P, lanes);
    OVERLOCK_LAUNCH(grn_images_kernel, B, SUM_THREADS, SUM_BYTES, stream, norms, no_dots, gamma, images, C);
    OVERLOCK_LAUNCH(grn_apply_kernel, blocks, SUM_THREADS, 0, stream, x, gamma, beta, norms, images, y,
                    maps, C, P, lanes);
}

// dots and images: scratch memory, (B, C, 2) and (B, 2).
template <typename T, typename Param>
void grn_backward(const T* x, const Param* gamma, const float* norms, const T* grad_y, T* grad_x, Param* grad_gamma,
                  Param* grad_beta, float* dots, float* images, int B, int C, int64_t P, cudaStream_t stream) {
    const int64_t maps = (int64_t)B * C;
    const int lanes = map_lanes(P), blocks = blocks_of(maps, SUM_THREADS / lanes);
    OVERLOCK_LAUNCH(grn_dots_kernel, blocks, SUM_THREADS, SUM_BYTES, stream, x, grad_y, dots, maps, P, lanes);
    OVERLOCK_LAUNCH(grn_images_kernel, B, SUM_THREADS, SUM_BYTES, stream, norms, dots, gamma, images, C);
    OVERLOCK_LAUNCH(grn_grad_x_kernel, blocks, SUM_THREADS, 0, stream, x, gamma, norms, dots, images, grad_y, grad_x,
                    maps, C, P, lanes);
    OVERLOCK_LAUNCH(grn_grad_parameters_kernel, blocks_of(C, SUM_THREADS), SUM_THREADS, 0, stream, norms, dots, images,
                    grad_gamma, grad_beta, B, C);
}

}  // namespace overlock
