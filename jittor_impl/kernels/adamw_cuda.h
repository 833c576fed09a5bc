// One AdamW step of several parameters on the GPU, as one kernel; arithmetic and numbers as in adamw_cpu.h, arrays of
// type T. Include adamw_cpu.h and cuda_launch.h before it.
#pragma once
#include <cmath>
#include <cstdint>

namespace overlock {

// A kernel takes as many parameters as its arguments have room for, 4 KB, and a compiler patience (optim.py).
constexpr int ADAMW_GROUP = 32, ADAMW_THREADS = 256, ADAMW_BLOCK = 4 * ADAMW_THREADS;

// A parameter, its gradient and moments, and where the new ones go.
template <typename T>
struct AdamWParameter {
    const T *p, *g, *m, *v;
    T *new_p, *new_m, *new_v;
    int64_t size;
};

// Blocks first_block[k] to first_block[k + 1] - 1 are those of parameter k, for ADAMW_BLOCK numbers each.
template <typename T>
struct AdamWGroup {
    AdamWParameter<T> parameters[ADAMW_GROUP];
    int first_block[ADAMW_GROUP + 1];
};

template <typename T>
__global__ void adamw_kernel(AdamWGroup<T> group, AdamWNumbers a) {
    int k = 0;
    while (group.first_block[k + 1] <= (int)blockIdx.x) k++;
    const AdamWParameter<T>& s = group.parameters[k];
    const int64_t start = (int64_t)(blockIdx.x - group.first_block[k]) * ADAMW_BLOCK;
    const int64_t end = start + ADAMW_BLOCK < s.size ? start + ADAMW_BLOCK : s.size;
    for (int64_t i = start + threadIdx.x; i < end; i += ADAMW_THREADS) {
        const float p = (float)s.p[i], g = (float)s.g[i], m = (float)s.m[i], v = (float)s.v[i];
        const float new_m = m + (g - m) * a.gain1, new_v = v * a.beta2 + g * g * a.gain2;
        s.new_m[i] = (T)new_m;
        s.new_v[i] = (T)new_v;
        s.new_p[i] = (T)(p * a.decay - a.step_size * new_m / (sqrtf(new_v) / a.correction + a.eps));
    }
}

// count: at most ADAMW_GROUP.
template <typename T>
void adamw(const AdamWParameter<T>* parameters, int count, const AdamWNumbers& numbers, cudaStream_t stream) {
    AdamWGroup<T> group;
    group.first_block[0] = 0;
    for (int k = 0; k < count; k++) {
        group.parameters[k] = parameters[k];
        group.first_block[k + 1] = group.first_block[k] + blocks_of(parameters[k].size, ADAMW_BLOCK);
    }
    OVERLOCK_LAUNCH(adamw_kernel, group.first_block[count], ADAMW_THREADS, 0, stream, group, numbers);
}

}  // namespace overlock
