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

// The maps that columns look at, each in a frame of zeros, so that no tap needs to ask what is inside; where the step is
// more than 1, the pixels that one tap can reach stand side by side. Memory of one thread, which holds some images.
class Frames {
  public:
    // images: how many are looked at at once.
    Frames(const Columns& g, const float* map, int images)
        : g(g), map(map), slots(images) {
        int below = 0, right = 0;
        for (int t = 0; t < g.taps(); t++) {
            top = std::max(top, -g.dy[t]);
            left = std::max(left, -g.dx[t]);
            below = std::max(below, g.dy[t]);
            right = std::max(right, g.dx[t]);
        }
        height = (top + below) / g.step + g.rows;
        width = (left + right) / g.step + g.cols;
        whole = g.step == 1 && height == g.height && width == g.width && top == 0 && left == 0;
        for (int t = 0; t < g.taps(); t++) {
            const int y = g.dy[t] + top, x = g.dx[t] + left;
            offset.push_back(((y % g.step * g.step + x % g.step) * height + y / g.step) * width + x / g.step);
        }
        plane = (int64_t)g.step * g.step * height * width;
        set_channels(0, g.channels);
    }

    void set_channels(int first, int count) {
        first_channel = first;
        channels = count;
        if (whole) return;
        held.assign(slots, -1);
        storage.resize((int64_t)slots * count * plane);
    }

    // From `data`: the frame of an image's first channel.
    int64_t image(int64_t n) {
        if (whole) return (n * g.channels + first_channel) * plane;
        const int slot = n % slots;
        if (held[slot] != n) fill(n, storage.data() + (int64_t)slot * channels * plane);
        held[slot] = n;
        return (int64_t)slot * channels * plane;
    }

    const float* data() const { return whole ? map : storage.data(); }

    int64_t plane;  // floats from one channel to the next
    int width, channels;
    std::vector<int> offset;  // of each tap, in a channel's frame

  private:
    void fill(int64_t n, float* frame) const {
        for (int c = 0; c < channels; c++) {
            const float* source = map + (n * g.channels + first_channel + c) * g.height * g.width;
            for (int py = 0; py < g.step; py++)
                for (int px = 0; px < g.step; px++) {
                    const int first = std::min(width, std::max(0, (left - px + g.step - 1) / g.step));
                    const int end = std::max(first, std::min(width, (g.width - 1 + left - px + g.step) / g.step));
                    for (int r = 0; r < height; r++, frame += width) {
                        const int y = r * g.step + py - top;
                        if (y < 0 || y >= g.height) {
                            std::fill_n(frame, width, 0.f);
                            continue;
                        }
                        const float* row = source + (int64_t)y * g.width + px - left;
                        std::fill_n(frame, first, 0.f);
                        if (g.step == 1) std::copy(row + first, row + end, frame + first);
                        else if (g.step == 2) for (int q = first; q < end; q++) frame[q] = row[q * 2];
                        else for (int q = first; q < end; q++) frame[q] = row[q * g.step];
                        std::fill(frame + end, frame + width, 0.f);
                    }
                }
        }
    }

    const Columns& g;
    const float* map;
    const int slots;
    int top = 0, left = 0, height, first_channel = 0;
    bool whole;  // no tap leaves the map: the map itself will do
    std::vector<float> storage;
    std::vector<int64_t> held;
};

// Column (image, u, v); a division for each of them would take longer than its share of the product.
struct ColumnPlace {
    const int rows, cols;
    int64_t image;
    int u, v;

    ColumnPlace(const Columns& g, int64_t column)
        : rows(g.rows), cols(g.cols), image(column / (rows * cols)), u(column % (rows * cols) / cols),
          v(column % cols) {}

    void next() {
        if (++v < cols) return;
        v = 0;
        if (++u < rows) return;
        u = 0;
        image++;
    }
};

// How many images `count` columns may touch.
inline int images_of(const Columns& g, int64_t count) { return (count - 2) / (g.rows * g.cols) + 2; }

