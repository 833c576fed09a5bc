// Linear maps of the rows and the columns of a map (pooling, interpolation) on the CPU, LANES planes at a time.
// Include lanes.h before it.
#pragma once

namespace overlock {

// The entries of a matrix (n, N) that are not 0, row by row: few in those of pooling and interpolation.
struct SparseRows {
    std::vector<int> first, column;  // row i has the entries first[i] to first[i + 1] - 1
    std::vector<float> value;

    // matrix: (N, n) if transposed.
    SparseRows(const float* matrix, int n, int N, bool transposed) : first{0} {
        for (int i = 0; i < n; i++) {
            for (int k = 0; k < N; k++) {
                const float entry = transposed ? matrix[k * n + i] : matrix[i * N + k];
                if (entry == 0) continue;
                column.push_back(k);
                value.push_back(entry);
            }
            first.push_back(column.size());
        }
    }

    // Row i times the vectors x, `step` apart.
    Lanes times(int i, const Lanes* x, int step) const {
        Lanes sum = {};
        for (int e = first[i]; e < first[i + 1]; e++) sum += value[e] * x[column[e] * step];
        return sum;
    }
};

// out (planes, h, w) = rows (h, H) * x (planes, H, W) * cols^T (W, w);
// rows and cols are (H, h) and (W, w) if transposed.
inline void separable(const float* x, const float* rows, const float* cols, float* out,
                      int64_t planes, int H, int W, int h, int w, bool transposed) {
    const SparseRows of_rows(rows, h, H, transposed), of_cols(cols, w, W, transposed);
    #pragma omp parallel
    {
        Scratch image, half, whole;
        image.resize(H * W);
        half.resize(h * W);
        whole.resize(h * w);
        #pragma omp for schedule(static)
        for (int64_t first = 0; first < planes; first += LANES) {
            const int count = std::min<int64_t>(LANES, planes - first);
            to_lanes(x + first * H * W, count, H * W, image.data);
            for (int i = 0; i < h; i++)
                for (int j = 0; j < W; j++) half.data[i * W + j] = of_rows.times(i, image.data + j, W);
            for (int i = 0; i < h; i++)
                for (int j = 0; j < w; j++) whole.data[i * w + j] = of_cols.times(j, half.data + i * W, 1);
            from_lanes(whole.data, count, h * w, out + first * h * w);
        }
    }
}

}  // namespace overlock
