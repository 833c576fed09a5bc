// Sums over the threads of a block on the GPU, without atomics. Include cuda_launch.h before it.
#pragma once
#include <cstddef>

namespace overlock {

constexpr int SUM_THREADS = 256;  // threads of the blocks that sum, each with a float of shared memory
constexpr size_t SUM_BYTES = SUM_THREADS * sizeof(float);

// The sum of `value` over a group of threads, for each of them. A group is `lanes` threads (a power of 2) that stand
// `stride` apart. Pairs are summed, then pairs of pairs: the order never changes, and the rounding error grows with
// log2(lanes) alone.
// To be called by all threads of the block; `shared` holds a float of each and is free again afterwards.
__device__ inline float group_sum(float value, int lanes, int stride, float* shared) {
    const int lane = threadIdx.x / stride % lanes;
    shared[threadIdx.x] = value;
    __syncthreads();
    for (int half = lanes / 2; half > 0; half /= 2) {
        if (lane < half) shared[threadIdx.x] += shared[threadIdx.x + half * stride];
        __syncthreads();
    }
    const float sum = shared[threadIdx.x - lane * stride];
    __syncthreads();
    return sum;
}

__device__ inline float block_sum(float value, float* shared) { return group_sum(value, SUM_THREADS, 1, shared); }

}  // namespace overlock