// Columns first to first + count of the frames' channels, as panels of TILE_COLS columns: panel, row k, column.
// A panel has `rows` rows, as many as channels * taps or more. Zeros fill the last panel.
inline void pack(const Columns& g, Frames& frames, int64_t first, int count, int rows, float* panels) {
    const int taps = g.taps();
    ColumnPlace column(g, first);
    int64_t image = -1, frame = 0;
    for (int start = 0; start < count; start += TILE_COLS) {
        int64_t at[TILE_COLS];
        for (int j = 0; j < TILE_COLS; j++) {
            at[j] = at[0];
            if (start + j >= count) continue;
            if (column.image != image) frame = frames.image(image = column.image);
            at[j] = frame + column.u * frames.width + column.v;
            column.next();
        }
        // Of each vector and each of its runs: whether its columns stand side by side.
        bool together[2], run_together[TILE_COLS / RUN];
        for (int h = 0; h < TILE_COLS / RUN; h++) run_together[h] = at[h * RUN + RUN - 1] == at[h * RUN] + RUN - 1;
        for (int h = 0; h < 2; h++) together[h] = at[h * LANES + LANES - 1] == at[h * LANES] + LANES - 1;
        float* row = panels + (int64_t)start * rows;
        for (int c = 0; c < frames.channels; c++)
            for (int t = 0; t < taps; t++, row += TILE_COLS) {
                const float* source = frames.data() + c * frames.plane + frames.offset[t];
                for (int h = 0; h < 2; h++) {
                    if (together[h]) {
                        store(load(source + at[h * LANES]), row + h * LANES);
                        continue;
                    }
                    for (int j = h * LANES; j < (h + 1) * LANES; j += RUN) {
                        if (run_together[j / RUN]) std::memcpy(row + j, source + at[j], RUN * sizeof(float));
                        else for (int e = j; e < j + RUN; e++) row[e] = source[at[e]];
                    }
                }
                for (int j = count - start; j < TILE_COLS; j++) row[j] = 0;
            }
    }
}

template <int R>
inline void store_tile(const Lanes (&sum)[R][2], float (&tile)[R][TILE_COLS]) {
    for (int i = 0; i < R; i++)
        for (int h = 0; h < 2; h++) store(sum[i][h], tile[i] + h * LANES);
}

// Where column (image, u, v) of a product goes: pixel (u * step + y, v * step + x) of a map.
struct Target {
    int channels, height, width, step, y, x;

    int64_t plane() const { return (int64_t)height * width; }
    int64_t place(const ColumnPlace& column) const {  // in the map's first channel
        return column.image * channels * plane() + (int64_t)(column.u * step + y) * width + column.v * step + x;
    }
};

// A product with six rows of its other operand at a time: `a` (row panel, k, 6 rows).
struct RowPanels {
    const float *a, *bias;
    int depth;
    const Target& target;
    float* out;

    void start(int r, Lanes (&sum)[TILE_ROWS][2]) const {
        for (int i = 0; i < TILE_ROWS; i++)
            sum[i][0] = sum[i][1] = Lanes{} + (bias && r + i < target.channels ? bias[r + i] : 0.f);
    }
    int rows(int r) const { return std::min(TILE_ROWS, target.channels - r); }
};

// The first n floats of a vector, each to its place.
inline void scatter(const Lanes& lanes, const int64_t* place, int n, float* row) {
    float values[LANES];
    store(lanes, values);
    for (int j = 0; j < n; j += RUN) {
        if (j + RUN <= n && place[j + RUN - 1] == place[j] + RUN - 1)
            std::memcpy(row + place[j], values + j, RUN * sizeof(float));
        else for (int e = j; e < std::min(j + RUN, n); e++) row[place[e]] = values[e];
    }
}

// With `count` packed columns, which go to place[column].
inline void packed_product(const RowPanels& p, const float* b, int count, const int64_t* place) {
    for (int start = 0; start < count; start += TILE_COLS)  // a panel stays in the first-level cache
        for (int r = 0; r < p.target.channels; r += TILE_ROWS) {
            Lanes sum[TILE_ROWS][2];
            p.start(r, sum);
            add_products<TILE_ROWS, 2>(p.a + (int64_t)r * p.depth, 1, TILE_ROWS,
                                       b + (int64_t)start * p.depth, TILE_COLS, LANES, p.depth, sum);
            for (int h = 0; h < 2; h++) {
                const int first = start + h * LANES, n = std::min(LANES, count - first);
                const bool together = n == LANES && place[first + n - 1] == place[first] + n - 1;
                for (int i = 0; i < p.rows(r); i++) {
                    float* row = p.out + (r + i) * p.target.plane();
                    if (together) store(sum[i][h], row + place[first]);
                    else scatter(sum[i][h], place + first, n, row);
                }
            }
        }
}

