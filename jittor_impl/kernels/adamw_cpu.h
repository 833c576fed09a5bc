// One AdamW step (PyTorch's arithmetic) of several parameters on the CPU.
#pragma once
#include <cmath>
#include <cstdint>

namespace overlock {

// decay: 1 - lr * weight_decay; gain1, gain2: 1 - beta1 and 1 - beta2, which would lose digits if taken in float32;
// correction: sqrt(1 - beta2^step).
struct AdamWNumbers {
    float decay, gain1, beta2, gain2, step_size, correction, eps;
};

inline void adamw(const float* p, const float* g, const float* m, const float* v, float* new_p, float* new_m,
                  float* new_v, int64_t size, const AdamWNumbers& a) {
    #pragma omp parallel for schedule(static) if (size > 1 << 14)
    for (int64_t i = 0; i < size; i++) {
        new_m[i] = m[i] + (g[i] - m[i]) * a.gain1;
        new_v[i] = v[i] * a.beta2 + g[i] * g[i] * a.gain2;
        new_p[i] = p[i] * a.decay - a.step_size * new_m[i] / (std::sqrt(new_v[i]) / a.correction + a.eps);
    }
}

}  // namespace overlock
