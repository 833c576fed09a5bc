// How our CUDA sources launch kernels and name their shared memory. Tests define both otherwise and run the kernels on
// a CPU. Kernels are templates of the type T of the maps: float, half or bfloat16. They convert each number as they
// read and write it; shared memory, sums and all arithmetic are float32.
#pragma once
#include <cstdint>

#ifndef OVERLOCK_LAUNCH
#include <stdexcept>
#include <string>

namespace overlock {

// A kernel that does not start leaves its outputs as they are and stops nothing; Jittor reports what is thrown.
inline void check_launch(const char* kernel) {
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("CUDA kernel ") + kernel + " did not start: " + cudaGetErrorString(error));
}

}  // namespace overlock

#define OVERLOCK_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...)    \
    do {                                                                     \
        kernel<<<grid, threads, shared_bytes, stream>>>(__VA_ARGS__);        \
        overlock::check_launch(#kernel);                                     \
    } while (0)
#define OVERLOCK_SHARED(name) extern __shared__ float name[]
#endif

namespace overlock {

// Blocks for `total` items, so many to a block; one if there is none, since no grid may be empty.
inline int blocks_of(int64_t total, int per_block) {
    return total < 1 ? 1 : (int)((total + per_block - 1) / per_block);
}

}  // namespace overlock
