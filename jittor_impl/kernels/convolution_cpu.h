// Dense convolution on the CPU as a matrix product, forward and both gradients: any kernel, stride, padding, dilation.
// Maps are (images, channels, height, width), contiguous float32. No atomics; sums are cut at fixed places, so the
// thread count changes no bit. Include lanes.h, product.h and inference_cpu.h before it.
#pragma once

namespace overlock {

// The product's operand made from a map: row k = (channel, tap), column n = (image, u, v). Column (u, v) looks at the
// pixels (u * step + dy, v * step + dx), one for each tap; outside the map there are zeros.
struct Columns {
    int images, channels, height, width;
    int rows, cols, step;  // 0 <= u < rows, 0 <= v < cols
    std::vector<int> dy, dx;

    int taps() const { return dy.size(); }
    int64_t count() const { return (int64_t)images * rows * cols; }
};

constexpr int TILE_COLS = 2 * LANES;
constexpr int RUN = 8;  // columns that are copied at once where they stand side by side in the map

// Columns first to first + count, channels c to c + channels, as panels of TILE_COLS columns: panel, row k, column.
// A panel has `rows` rows, as many as channels * taps or more. Zeros fill the last panel.
inline void pack(const Columns& g, const float* map, int64_t first, int count, int c, int channels, int rows,
                 float* panels) {
    static const float zero = 0;
    const int taps = g.taps(), pixels = g.rows * g.cols;
    const int64_t plane = (int64_t)g.height * g.width;
    for (int start = 0; start < count; start += TILE_COLS) {
        int image[TILE_COLS], y[TILE_COLS], x[TILE_COLS], at[TILE_COLS];
        const int64_t first_image = (first + start) / pixels;
        for (int j = 0, pixel = (first + start) % pixels, n = 0; j < TILE_COLS; j++) {
            image[j] = n * g.channels * plane;
            y[j] = start + j < count ? pixel / g.cols * g.step : -(1 << 30);  // outside, whatever the tap
            x[j] = pixel % g.cols * g.step;
            if (++pixel == pixels) { pixel = 0; n++; }
        }
        const float* source = map + (first_image * g.channels + c) * plane;
        float* panel = panels + (int64_t)start * rows;
        for (int t = 0; t < taps; t++) {
            int gaps[TILE_COLS / RUN] = {};  // 0 where all columns of a run stand side by side
            for (int j = 0; j < TILE_COLS; j++) {
                const int yy = y[j] + g.dy[t], xx = x[j] + g.dx[t];
                const bool inside = (yy >= 0) & (yy < g.height) & (xx >= 0) & (xx < g.width);
                at[j] = inside ? image[j] + yy * g.width + xx : -1;
            }
            for (int h = 0; h < TILE_COLS / RUN; h++)
                for (int e = 0; e < RUN; e++) gaps[h] |= (at[h * RUN + e] - at[h * RUN] - e) | (at[h * RUN + e] < 0);
            for (int i = 0; i < channels; i++) {
                float* row = panel + (i * taps + t) * TILE_COLS;
                for (int h = 0; h < TILE_COLS; h += RUN) {
                    if (!gaps[h / RUN]) std::memcpy(row + h, source + i * plane + at[h], RUN * sizeof(float));
                    else for (int j = h; j < h + RUN; j++) row[j] = *(at[j] < 0 ? &zero : source + i * plane + at[j]);
                }
            }
        }
    }
}

// Where column (image, u, v) of a product goes: pixel (u * step + y, v * step + x) of a map.
struct Target {
    int channels, height, width, step, y, x;
};

// target = activation(bias + matrix * columns). matrix(row, k): the product's other operand, row = channel of the
// target. An activation is for targets with step 1.
template <typename Matrix>
inline void columns_product(const Columns& g, const float* map, Matrix matrix, const float* bias,
                            const Target& target, float* out, Activation activation = IDENTITY) {
    const int depth = g.channels * g.taps(), row_panels = (target.channels + TILE_ROWS - 1) / TILE_ROWS;
    const int64_t columns = g.count(), plane = (int64_t)target.height * target.width;
    Scratch packed;  // row panel, k, 6 rows
    packed.resize(((int64_t)row_panels * depth * TILE_ROWS + LANES - 1) / LANES);
    float* a = reinterpret_cast<float*>(packed.data);
    for (int r = 0; r < target.channels; r++)
        for (int k = 0; k < depth; k++)
            a[((int64_t)(r / TILE_ROWS) * depth + k) * TILE_ROWS + r % TILE_ROWS] = matrix(r, k);
    // A block of columns stays in the second-level cache; there are some blocks for each thread.
    const int64_t block =
        std::max<int64_t>(1, std::min<int64_t>({65536 / std::max(1, depth), 256, columns / 32}) / TILE_COLS)
        * TILE_COLS;
    const int64_t blocks = (columns + block - 1) / block;
    #pragma omp parallel
    {
        Scratch panels;
        panels.resize(block * depth / LANES);
        std::vector<int64_t> place(block);
        #pragma omp for schedule(static)
        for (int64_t nth = 0; nth < blocks; nth++) {
            const int64_t first = nth * block;
            const int count = std::min(block, columns - first);
            float* b = reinterpret_cast<float*>(panels.data);
            pack(g, map, first, count, 0, g.channels, depth, b);
            for (int j = 0; j < count; j++) {
                const int64_t image = (first + j) / (g.rows * g.cols), pixel = (first + j) % (g.rows * g.cols);
                place[j] = image * target.channels * plane + (pixel / g.cols * target.step + target.y) * target.width
                           + pixel % g.cols * target.step + target.x;
            }
            for (int r = 0; r < target.channels; r += TILE_ROWS) {
                for (int start = 0; start < count; start += TILE_COLS) {
                    Lanes sum[TILE_ROWS][2];
                    for (int i = 0; i < TILE_ROWS; i++)
                        sum[i][0] = sum[i][1] = Lanes{} + (bias && r + i < target.channels ? bias[r + i] : 0.f);
                    add_products<TILE_ROWS, 2>(a + (int64_t)r * depth, 1, TILE_ROWS,
                                               b + (int64_t)start * depth, TILE_COLS, LANES, depth, sum);
                    for (int i = 0; i < std::min(TILE_ROWS, target.channels - r); i++) {
                        float* row = out + (r + i) * plane;
                        const float* columns_of_row = reinterpret_cast<const float*>(sum[i]);
                        for (int j = start; j < std::min(start + TILE_COLS, count); j += RUN) {
                            const int n = std::min(RUN, count - j);
                            const float* values = columns_of_row + j - start;
                            if (n == RUN && place[j + RUN - 1] == place[j] + RUN - 1)
                                std::memcpy(row + place[j], values, RUN * sizeof(float));
                            else for (int e = 0; e < n; e++) row[place[j + e]] = values[e];
                        }
                    }
                }
                for (int j = 0, n; activation != IDENTITY && j < count; j += n) {  // n columns of one image
                    n = std::min<int64_t>(count - j, plane - (first + j) % plane);
                    for (int i = r; i < std::min(r + TILE_ROWS, target.channels); i++)
                        activate(activation, out + i * plane + place[j], n);
                }
            }
        }
    }
}

struct Convolution {
    int images, in_channels, height, width, out_channels, kernel_h, kernel_w, stride, padding, dilation;

