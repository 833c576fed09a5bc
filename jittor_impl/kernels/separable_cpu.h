// Linear maps of the rows and the columns of a map (pooling, interpolation) on the CPU.
// Include lanes.h and product.h before it.
#pragma once

namespace overlock {

// out (planes, h, w) = rows (h, H) * x (planes, H, W) * cols^T (W, w);
// rows and cols are (H, h) and (W, w) if transposed.
inline void separable(const float* x, const float* rows, const float* cols, float* out,
                      int64_t planes, int H, int W, int h, int w, bool transposed) {
    const int width = whole_vectors(w);
    std::vector<float> cols_t((int64_t)W * width);  // (W, width)
    if (transposed) pad_rows(cols, w, W, w, cols_t.data());
    else transpose(cols, W, w, W, cols_t.data(), width);
    #pragma omp parallel
    {
        std::vector<float> half((int64_t)H * width), whole((int64_t)h * width);
        #pragma omp for schedule(static)
        for (int64_t n = 0; n < planes; n++) {
            product(x + n * H * W, W, 1, cols_t.data(), width, nullptr, half.data(), width, H, W, width);
            product(rows, transposed ? 1 : H, transposed ? h : 1, half.data(), width, nullptr, whole.data(), width,
                    h, H, width);
            for (int i = 0; i < h; i++) std::copy_n(whole.data() + i * width, w, out + (n * h + i) * w);
        }
    }
}

}  // namespace overlock
