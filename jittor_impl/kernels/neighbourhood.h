// Which pixels a neighbourhood contains, along one axis. Shared by the CPU and the CUDA kernels.
//
// The window of pixel i has `kernel` pixels and starts at clamp(i - kernel/2, 0, size - kernel): at the borders
// it is shifted, not clipped, so every pixel has as many neighbours. `kernel` is odd and at most `size`.
#pragma once

#ifdef __CUDACC__
#define OVERLOCK_INLINE __host__ __device__ __forceinline__
#else
#define OVERLOCK_INLINE inline
#endif

namespace overlock {

OVERLOCK_INLINE int window_start(int i, int size, int kernel) {
    int start = i - kernel / 2;
    if (start > size - kernel) start = size - kernel;
    return start < 0 ? 0 : start;
}

// The pixels whose window contains pixel p are consecutive, because window_start never decreases: first to last.
OVERLOCK_INLINE int first_query(int p, int size, int kernel) {
    return p < kernel ? 0 : p - kernel + 1 + kernel / 2;
}

OVERLOCK_INLINE int last_query(int p, int size, int kernel) {
    return p >= size - kernel ? size - 1 : p + kernel / 2;
}

// Pixels first to first + count - 1.
struct Span { int first, count; };

// The pixels in the windows of pixels a to b.
OVERLOCK_INLINE Span windows_of(int a, int b, int size, int kernel) {
    const int first = window_start(a, size, kernel);
    return {first, window_start(b, size, kernel) + kernel - first};
}

// The pixels whose windows contain any of the pixels a to b.
OVERLOCK_INLINE Span queries_of(int a, int b, int size, int kernel) {
    const int first = first_query(a, size, kernel);
    return {first, last_query(b, size, kernel) + 1 - first};
}

}  // namespace overlock
