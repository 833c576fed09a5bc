// Matrix products on the CPU, one tile at a time. Include lanes.h before it.
#pragma once

namespace overlock {

// sum[r][v] += a(r, k) * b(k, v) over k < depth. Element a(r, k) is a[r * a_row + k * a_step]; b(k, v) are the LANES
// floats at b + k * b_step + v * b_vector. Then the same for further `parts`, a_part and b_part floats on.
// `sum` is an array that nothing points to: one that floats might be part of would be stored at every step. Six rows of
// two vectors keep both multiply-add units busy and fit 16 registers.
template <int R, int V>
inline void add_products(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step,
                         int64_t b_vector, int depth, Lanes (&sum)[R][V], int parts = 1, int64_t a_part = 0,
                         int64_t b_part = 0) {
    for (int part = 0; part < parts; part++) {
        const float *a_at = a + part * a_part, *b_at = b + part * b_part;
        for (int k = 0; k < depth; k++, a_at += a_step, b_at += b_step) {
            Lanes column[V];
            for (int v = 0; v < V; v++) column[v] = load(b_at + v * b_vector);
            for (int r = 0; r < R; r++) {
                Lanes factor = Lanes{} + a_at[r * a_row];
                if (V > 1) keep_in_register(factor);  // else it is loaded once more for each of V
                for (int v = 0; v < V; v++) sum[r][v] += factor * column[v];
            }
        }
    }
}

// The same, where b(k, v) are the LANES floats at b[v] + offset[k], and a(r, k) is a[k * R + r].
template <int R, int V>
inline void add_products_at(const float* a, const float* const (&b)[V], const int64_t* offset, int depth,
                            Lanes (&sum)[R][V]) {
    for (int k = 0; k < depth; k++, a += R) {
        Lanes column[V];
        for (int v = 0; v < V; v++) column[v] = load(b[v] + offset[k]);
        for (int r = 0; r < R; r++) {
            Lanes factor = Lanes{} + a[r];
            if (V > 1) keep_in_register(factor);
            for (int v = 0; v < V; v++) sum[r][v] += factor * column[v];
        }
    }
}

constexpr int TILE_ROWS = 6;

template <int R, int V>
inline void product_tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, int depth,
                         const float* start, float* out, int64_t out_step, bool add) {
    Lanes sum[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) {
            sum[r][v] = Lanes{};
            if (add) sum[r][v] = load(out + r * out_step + v * LANES);
            if (start) sum[r][v] += load(start + v * LANES);
        }
    add_products<R, V>(a, a_row, a_step, b, b_step, LANES, depth, sum);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(sum[r][v], out + r * out_step + v * LANES);
}

template <int R>
inline void product_rows(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, int depth,
                         const float* start, float* out, int64_t out_step, int columns, bool add) {
    int j = 0;
    for (; j + 2 * LANES <= columns; j += 2 * LANES)
        product_tile<R, 2>(a, a_row, a_step, b + j, b_step, depth, start ? start + j : nullptr, out + j, out_step, add);
    if (j < columns)
        product_tile<R, 1>(a, a_row, a_step, b + j, b_step, depth, start ? start + j : nullptr, out + j, out_step, add);
}

// out (rows, columns) = a (rows, depth) * b (depth, columns), plus the row `start` unless null, plus `out` itself if
// add. b and out have rows of whole vectors, b_step and out_step floats apart; `columns` is a multiple of LANES.
inline void product(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, const float* start,
                    float* out, int64_t out_step, int rows, int depth, int columns, bool add = false) {
    int r = 0;
    for (; r + TILE_ROWS <= rows; r += TILE_ROWS)
        product_rows<TILE_ROWS>(a + r * a_row, a_row, a_step, b, b_step, depth, start, out + r * out_step, out_step,
                                columns, add);
    for (; r + 2 <= rows; r += 2)
        product_rows<2>(a + r * a_row, a_row, a_step, b, b_step, depth, start, out + r * out_step, out_step,
                        columns, add);
    for (; r < rows; r++)
        product_rows<1>(a + r * a_row, a_row, a_step, b, b_step, depth, start, out + r * out_step, out_step,
                        columns, add);
}

inline int whole_vectors(int n) { return (n + LANES - 1) / LANES * LANES; }

// (rows, columns), rows `source_step` apart -> rows of whole vectors, filled up with zeros.
inline void pad_rows(const float* source, int64_t source_step, int rows, int columns, float* target) {
    const int width = whole_vectors(columns);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < width; c++)
            target[(int64_t)r * width + c] = c < columns ? source[r * source_step + c] : 0.f;
}

// (rows, columns) -> its transpose; rows `source_step` and `target_step` floats apart.
inline void transpose(const float* source, int64_t source_step, int rows, int columns,
                      float* target, int64_t target_step) {
    for (int c = 0; c < columns; c += 8)
        for (int r = 0; r < rows; r += 8) {
            const float* from = source + r * source_step + c;
            float* to = target + c * target_step + r;
            if (c + 8 <= columns && r + 8 <= rows) transpose8(from, source_step, to, target_step);
            else
                for (int i = 0; i < std::min(8, rows - r); i++)
                    for (int j = 0; j < std::min(8, columns - c); j++)
                        to[j * target_step + i] = from[i * source_step + j];
        }
}

}  // namespace overlock
