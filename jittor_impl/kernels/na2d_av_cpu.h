// na2d_av on the CPU, forward and both gradients. Every array is contiguous:
//   attn (N, H, W, K*K), value and out (N, H, W, dim), N = batch * heads.
// Each result is written by one thread, in one order: no atomics, the same bits whatever the thread count.
// Include neighbourhood.h, lanes.h and product.h before it: Jittor follows no relative #include.
#pragma once

namespace overlock {

// One head's map. Six pixels are worked on at a time. In a larger map they are of one row: their windows together are up
// to K + 5 columns wide, and their weights, laid out over that width with zeros elsewhere, make six rows of a product.
struct Windows {
    int H, W, K;
    int64_t attn_step;  // from the weights of one pixel to those of the next

    int first_row(int i) const { return window_start(i, H, K); }
    int first_col(int j) const { return window_start(j, W, K); }

    // Whether the map is so small that the weights of all windows are one matrix (H*W, H*W), with zeros outside of
    // them: more products, but none has to be looked for. Then the functions below take all rows at once, as row 0.
    bool dense() const { return H * W <= 256; }
    bool whole() const { return K == H && K == W; }  // each window is the map, and `attn` that matrix
    int rows() const { return dense() ? 1 : H; }
    int pixels_of_row() const { return dense() ? H * W : W; }

    // The K rows of a window, from one memory to another, in which they are so far apart.
    void copy_window(const float* from, int from_step, float* to, int to_step) const {
        if (from_step == K && to_step == K) std::copy_n(from, K * K, to);
        else
            for (int p = 0; p < K; p++) copy_few(from + p * from_step, K, to + p * to_step);
    }

    struct Matrix {
        const float* data;
        int64_t step;
    };

    // That matrix. `scratch` has zeros outside of the windows, from the start or from the last call.
    Matrix matrix(const float* attn, float* scratch) const {
        if (whole()) return {attn, attn_step};
        for (int i = 0; i < H; i++)
            for (int j = 0; j < W; j++, attn += attn_step) {
                float* row = scratch + ((int64_t)i * W + j) * H * W;
                copy_window(attn, K, row + first_row(i) * W + first_col(j), W);
            }
        return {scratch, H * W};
    }

    // Calls visit(r, n, first, count) for pixels r to r + n - 1 and the `count` pixels from `first` on that belong to
    // them: of(a, b) are the rows of the map that do to rows a to b.
    template <typename Rows, typename Visit>
    void for_tiles(Rows of, Visit visit) const {
        for (int r = 0; r < H * W; r += TILE_ROWS) {
            const int n = std::min(TILE_ROWS, H * W - r);
            const Span rows = of(r / W, (r + n - 1) / W);
            visit(r, n, rows.first * W, rows.count * W);
        }
    }
    auto window_rows() const {
        return [this](int a, int b) { return windows_of(a, b, H, K); };
    }
    auto query_rows() const {
        return [this](int a, int b) { return queries_of(a, b, H, K); };
    }

    // Row i of the output, (W, width), from value (H, W, width); width: channels, in whole vectors.
    void forward(int i, const float* attn, const float* value, float* out, int width, float* scratch) const {
        if (dense()) {
            const Matrix m = matrix(attn, scratch);
            return for_tiles(window_rows(), [=](int r, int n, int first, int count) {
                product(m.data + r * m.step + first, m.step, 1, value + (int64_t)first * width, width, nullptr,
                        out + (int64_t)r * width, width, n, count, width);
            });
        }
        const int row = first_row(i);
        for (int j = 0; j < W; j += TILE_ROWS) {
            const int n = std::min(TILE_ROWS, W - j), left = first_col(j), span = first_col(j + n - 1) + K - left;
            const float* weights = attn + ((int64_t)i * W + j) * attn_step;
            if (span > K || n < TILE_ROWS) {
                std::fill(scratch, scratch + TILE_ROWS * K * span, 0.f);
                for (int t = 0; t < n; t++)
                    copy_window(weights + t * attn_step, K, scratch + t * K * span + first_col(j + t) - left, span);
                weights = scratch;
            }
            const int64_t step = weights == scratch ? K * span : attn_step;
            int c = 0;
            for (; c + 2 * LANES <= width; c += 2 * LANES)
                forward_tile<2>(weights, step, span, value + ((int64_t)row * W + left) * width + c,
                                out + (int64_t)j * width + c, width, n);
            if (c < width)
                forward_tile<1>(weights, step, span, value + ((int64_t)row * W + left) * width + c,
                                out + (int64_t)j * width + c, width, n);
        }
    }