// With columns that are read where they are: those of a vector stand side by side, in the map and in the target.
inline void product_in_place(const RowPanels& p, const Columns& g, Frames& frames, int64_t first, int count) {
    std::vector<int64_t> offset;
    for (int c = 0; c < g.channels; c++)
        for (int t = 0; t < g.taps(); t++) offset.push_back(c * frames.plane + frames.offset[t]);
    for (int start = 0; start < count; start += TILE_COLS) {
        const float* b[2];
        int64_t place[2];
        for (int h = 0; h < 2; h++) {
            const ColumnPlace column(g, first + std::min(start + h * LANES, count - LANES));
            b[h] = frames.data() + frames.image(column.image) + column.u * frames.width + column.v;
            place[h] = p.target.place(column);
        }
        for (int r = 0; r < p.target.channels; r += TILE_ROWS) {
            Lanes sum[TILE_ROWS][2];
            p.start(r, sum);
            add_products_at<TILE_ROWS, 2>(p.a + (int64_t)r * p.depth, b, offset.data(), p.depth, sum);
            for (int i = 0; i < p.rows(r); i++)
                for (int h = 0; h < 2; h++) store(sum[i][h], p.out + (r + i) * p.target.plane() + place[h]);
        }
    }
}

// target = activation(bias + matrix * columns). matrix(row, channel, tap): the product's other operand, row = channel of
// the target. An activation is for targets with step 1.
template <typename Matrix>
inline void columns_product(const Columns& g, const float* map, Matrix matrix, const float* bias,
                            const Target& target, float* out, Activation activation = IDENTITY) {
    const int depth = g.channels * g.taps(), row_panels = (target.channels + TILE_ROWS - 1) / TILE_ROWS;
    const int64_t columns = g.count(), plane = target.plane();
    Scratch packed;  // row panel, k, 6 rows
    packed.resize(((int64_t)row_panels * depth * TILE_ROWS + LANES - 1) / LANES);
    float* a = reinterpret_cast<float*>(packed.data);
    #pragma omp parallel for schedule(static)
    for (int panel = 0; panel < row_panels; panel++)
        for (int c = 0; c < g.channels; c++)
            for (int t = 0; t < g.taps(); t++)
                for (int r = panel * TILE_ROWS; r < std::min((panel + 1) * TILE_ROWS, target.channels); r++)
                    a[((int64_t)panel * depth + c * g.taps() + t) * TILE_ROWS + r % TILE_ROWS] = matrix(r, c, t);
    const RowPanels panels{a, bias, depth, target, out};
    // Packing pays where many rows read what was packed.
    const bool in_place = g.cols % LANES == 0 && target.step == 1 && row_panels <= 16;
    // A block of columns stays in the second-level cache; there are some blocks for each thread.
    const int64_t block =
        std::max<int64_t>(1, std::min<int64_t>({65536 / std::max(1, depth), 256, columns / 32}) / TILE_COLS)
        * TILE_COLS;
    const int64_t blocks = (columns + block - 1) / block;
    #pragma omp parallel
    {
        Scratch columns_of_block;
        if (!in_place) columns_of_block.resize(block * depth / LANES);
        float* b = reinterpret_cast<float*>(columns_of_block.data);
        Frames frames(g, map, images_of(g, block));
        std::vector<int64_t> place(block);
        #pragma omp for schedule(static)
        for (int64_t nth = 0; nth < blocks; nth++) {
            const int64_t first = nth * block;
            const int count = std::min(block, columns - first);
            if (in_place) product_in_place(panels, g, frames, first, count);
            else {
                pack(g, frames, first, count, depth, b);
                ColumnPlace column(g, first);
                for (int j = 0; j < count; j++, column.next()) place[j] = target.place(column);
                packed_product(panels, b, count, place.data());
            }
            for (int j = 0, n; activation != IDENTITY && j < count; j += n) {  // n columns of one image
                n = std::min<int64_t>(count - j, plane - (first + j) % plane);
                const int64_t start = target.place(ColumnPlace(g, first + j));
                for (int i = 0; i < target.channels; i++) activate(activation, out + i * plane + start, n);
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
    columns_product(g, x, [&](int r, int channel, int t) {
        return weight[(int64_t)r * depth + channel * g.taps() + t] * scale[r];
    }, shift.data(), {c.out_channels, c.out_height(), c.out_width(), 1, 0, 0}, y, activation);
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
            const int all = c.kernel_h * c.kernel_w;
            columns_product(g, grad_y, [&](int r, int channel, int t) {
                return weight[((int64_t)channel * c.in_channels + r) * all + tap[t]];
            }, nullptr, {c.in_channels, c.height, c.width, s, y, x}, grad_x);
        }
}

// n things in parts of at most `most`, all but the last of one size.
struct Cut {
    int n, parts, size;

    Cut(int n, int most) : n(n), parts((n + most - 1) / most), size((n + parts - 1) / parts) {
        parts = (n + size - 1) / size;
    }
    int first(int part) const { return part * size; }
    int count(int part) const { return std::min(size, n - first(part)); }
};

// The gradient of a convolution's weights (outs, depth), in parts of its rows and of its columns. Where there are few,
// what is summed over is cut into chunks at fixed places, and these are added up.
struct WeightSums {
    const int depth, chunks;
    const int64_t size;
    float* const grad_weight;
    std::vector<float> partial;

    // most: of the chunks.
    WeightSums(int outs, int depth, int parts, int64_t most, float* grad_weight)
        : depth(depth), chunks(std::max<int64_t>(1, std::min<int64_t>(16 / parts, most))), size((int64_t)outs * depth),
          grad_weight(grad_weight), partial(chunks > 1 ? chunks * size : 0) {
        if (chunks == 1) std::fill_n(grad_weight, size, 0.f);
    }

    // A tile at row r and column k, as far as there are so many rows and columns.
    template <int R>
    void add(int chunk, int r, int k, const Lanes (&sum)[R][2], int rows, int columns) {
        float* target = (chunks > 1 ? partial.data() + chunk * size : grad_weight) + (int64_t)r * depth + k;
        float tile[R][TILE_COLS];
        store_tile(sum, tile);
        for (int i = 0; i < std::min(R, rows); i++, target += depth)
            for (int e = 0; e < std::min(TILE_COLS, columns); e++) target[e] += tile[i][e];
    }

    // Within a parallel region, by all threads.
    void finish() {
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < (chunks > 1 ? size : 0); i++) {
            float sum = 0;
            for (int chunk = 0; chunk < chunks; chunk++) sum += partial[chunk * size + i];
            grad_weight[i] = sum;
        }
    }
};

// A tile of the product below, over `images` that follow each other.
template <int R>
inline void pointwise_tile(WeightSums& sums, int chunk, const float* grad_y, int outs, int plane, int row,
                           const float* lanes, int64_t group, int images, int column, int columns) {
    Lanes sum[R][2] = {};
    add_products<R, 2>(grad_y + (int64_t)row * plane, plane, 1, lanes, LANES, group * LANES, plane, sum, images,
                       (int64_t)outs * plane, (int64_t)plane * LANES);
    sums.add(chunk, row, column, sum, R, columns);
}

// grad_weight where each pixel is looked at by itself: grad_y is read where it is, x goes into lanes.
inline void pointwise_grad_weight(const float* x, const float* grad_y, float* grad_weight, const Convolution& c) {
    const int outs = c.out_channels, ins = c.in_channels, plane = c.height * c.width;
    const Cut rows(outs, 256), columns(ins, 256);
    const int block = std::min(c.images, std::max(1, 512 / plane));  // images at a time
    WeightSums sums(outs, ins, rows.parts * columns.parts, (c.images + block - 1) / block, grad_weight);
    const int64_t group = (int64_t)block * plane;  // vectors of LANES channels
    #pragma omp parallel
    {
        Scratch lanes;  // group of channels, image, pixel; an even number of groups
        lanes.resize((whole_vectors(columns.size) / LANES + 1) * group);
        #pragma omp for collapse(3) schedule(static)
        for (int chunk = 0; chunk < sums.chunks; chunk++)
            for (int part = 0; part < rows.parts; part++)
                for (int nth = 0; nth < columns.parts; nth++) {
                    const int column = columns.first(nth), count = columns.count(nth);
                    const int end = c.images * (chunk + 1) / sums.chunks;
                    for (int first = c.images * chunk / sums.chunks; first < end; first += block) {
                        const int images = std::min(block, end - first);
                        for (int n = 0; n < images; n++)
                            for (int k = 0; k < count; k += LANES)
                                to_lanes(x + ((int64_t)(first + n) * ins + column + k) * plane,
                                         std::min(LANES, count - k), plane,
                                         lanes.data + k / LANES * group + (int64_t)n * plane);
                        const float* grad = grad_y + (int64_t)first * outs * plane;
                        for (int k = 0; k < count; k += TILE_COLS) {
                            const float* b = reinterpret_cast<const float*>(lanes.data + k / LANES * group);
                            const auto tile = [&](auto height, int r) {
                                pointwise_tile<height>(sums, chunk, grad, outs, plane, rows.first(part) + r, b, group,
                                                       images, column + k, count - k);
                            };
                            int r = 0;
                            for (; r + TILE_ROWS <= rows.count(part); r += TILE_ROWS)
                                tile(std::integral_constant<int, TILE_ROWS>(), r);
                            for (; r < rows.count(part); r++) tile(std::integral_constant<int, 1>(), r);
                        }
                    }
                }
        sums.finish();
    }
}

// grad_bias (outs): the sums of grad_y (images, outs, plane).
inline void sum_planes(const float* grad_y, int images, int outs, int64_t plane, float* grad_bias) {
    #pragma omp parallel for schedule(static)
    for (int r = 0; r < outs; r++) {
        float total = 0;
        for (int n = 0; n < images; n++) {
            const float* grad = grad_y + ((int64_t)n * outs + r) * plane;
            float sum = 0;
            for (int64_t i = 0; i < plane; i++) sum += grad[i];
            total += sum;
        }
        grad_bias[r] = total;
    }
}

inline void convolution_grad_weight(const float* x, const float* grad_y, float* grad_weight, const Convolution& c) {
    const Columns g = c.columns();
    if (g.taps() == 1 && c.stride == 1 && c.padding == 0) return pointwise_grad_weight(x, grad_y, grad_weight, c);
    const Columns identity{c.images, c.out_channels, g.rows, g.cols, g.rows, g.cols, 1, {0}, {0}};
    const int taps = g.taps(), outs = c.out_channels, block = 256;  // columns packed at a time
    const Cut rows(outs, 256), channels(c.in_channels, std::max(1, 256 / taps));
    const int64_t count = g.count();
    WeightSums sums(outs, c.in_channels * taps, rows.parts * channels.parts, (count + block - 1) / block, grad_weight);
    const int a_rows = (rows.size + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS,
              b_rows = (channels.size * taps + TILE_COLS - 1) / TILE_COLS * TILE_COLS;
    #pragma omp parallel
    {
        Scratch a, b, transposed;
        a.resize((int64_t)block * a_rows / LANES);
        b.resize((int64_t)block * b_rows / LANES);
        transposed.resize((int64_t)block * b_rows / LANES);
        float *pa = reinterpret_cast<float*>(a.data), *pb = reinterpret_cast<float*>(b.data);
        const float* pt = reinterpret_cast<const float*>(transposed.data);
        Frames of_x(g, x, images_of(g, block)), of_grad(identity, grad_y, images_of(g, block));
        #pragma omp for collapse(3) schedule(static)
        for (int chunk = 0; chunk < sums.chunks; chunk++)
            for (int part = 0; part < rows.parts; part++)
                for (int nth = 0; nth < channels.parts; nth++) {
                    const int row = rows.first(part), height = rows.count(part);
                    const int column = channels.first(nth) * taps, width = channels.count(nth) * taps;
                    of_grad.set_channels(row, height);
                    of_x.set_channels(channels.first(nth), channels.count(nth));
                    const int64_t end = count * (chunk + 1) / sums.chunks;
                    for (int64_t first = count * chunk / sums.chunks; first < end; first += block) {
                        const int columns = std::min<int64_t>(block, end - first);
                        const int panels = (columns + TILE_COLS - 1) / TILE_COLS;
                        pack(identity, of_grad, first, columns, a_rows, pa);
                        pack(g, of_x, first, columns, b_rows, pb);
                        for (int i = 0; i < panels * b_rows; i += LANES)
                            to_lanes(pb + i * TILE_COLS, LANES, TILE_COLS, transposed.data + i * 2);
                        for (int k = 0; k < width; k += TILE_COLS)
                            for (int r = 0; r < height; r += TILE_ROWS) {
                                Lanes sum[TILE_ROWS][2] = {};
                                add_products<TILE_ROWS, 2>(pa + r * TILE_COLS, TILE_COLS, 1, pt + k * TILE_COLS, LANES,
                                                           LANES * TILE_COLS, TILE_COLS, sum, panels,
                                                           a_rows * TILE_COLS, b_rows * TILE_COLS);
                                sums.add(chunk, row + r, column + k, sum, height - r, width - k);
                            }
                    }
                }
        sums.finish();
    }
}

// grad_x, grad_weight (out, in, kernel_h, kernel_w) and grad_bias (out), each unless it is null.
inline void convolution_gradients(const float* x, const float* weight, const float* grad_y, float* grad_x,
                                  float* grad_weight, float* grad_bias, const Convolution& c) {
    if (grad_x) convolution_grad_x(grad_y, weight, grad_x, c);
    if (grad_weight) convolution_grad_weight(x, grad_y, grad_weight, c);
    if (grad_bias) sum_planes(grad_y, c.images, c.out_channels, (int64_t)c.out_height() * c.out_width(), grad_bias);
}

}  // namespace overlock
