// Linear maps of the rows and the columns of a map (pooling, interpolation) on the GPU; arguments as in
// separable_cpu.h, maps of type T. A thread computes one number. It skips the zeros around the window of its row of
// `rows` and of `cols`, which are all but 2 numbers of an interpolation's. Include cuda_launch.h before it.
#pragma once
#include <cstdint>

namespace overlock {

// The part of n numbers, `stride` apart, that may be other than 0: those from first to end - 1.
__device__ inline void trim_zeros(const float* numbers, int n, int stride, int& first, int& end) {
    for (first = 0; first < n && numbers[(int64_t)first * stride] == 0;) first++;
    for (end = n; end > first && numbers[(int64_t)(end - 1) * stride] == 0;) end--;
}

template <typename T>
__global__ void separable_kernel(const T* __restrict__ x, const float* __restrict__ rows,
                                 const float* __restrict__ cols, T* __restrict__ out,
                                 int64_t total, int H, int W, int h, int w, bool transposed) {
    const int64_t id = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
    if (id >= total) return;
    const int j = id % w, i = id / w % h;
    const int row_stride = transposed ? h : 1, col_stride = transposed ? w : 1;
    const float *row = rows + (transposed ? i : (int64_t)i * H), *col = cols + (transposed ? j : (int64_t)j * W);
    int top, bottom, left, right;
    trim_zeros(row, H, row_stride, top, bottom);
    trim_zeros(col, W, col_stride, left, right);
    const T* plane = x + id / w / h * H * W;
    float sum = 0;
    for (int y = top; y < bottom; y++) {
        float half = 0;
        for (int k = left; k < right; k++) half += (float)plane[(int64_t)y * W + k] * col[(int64_t)k * col_stride];
        sum += row[(int64_t)y * row_stride] * half;
    }
    out[id] = (T)sum;
}

template <typename T>
void separable(const T* x, const float* rows, const float* cols, T* out, int64_t planes, int H, int W, int h, int w,
               bool transposed, cudaStream_t stream) {
    const int64_t total = planes * h * w;
    OVERLOCK_LAUNCH(separable_kernel, blocks_of(total, 256), 256, 0, stream,
                    x, rows, cols, out, total, H, W, h, w, transposed);
}

}  // namespace overlock
