// One operation on many arrays on the CPU, as torch._foreach_... has them.
#pragma once
#include <cstdint>

namespace overlock {

inline void lerp(const float* a, const float* b, float* out, int64_t size, float weight) {
    for (int64_t i = 0; i < size; i++) out[i] = a[i] + weight * (b[i] - a[i]);
}

inline void scale(const float* a, float* out, int64_t size, float factor) {
    for (int64_t i = 0; i < size; i++) out[i] = a[i] * factor;
}

inline double sum_of_squares(const float* a, int64_t size) {
    double sum = 0;
    for (int64_t i = 0; i < size; i++) sum += double(a[i]) * a[i];
    return sum;
}

}  // namespace overlock
