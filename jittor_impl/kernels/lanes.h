// Vectors of the processor's width: 16 floats with AVX-512, else 8. LANES channels of maps, (LANES, H*W) in memory, are
// worked on as (H*W, LANES): one register holds one pixel, whatever the map's size. A last group of fewer channels is
// filled with zeros.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX__
#include <immintrin.h>
#endif

namespace overlock {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4 * LANES), may_alias));

typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline Lanes load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(Lanes lanes, float* to) { *reinterpret_cast<Unaligned*>(to) = lanes; }

inline void keep_in_register(Lanes& lanes) {
#ifdef __AVX512F__
    asm("" : "+v"(lanes));
#endif
}

// term(0) + ... + term(n - 1), in eight sums side by side: an addition takes as long as the processor begins eight.
template <typename Term>
inline Lanes sum_of(int64_t n, Term term) {
    Lanes sum[8] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int k = 0; k < 8; k++) sum[k] += term(i + k);
    for (; i < n; i++) sum[0] += term(i);
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

// Scratch memory of whole vectors.
struct Scratch {
    std::vector<float> storage;
    Lanes* data = nullptr;
    void resize(int64_t vectors) {
        storage.assign(vectors * LANES + LANES, 0.f);
        const uintptr_t address = reinterpret_cast<uintptr_t>(storage.data()), last = sizeof(Lanes) - 1;
        data = reinterpret_cast<Lanes*>((address + last) & ~last);
    }
};

// (8, 8) at `source`, rows `source_stride` apart -> its transpose at `target`, rows `target_stride` apart.
inline void transpose8(const float* source, int64_t source_stride, float* target, int64_t target_stride) {
#ifdef __AVX__
    __m256 r[8], s[8];
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(source + i * source_stride);
    for (int i = 0; i < 8; i += 2) {
        s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int k = 0; k < 2; k++) {
            r[i + 2 * k] = _mm256_shuffle_ps(s[i + k], s[i + k + 2], 0x44);
            r[i + 2 * k + 1] = _mm256_shuffle_ps(s[i + k], s[i + k + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(target + i * target_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(target + (i + 4) * target_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
#else
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++) target[j * target_stride + i] = source[i * source_stride + j];
#endif
}

// (channels <= LANES, pixels) -> (pixels, LANES)
inline void to_lanes(const float* source, int channels, int64_t pixels, Lanes* target) {
    for (int c = 0; c < LANES; c += 8) {
        float* out = reinterpret_cast<float*>(target) + c;
        const float* in = source + c * pixels;
        int64_t i = 0;
        if (c + 8 <= channels)
            for (; i + 8 <= pixels; i += 8) transpose8(in + i, pixels, out + i * LANES, LANES);
        for (; i < pixels; i++)
            for (int e = 0; e < 8; e++) out[i * LANES + e] = c + e < channels ? in[e * pixels + i] : 0.f;
    }
}

// (pixels, LANES) -> (channels <= LANES, pixels)
inline void from_lanes(const Lanes* source, int channels, int64_t pixels, float* target) {
    for (int c = 0; c < channels; c += 8) {
        const float* in = reinterpret_cast<const float*>(source) + c;
        float* out = target + c * pixels;
        int64_t i = 0;
        if (c + 8 <= channels)
            for (; i + 8 <= pixels; i += 8) transpose8(in + i * LANES, LANES, out + i, pixels);
        for (; i < pixels; i++)
            for (int e = 0; e < std::min(8, channels - c); e++) out[e * pixels + i] = in[i * LANES + e];
    }
}

}  // namespace overlock
