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

// The floats of a vector combined, by halves.
template <typename Combine>
inline float reduce(const Lanes& lanes, Combine combine) {
    float values[LANES];
    store(lanes, values);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int k = 0; k < half; k++) values[k] = combine(values[k], values[k + half]);
    return values[0];
}
inline float sum_of(const Lanes& lanes) {
    return reduce(lanes, [](float a, float b) { return a + b; });
}

// n floats, at most LANES; behind them the vector has `rest`.
inline Lanes load_few(const float* from, int n, float rest = 0) {
#ifdef __AVX512F__
    return _mm512_mask_loadu_ps(_mm512_set1_ps(rest), (1u << n) - 1, from);
#else
    float values[LANES];
    for (int k = 0; k < LANES; k++) values[k] = k < n ? from[k] : rest;
    return load(values);
#endif
}
inline void store_few(const Lanes& lanes, int n, float* to) {
#ifdef __AVX512F__
    _mm512_mask_storeu_ps(to, (1u << n) - 1, lanes);
#else
    float values[LANES];
    store(lanes, values);
    for (int k = 0; k < n; k++) to[k] = values[k];
#endif
}

// Calls visit(k, count) for n floats, a vector of `count` at a time, from k on.
template <typename Visit>
inline void for_vectors(int n, Visit visit) {
    int k = 0;
    for (; k + LANES <= n; k += LANES) visit(k, LANES);
    if (k < n) visit(k, n - k);
}

// n floats, where a call of memmove takes longer than they do.
inline void copy_few(const float* from, int n, float* to) {
    for_vectors(n, [=](int k, int count) { store_few(load_few(from + k, count), count, to + k); });
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

// Four pixels of all lanes, between rows of 4 floats in memory and 4 vectors. A vector's quarters of 4 floats are loaded
// and stored each by itself, so that only the 4x4 transposition within them is left to shuffles.
#if defined(__AVX512F__)
typedef __m512 Quarters;
#define OVERLOCK_QUARTERS(operation) _mm512_##operation##_ps
template <typename Row>
inline Quarters join(int first, Row row) {  // rows first, first + 4, ...
    Quarters joined = _mm512_castps128_ps512(row(first));
    joined = _mm512_mask_broadcast_f32x4(joined, 0x00f0, row(first + 4));
    joined = _mm512_mask_broadcast_f32x4(joined, 0x0f00, row(first + 8));
    return _mm512_mask_broadcast_f32x4(joined, 0xf000, row(first + 12));
}
template <typename Store>
inline void split(Quarters joined, int first, Store store) {
    store(first, _mm512_castps512_ps128(joined));
    store(first + 4, _mm512_extractf32x4_ps(joined, 1));
    store(first + 8, _mm512_extractf32x4_ps(joined, 2));
    store(first + 12, _mm512_extractf32x4_ps(joined, 3));
}
#elif defined(__AVX__)
typedef __m256 Quarters;
#define OVERLOCK_QUARTERS(operation) _mm256_##operation##_ps
template <typename Row>
inline Quarters join(int first, Row row) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(row(first)), row(first + 4), 1);
}
template <typename Store>
inline void split(Quarters joined, int first, Store store) {
    store(first, _mm256_castps256_ps128(joined));
    store(first + 4, _mm256_extractf128_ps(joined, 1));
}
#endif

#ifdef __AVX__
inline void transpose_quarters(Quarters* q) {
    const Quarters a = OVERLOCK_QUARTERS(unpacklo)(q[0], q[1]), b = OVERLOCK_QUARTERS(unpacklo)(q[2], q[3]),
                   c = OVERLOCK_QUARTERS(unpackhi)(q[0], q[1]), d = OVERLOCK_QUARTERS(unpackhi)(q[2], q[3]);
    q[0] = OVERLOCK_QUARTERS(shuffle)(a, b, 0x44);
    q[1] = OVERLOCK_QUARTERS(shuffle)(a, b, 0xee);
    q[2] = OVERLOCK_QUARTERS(shuffle)(c, d, 0x44);
    q[3] = OVERLOCK_QUARTERS(shuffle)(c, d, 0xee);
}

template <bool ALL>
inline void pixels_to_lanes(const float* source, int channels, int64_t pixels, Lanes* target) {
    Quarters q[4];
    for (int r = 0; r < 4; r++)
        q[r] = join(r, [=](int c) {
            return ALL || c < channels ? _mm_loadu_ps(source + c * pixels) : _mm_setzero_ps();
        });
    transpose_quarters(q);
    for (int r = 0; r < 4; r++) target[r] = (Lanes)q[r];
}

template <bool ALL>
inline void pixels_from_lanes(const Lanes* source, int channels, int64_t pixels, float* target) {
    Quarters q[4];
    for (int r = 0; r < 4; r++) q[r] = (Quarters)source[r];
    transpose_quarters(q);
    for (int r = 0; r < 4; r++)
        split(q[r], r, [=](int c, __m128 row) {
            if (ALL || c < channels) _mm_storeu_ps(target + c * pixels, row);
        });
}
#undef OVERLOCK_QUARTERS
#endif

// (channels <= LANES, pixels) -> (pixels, LANES)
inline void to_lanes(const float* source, int channels, int64_t pixels, Lanes* target) {
#ifdef __AVX__
    for (int64_t i = 0; i < pixels && pixels >= 4; i += 4) {
        const int64_t at = std::min(i, pixels - 4);  // the last ones again, where they are no multiple of 4
        if (channels == LANES) pixels_to_lanes<true>(source + at, channels, pixels, target + at);
        else pixels_to_lanes<false>(source + at, channels, pixels, target + at);
    }
    if (pixels >= 4) return;
#endif
    float* out = reinterpret_cast<float*>(target);
    for (int64_t i = 0; i < pixels; i++)
        for (int c = 0; c < LANES; c++) out[i * LANES + c] = c < channels ? source[c * pixels + i] : 0.f;
}

// (pixels, LANES) -> (channels <= LANES, pixels)
inline void from_lanes(const Lanes* source, int channels, int64_t pixels, float* target) {
#ifdef __AVX__
    for (int64_t i = 0; i < pixels && pixels >= 4; i += 4) {
        const int64_t at = std::min(i, pixels - 4);
        if (channels == LANES) pixels_from_lanes<true>(source + at, channels, pixels, target + at);
        else pixels_from_lanes<false>(source + at, channels, pixels, target + at);
    }
    if (pixels >= 4) return;
#endif
    const float* in = reinterpret_cast<const float*>(source);
    for (int64_t i = 0; i < pixels; i++)
        for (int c = 0; c < channels; c++) target[c * pixels + i] = in[i * LANES + c];
}

}  // namespace overlock