    int out(int size, int kernel) const { return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1; }
    int out_height() const { return out(height, kernel_h); }
    int out_width() const { return out(width, kernel_w); }

    Columns columns() const {
        Columns g{images, in_channels, height, width, out_height(), out_width(), stride};
        for (int i = 0; i < kernel_h; i++)
            for (int j = 0; j < kernel_w; j++) {
                g.dy.push_back(i * dilation - padding);
                g.dx.push_back(j * dilation - padding);
            }
        return g;
    }
};

// y = x * weight (+ bias), in inference with a BatchNorm and an activation after it.
// x (images, in, height, width), weight (out, in, kernel_h, kernel_w), bias (out) or null.
inline void convolution(const float* x, const float* weight, const float* bias, float* y, const Convolution& c,
                        const Norm& norm = {}, Activation activation = IDENTITY) {
    const Columns g = c.columns();
    const int depth = c.in_channels * g.taps();
    std::vector<float> scale(c.out_channels), shift(c.out_channels);
    for (int r = 0; r < c.out_channels; r++) {
        scale[r] = norm.scale(r);
        shift[r] = norm.shift(r, bias);
    }
    columns_product(g, x, [&](int r, int k) { return weight[(int64_t)r * depth + k] * scale[r]; }, shift.data(),
                    {c.out_channels, c.out_height(), c.out_width(), 1, 0, 0}, y, activation);
}

// Input pixels (y, x) of one remainder by the stride are reached by the same taps: one product for each remainder.
inline void convolution_grad_x(const float* grad_y, const float* weight, float* grad_x, const Convolution& c) {
    const int s = c.stride;
    for (int y = 0; y < std::min(s, c.height); y++)
        for (int x = 0; x < std::min(s, c.width); x++) {
            Columns g{c.images, c.out_channels, c.out_height(), c.out_width(),
                      (c.height - y + s - 1) / s, (c.width - x + s - 1) / s, 1};
            std::vector<int> tap;
            for (int i = 0; i < c.kernel_h; i++)
                for (int j = 0; j < c.kernel_w; j++) {
                    const int dy = y + c.padding - i * c.dilation, dx = x + c.padding - j * c.dilation;
                    if (dy % s || dx % s) continue;
                    tap.push_back(i * c.kernel_w + j);
                    g.dy.push_back(dy / s);
                    g.dx.push_back(dx / s);
                }
            const int taps = g.taps(), all = c.kernel_h * c.kernel_w;
            columns_product(g, grad_y, [&](int r, int k) {
                return weight[((int64_t)(k / taps) * c.in_channels + r) * all + tap[k % taps]];
            }, nullptr, {c.in_channels, c.height, c.width, s, y, x}, grad_x);
        }
}

// TILE_COLS rows of TILE_COLS columns -> columns of rows.
inline void transpose_tile(const float* source, float* target) {
    for (int i = 0; i < TILE_COLS; i += 8)
        for (int j = 0; j < TILE_COLS; j += 8)
            transpose8(source + i * TILE_COLS + j, TILE_COLS, target + j * TILE_COLS + i, TILE_COLS);
}

inline void add_row(const float* row, int count, float* sums) {
    for (int e = 0; e < count; e++) sums[e] += row[e];
}

// grad_weight (out, in, kernel_h, kernel_w) and, unless null, grad_bias (out).
inline void convolution_grad_weight(const float* x, const float* grad_y, float* grad_weight, float* grad_bias,
                                    const Convolution& c) {
    const Columns g = c.columns();
    const Columns identity{c.images, c.out_channels, g.rows, g.cols, g.rows, g.cols, 1, {0}, {0}};
    const int taps = g.taps(), depth = c.in_channels * taps, outs = c.out_channels;
    const int64_t columns = g.count(), size = (int64_t)outs * depth;
    const int block = 256;  // columns packed at a time
    const int chunks = std::max<int64_t>(1, std::min<int64_t>({16, (columns + block - 1) / block, (1 << 23) / size}));
    const int group = std::max(1, std::min(c.in_channels, 256 / taps)), groups = (c.in_channels + group - 1) / group;
    const int a_rows = (outs + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS,
              b_rows = (group * taps + TILE_COLS - 1) / TILE_COLS * TILE_COLS;
    std::vector<float> partial(chunks * size), partial_bias((int64_t)chunks * outs);
    #pragma omp parallel
    {
        Scratch a, b, transposed;
        a.resize((int64_t)block * a_rows / LANES);
        b.resize((int64_t)block * b_rows / LANES);
        transposed.resize((int64_t)block * b_rows / LANES);
        #pragma omp for collapse(2) schedule(static)
        for (int chunk = 0; chunk < chunks; chunk++)
            for (int nth = 0; nth < groups; nth++) {
                const int first_channel = nth * group, channels = std::min(group, c.in_channels - first_channel);
                float* sums = partial.data() + chunk * size + first_channel * taps;
                const int64_t end = columns * (chunk + 1) / chunks;
                for (int64_t first = columns * chunk / chunks; first < end; first += block) {
                    const int count = std::min<int64_t>(block, end - first);
                    float *pa = reinterpret_cast<float*>(a.data), *pb = reinterpret_cast<float*>(b.data);
                    float* pt = reinterpret_cast<float*>(transposed.data);
                    pack(identity, grad_y, first, count, 0, outs, a_rows, pa);
                    pack(g, x, first, count, first_channel, channels, b_rows, pb);
                    for (int i = 0; i < (count + TILE_COLS - 1) / TILE_COLS * b_rows; i += TILE_COLS)
                        transpose_tile(pb + i * TILE_COLS, pt + i * TILE_COLS);
                    for (int k = 0; k < channels * taps; k += TILE_COLS)
                        for (int r = 0; r < outs; r += TILE_ROWS) {
                            Lanes sum[TILE_ROWS][2] = {};
                            for (int start = 0; start < count; start += TILE_COLS)
                                add_products<TILE_ROWS, 2>(pa + (int64_t)start * a_rows + r * TILE_COLS, TILE_COLS, 1,
                                                           pt + (int64_t)start * b_rows + k * TILE_COLS, TILE_COLS,
                                                           LANES, TILE_COLS, sum);
                            for (int i = 0; i < std::min(TILE_ROWS, outs - r); i++)
                                add_row(reinterpret_cast<float*>(sum[i]), std::min(TILE_COLS, channels * taps - k),
                                        sums + (int64_t)(r + i) * depth + k);
                        }
                    for (int r = 0; grad_bias && nth == 0 && r < outs; r++) {
                        Lanes sum = {};
                        for (int start = 0; start < count; start += TILE_COLS)
                            for (int h = 0; h < 2; h++)
                                sum += a.data[((int64_t)start * a_rows + r * TILE_COLS) / LANES + h];
                        for (int e = 0; e < LANES; e++) partial_bias[(int64_t)chunk * outs + r] += sum[e];
                    }
                }
            }
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < size; i++) {
            float sum = 0;
            for (int chunk = 0; chunk < chunks; chunk++) sum += partial[chunk * size + i];
            grad_weight[i] = sum;
        }
    }
    for (int r = 0; grad_bias && r < outs; r++) {
        float sum = 0;
        for (int chunk = 0; chunk < chunks; chunk++) sum += partial_bias[(int64_t)chunk * outs + r];
        grad_bias[r] = sum;
    }
}

}  // namespace overlock
