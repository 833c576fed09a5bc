// One AdamW step of several parameters on the GPU, as one kernel; arithmetic and numbers as in adamw_cpu.h, arrays of
// type T. Include adamw_cpu.h and foreach_cuda.h before it.
#pragma once
#include <cmath>
#include <cstdint>

namespace overlock {

// A parameter, its gradient and moments, and where the new ones go.
template <typename T>
struct AdamWParameter {
    const T *p, *g, *m, *v;
    T *new_p, *new_m, *new_v;
    int64_t size;
};

template <typename T>
__global__ void adamw_kernel(ForeachGroup<AdamWParameter<T>> group, AdamWNumbers a) {
    const ForeachPart<AdamWParameter<T>> part = part_of(group, blockIdx.x);
    const AdamWParameter<T>& s = *part.item;
    for (int64_t i = part.start; i < part.end; i += SUM_THREADS) {
        const float p = (float)s.p[i], g = (float)s.g[i], m = (float)s.m[i], v = (float)s.v[i];
        const float new_m = m + (g - m) * a.gain1, new_v = v * a.beta2 + g * g * a.gain2;
        s.new_m[i] = (T)new_m;
        s.new_v[i] = (T)new_v;
        s.new_p[i] = (T)(p * a.decay - a.step_size * new_m / (sqrtf(new_v) / a.correction + a.eps));
    }
}

// count: at most FOREACH_GROUP.
template <typename T>
void adamw(const AdamWParameter<T>* parameters, int count, const AdamWNumbers& numbers, cudaStream_t stream) {
    const ForeachGroup<AdamWParameter<T>> group = group_of(parameters, count);
    OVERLOCK_LAUNCH(adamw_kernel, group.blocks, SUM_THREADS, 0, stream, group, numbers);
}

}  // namespace overlock
