// One operation on many arrays on the CPU, as torch._foreach_... has them.
#pragma once
#include <cstdint>

namespace overlock {

// What is read, a and b, and written; an operation without a b or an out has null pointers there.
template <typename T>
struct Arrays {
    const T *a, *b;
    T* out;
    int64_t size;
};

// out = a + weight * (b - a)
inline void lerp(const Arrays<float>* arrays, int count, float weight) {
    for (int k = 0; k < count; k++) {
        const Arrays<float>& s = arrays[k];
        for (int64_t i = 0; i < s.size; i++) s.out[i] = s.a[i] + weight * (s.b[i] - s.a[i]);
    }
}

// out = factor[0] * a
inline void scale(const Arrays<float>* arrays, int count, const float* factor) {
    for (int k = 0; k < count; k++) {
        const Arrays<float>& s = arrays[k];
        for (int64_t i = 0; i < s.size; i++) s.out[i] = s.a[i] * factor[0];
    }
}

// total[0] = the sum of all a²
inline void sum_of_squares(const Arrays<float>* arrays, int count, double* total) {
    total[0] = 0;
    for (int k = 0; k < count; k++) {
        double sum = 0;
        for (int64_t i = 0; i < arrays[k].size; i++) sum += double(arrays[k].a[i]) * arrays[k].a[i];
        total[0] += sum;
    }
}

}  // namespace overlock
