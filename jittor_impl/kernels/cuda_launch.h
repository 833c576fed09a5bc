// How our CUDA sources launch kernels and name their shared memory. Tests define both otherwise and run the kernels on a CPU.
#pragma once

#ifndef OVERLOCK_LAUNCH
#define OVERLOCK_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
    kernel<<<grid, threads, shared_bytes, stream>>>(__VA_ARGS__)
#define OVERLOCK_SHARED(name) extern __shared__ float name[]
#endif
