// Eight channels side by side. A group of 8 channels of an image, (8, H*W) in memory, is worked on as (H*W, 8):
// one vector register holds one pixel, whatever the map's size. A last group of fewer channels is filled with zeros.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX__
#include <immintrin.h>
#endif

namespace overlock {

constexpr int LANES = 8;
typedef float Lanes __attribute__((vector_size(32), aligned(32), may_alias));

// Scratch memory of whole vectors.
struct Scratch {
    std::vector<float> storage;
    Lanes* data = nullptr;
    void resize(int64_t vectors) {
        storage.assign(vectors * LANES + LANES, 0.f);
        const uintptr_t address = reinterpret_cast<uintptr_t>(storage.data());
        data = reinterpret_cast<Lanes*>((address + 31) & ~uintptr_t(31));
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

// (channels <= 8, pixels) -> (pixels, 8)
inline void to_lanes(const float* source, int channels, int64_t pixels, Lanes* target) {
    float* out = reinterpret_cast<float*>(target);
    int64_t i = 0;
    if (channels == LANES)
        for (; i + LANES <= pixels; i += LANES) transpose8(source + i, pixels, out + i * LANES, LANES);
    for (; i < pixels; i++)
        for (int c = 0; c < LANES; c++) out[i * LANES + c] = c < channels ? source[c * pixels + i] : 0.f;
}

// (pixels, 8) -> (channels <= 8, pixels)
inline void from_lanes(const Lanes* source, int channels, int64_t pixels, float* target) {
    const float* in = reinterpret_cast<const float*>(source);
    int64_t i = 0;
    if (channels == LANES)
        for (; i + LANES <= pixels; i += LANES) transpose8(in + i * LANES, LANES, target + i, pixels);
    for (; i < pixels; i++)
        for (int c = 0; c < channels; c++) target[c * pixels + i] = in[i * LANES + c];
}

}  // namespace overlock
