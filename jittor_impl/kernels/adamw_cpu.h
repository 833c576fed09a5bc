// One AdamW step (PyTorch's arithmetic) of several parameters on the CPU.
#pragma once
#include <cmath>
#include <cstdint>

namespace overlock {

struct AdamW {
    float decay, beta1, beta2, step_size, correction, eps;  // decay: 1 - lr * weight_decay; correction: sqrt(1 - beta2^step)
};

inline void adamw(const float* p, const float* g, const float* m, const float* v, float* new_p, float* new_m, float* new_v,
                  int64_t size, const AdamW& a) {
    for (int64_t i = 0; i < size; i++) {
        new_m[i] = m[i] + (g[i] - m[i]) * (1 - a.beta1);
        new_v[i] = v[i] * a.beta2 + g[i] * g[i] * (1 - a.beta2);
        new_p[i] = p[i] * a.decay - a.step_size * new_m[i] / (std::sqrt(new_v[i]) / a.correction + a.eps);
    }
}

}  // namespace overlock