    template <int V>
    void forward_tile(const float* weights, int64_t step, int span, const float* value, float* out, int width,
                      int n) const {
        Lanes sum[TILE_ROWS][V] = {};
        for (int p = 0; p < K; p++)
            add_products<TILE_ROWS, V>(weights + p * span, step, 1, value + (int64_t)p * W * width, width, LANES,
                                       span, sum);
        for (int t = 0; t < n; t++)
            for (int v = 0; v < V; v++) store(sum[t][v], out + t * width + v * LANES);
    }

    // Row i of grad_attn: grad_attn[i, j, p*K + q] = <grad_out[i, j], value[r(i) + p, c(j) + q]>.
    // grad_out (H, W, width), value_t (dim, H*W + padding), rows value_step apart.
    void grad_attn(int i, const float* grad_out, const float* value_t, int64_t value_step, float* grad, int width,
                   int dim, float* scratch) const {
        if (dense())
            return for_tiles(window_rows(), [=](int r, int n, int first, int count) {
                const int step = whole_vectors(count);
                product(grad_out + (int64_t)r * width, width, 1, value_t + first, value_step, nullptr, scratch, step, n,
                        dim, step);
                for (int t = 0; t < n; t++) {
                    const int i = (r + t) / W, j = (r + t) % W;
                    const float* window = scratch + t * step + first_row(i) * W + first_col(j) - first;
                    copy_window(window, W, grad + (r + t) * attn_step, K);
                }
            });
        const int row = first_row(i);
        for (int j = 0; j < W; j += TILE_ROWS) {
            const int n = std::min(TILE_ROWS, W - j), left = first_col(j), span = first_col(j + n - 1) + K - left;
            const int step = whole_vectors(span);
            for (int p = 0; p < K; p++) {
                product(grad_out + ((int64_t)i * W + j) * width, width, 1, value_t + (int64_t)(row + p) * W + left,
                        value_step, nullptr, scratch, step, n, dim, step);
                for (int t = 0; t < n; t++)
                    copy_few(scratch + t * step + first_col(j + t) - left, K,
                             grad + ((int64_t)i * W + j + t) * attn_step + p * K);
            }
        }
    }

    // Row y of grad_value, (W, width): attn * grad_out, summed over the pixels whose window contains the value.
    void grad_value(int y, const float* attn, const float* grad_out, float* grad, int width, float* scratch) const {
        if (dense()) {
            const Matrix m = matrix(attn, scratch);
            return for_tiles(query_rows(), [=](int r, int n, int first, int count) {
                product(m.data + first * m.step + r, 1, m.step, grad_out + (int64_t)first * width, width, nullptr,
                        grad + (int64_t)r * width, width, n, count, width);
            });
        }
        for (int x = 0; x < W; x += TILE_ROWS) {
            const int n = std::min(TILE_ROWS, W - x);
            int c = 0;
            for (; c + 2 * LANES <= width; c += 2 * LANES)
                grad_value_tile<2>(y, x, n, attn, grad_out + c, grad + c, width, scratch);
            if (c < width) grad_value_tile<1>(y, x, n, attn, grad_out + c, grad + c, width, scratch);
        }
    }

    template <int V>
    void grad_value_tile(int y, int x, int n, const float* attn, const float* grad_out, float* grad, int width,
                         float* scratch) const {
        const int first_j = first_query(x, W, K), last_j = last_query(x + n - 1, W, K), last_i = last_query(y, H, K);
        Lanes sum[TILE_ROWS][V] = {};
        for (int i = first_query(y, H, K); i <= last_i; i++) {
            const int p = y - first_row(i);
            float* column = scratch;  // weight of each query j for each value x + t
            for (int j = first_j; j <= last_j; j++, column += TILE_ROWS) {
                const int shift = x - first_col(j);  // the window's column that is value x
                const float* weights = attn + ((int64_t)i * W + j) * attn_step + p * K + shift;
                for (int t = 0; t < TILE_ROWS; t++) column[t] = shift + t >= 0 && shift + t < K ? weights[t] : 0.f;
            }
            add_products<TILE_ROWS, V>(scratch, 1, TILE_ROWS, grad_out + ((int64_t)i * W + first_j) * width, width,
                                       LANES, last_j - first_j + 1, sum);
        }
        for (int t = 0; t < n; t++)
            for (int v = 0; v < V; v++) store(sum[t][v], grad + (int64_t)(x + t) * width + v * LANES);
    }

