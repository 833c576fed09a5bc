// exp, GELU and SiLU on the CPU, without branches and calls, so that the compiler makes vectors of the loops around them:
// of std::exp and std::erf it computes one value at a time.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace overlock {

enum Activation { IDENTITY, GELU, SILU };

// exp from -87 to 88, below and above as at these ends: 2^t, t = x / log(2), cut at the nearest whole number n. Off by
// (1 + |x|) * 6e-8 of it.
inline float exp_of(float x) {
    const float t = std::min(std::max(x, -87.f), 88.f) * 1.44269504f, n = std::floor(t + 0.5f), r = t - n;
    float p = 1.53533415e-04f;
    p = p * r + 1.33989006e-03f;
    p = p * r + 9.61843761e-03f;
    p = p * r + 5.55033241e-02f;
    p = p * r + 2.40226479e-01f;
    p = p * r + 6.93147203e-01f;
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float power;  // 2^n
    std::memcpy(&power, &bits, sizeof(power));
    return power + power * (r * p);
}

// erf to 2 units in the last place. Polynomials fitted to erf(x) / x - 1 in x² below 1, and to -log(erfc(x)) from 1 to
// 4, beyond which erf is 1 in float32.
inline float erf_of(float x) {
    const float s = x * x, t = std::min(std::abs(x), 4.f);
    float small = 7.8891535e-05f;
    small = small * s - 8.02085297e-04f;
    small = small * s + 5.18953688e-03f;
    small = small * s - 2.68544456e-02f;
    small = small * s + 1.12836002e-01f;
    small = small * s - 3.76126271e-01f;
    small = small * s + 1.28379166e-01f;
    float large = -1.85574434e-04f;
    large = large * t + 2.9396116e-03f;
    large = large * t - 2.18053341e-02f;
    large = large * t + 1.03037407e-01f;
    large = large * t + 6.38225632e-01f;
    large = large * t + 1.12704006e+00f;
    large = large * t + 3.53712305e-04f;
    const float inner = x + x * small, outer = std::copysign(1 - exp_of(-large), x);
    return t < 1 ? inner : outer;
}

struct Identity {
    static float value(float x) { return x; }
    static float derivative(float) { return 1; }
};

struct Gelu {
    static float value(float x) { return 0.5f * x * (1 + erf_of(x * 0.70710678f)); }
    static float derivative(float x) {
        return 0.5f * (1 + erf_of(x * 0.70710678f)) + x * 0.39894228f * exp_of(-0.5f * x * x);
    }
};

struct Silu {
    static float value(float x) { return x / (1 + exp_of(-x)); }
    static float derivative(float x) {
        const float sigmoid = 1 / (1 + exp_of(-x));
        return sigmoid * (1 + x * (1 - sigmoid));
    }
};

// Calls work with one of the structs above.
template <typename Work>
inline void with_activation(int activation, Work work) {
    if (activation == GELU) work(Gelu());
    else if (activation == SILU) work(Silu());
    else work(Identity());
}

inline void activate(Activation activation, float* x, int64_t n) {
    if (activation != IDENTITY)
        with_activation(activation, [&](auto f) {
            for (int64_t i = 0; i < n; i++) x[i] = f.value(x[i]);
        });
}

// Calls work(i) for 0 <= i < n, on all threads, in vectors.
template <typename Work>
inline void for_values(int64_t n, Work work) {
    constexpr int64_t part = 4096;
    #pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < n; first += part) {
        const int64_t end = std::min(n, first + part);
        for (int64_t i = first; i < end; i++) work(i);
    }
}

inline void activation(const float* x, float* y, int64_t n, int activation) {
    with_activation(activation, [=](auto f) { for_values(n, [=](int64_t i) { y[i] = f.value(x[i]); }); });
}

inline void activation_backward(const float* x, const float* grad_y, float* grad_x, int64_t n, int activation) {
    with_activation(activation, [=](auto f) {
        for_values(n, [=](int64_t i) { grad_x[i] = grad_y[i] * f.derivative(x[i]); });
    });
}

}  // namespace overlock