    // Floats of scratch that each of these needs.
    int64_t scratch_size() const {
        const int64_t pixels = H * W, tile = TILE_ROWS * (K + TILE_ROWS + LANES) * std::max(K, 2);
        return dense() ? std::max(pixels * pixels, (int64_t)TILE_ROWS * whole_vectors(pixels)) : tile;
    }
};

// The maps of all heads, (N, H, W, dim), with each pixel's channels filled up to whole vectors.
inline void pad_pixels(const float* map, int64_t pixels, int dim, float* padded) {
    #pragma omp parallel for schedule(static)
    for (int64_t chunk = 0; chunk < (pixels + 255) / 256; chunk++) {
        const int64_t first = chunk * 256;
        pad_rows(map + first * dim, dim, std::min<int64_t>(256, pixels - first), dim,
                 padded + first * whole_vectors(dim));
    }
}

// Runs work(n, i, scratch, row) for every row i of every map n; scratch and row, of row_size floats, are
// the thread's own.
template <typename Work>
inline void for_rows(int64_t N, const Windows& windows, int64_t row_size, Work work) {
    #pragma omp parallel
    {
        std::vector<float> scratch(windows.scratch_size()), row(row_size);
        #pragma omp for collapse(2) schedule(static)
        for (int64_t n = 0; n < N; n++)
            for (int i = 0; i < windows.rows(); i++) work(n, i, scratch.data(), row.data());
    }
}

// Padded maps as long as a kernel runs; the map itself where its channels are whole vectors already.
struct PaddedMap {
    std::vector<float> storage;
    const float* data;
    PaddedMap(const float* map, int64_t pixels, int dim) : data(map) {
        if (dim % LANES == 0) return;
        storage.resize(pixels * whole_vectors(dim));
        pad_pixels(map, pixels, dim, storage.data());
        data = storage.data();
    }
};

// Makes out (N, H, W, dim) row by row from map (N, H, W, dim): make_row(n, i, map n, row, width, scratch), with the
// channels of both filled up to whole vectors, `width` floats.
template <typename MakeRow>
inline void for_padded_rows(int64_t N, const Windows& windows, int dim, const float* map, float* out,
                            MakeRow make_row) {
    const int width = whole_vectors(dim);
    const int64_t pixels = (int64_t)windows.H * windows.W;
    const PaddedMap padded(map, N * pixels, dim);
    for_rows(N, windows, width == dim ? 0 : (int64_t)windows.pixels_of_row() * width,
             [&](int64_t n, int i, float* scratch, float* row) {
        float* target = out + (n * pixels + (int64_t)i * windows.W) * dim;
        make_row(n, i, padded.data + n * pixels * width, width == dim ? target : row, width, scratch);
        for (int j = 0; width != dim && j < windows.pixels_of_row(); j++)
            std::copy_n(row + (int64_t)j * width, dim, target + (int64_t)j * dim);
    });
}

inline void na2d_av_forward(const float* attn, const float* value, float* out,
                            int64_t N, int H, int W, int K, int dim) {
    const Windows windows{H, W, K, K * K};
    for_padded_rows(N, windows, dim, value, out,
                    [&](int64_t n, int i, const float* map, float* row, int width, float* scratch) {
        windows.forward(i, attn + n * H * W * K * K, map, row, width, scratch);
    });
}

inline void na2d_av_grad_attn(const float* grad_out, const float* value, float* grad_attn,
                              int64_t N, int H, int W, int K, int dim) {
    const Windows windows{H, W, K, K * K};
    const int64_t pixels = (int64_t)H * W, step = whole_vectors(pixels) + LANES;
    std::vector<float> value_t(N * dim * step);
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++)
        transpose(value + n * pixels * dim, dim, pixels, dim, value_t.data() + n * dim * step, step);
    for_rows(N, windows, 0, [&](int64_t n, int i, float* scratch, float*) {
        windows.grad_attn(i, grad_out + n * pixels * dim, value_t.data() + n * dim * step, step,
                          grad_attn + n * pixels * K * K, dim, dim, scratch);
    });
}

inline void na2d_av_grad_value(const float* attn, const float* grad_out, float* grad_value,
                               int64_t N, int H, int W, int K, int dim) {
    const Windows windows{H, W, K, K * K};
    for_padded_rows(N, windows, dim, grad_out, grad_value,
                    [&](int64_t n, int y, const float* map, float* row, int width, float* scratch) {
        windows.grad_value(y, attn + n * H * W * K * K, map, row, width, scratch);
    });
}

}  // namespace overlock
