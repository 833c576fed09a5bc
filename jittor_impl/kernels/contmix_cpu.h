// ContMix (OverLoCK, section 3.2) on the CPU, forward and backward, one head of one image at a time, so that what lies
// between the affinities and the output stays in the cache. Include neighbourhood.h, lanes.h, product.h,
// na2d_av_cpu.h and activation_cpu.h before it. No atomics; sums are cut at fixed places, so the thread count changes
// no bit.
#pragma once
#include <cmath>

namespace overlock {

struct ContMixGeometry {
    int B, heads, H, W, regions, query_dim, value_dim, K1, K2;

    int pixels() const { return H * W; }
    int kernels() const { return K1 * K1 + K2 * K2; }  // weights of a pixel: of the small window, then of the large one
    int table(int K) const { return (2 * K - 1) * (2 * K - 1); }
    int64_t query(int b, int head) const { return ((int64_t)b * heads + head) * query_dim * pixels(); }
    int64_t key(int b, int head) const { return ((int64_t)b * heads + head) * query_dim * regions; }
    int64_t attn(int b, int head) const { return ((int64_t)b * heads + head) * pixels() * kernels(); }
    // The first half of the channels belongs to the small window.
    int64_t value(int b, int head, int half) const {
        return (((int64_t)b * 2 + half) * heads + head) * value_dim * pixels();
    }

    Windows windows(int half) const { return {H, W, half ? K2 : K1, kernels()}; }

    // Calls visit(weight, bias, K) for each row of the windows of pixel (i, j): K weights, and K biases of the table of
    // the small window or, behind it, of the large one.
    template <typename Visit>
    void for_window_rows(int i, int j, Visit visit) const {
        for (int half = 0; half < 2; half++) {
            const int K = half ? K2 : K1, size = 2 * K - 1;
            const int row = window_start(i, H, K) - i + K - 1, col = window_start(j, W, K) - j + K - 1;
            for (int p = 0; p < K; p++)
                visit(half * K1 * K1 + p * K, half * table(K1) + (row + p) * size + col, K);
        }
    }
};

// Memory of one thread.
struct ContMixScratch {
    const int regions, kernels, width, query_width;
    const int64_t value_step;
    int head = -1;  // whose biases are there
    std::vector<float> bias, key, affinity, weights, grad_affinity, grad_query, value, grad_out, rows, value_t, tile;
    std::vector<float> windows[2];  // of each half, since Windows::matrix keeps its zeros

    explicit ContMixScratch(const ContMixGeometry& c)
        : regions(whole_vectors(c.regions)), kernels(whole_vectors(c.kernels())), width(whole_vectors(c.value_dim)),
          query_width(whole_vectors(c.query_dim)), value_step(whole_vectors(c.pixels()) + LANES),
          key((int64_t)std::max(c.query_dim * regions, c.regions * query_width)),
          affinity((int64_t)c.pixels() * regions), weights((int64_t)c.pixels() * kernels),
          grad_affinity(affinity.size()), grad_query((int64_t)c.pixels() * query_width),
          value((int64_t)c.pixels() * width), grad_out(value.size()), rows(value.size()),
          value_t(c.value_dim * value_step) {
        for (int half = 0; half < 2; half++) windows[half].resize(c.windows(half).scratch_size());
        tile.resize(std::max(windows[0].size(), windows[1].size()));
    }

    // The relative position's bias of each weight of each pixel: (pixels, kernels).
    void find_bias(const ContMixGeometry& c, int of_head, const float* rpb1, const float* rpb2) {
        if (head == of_head) return;
        head = of_head;
        bias.resize((int64_t)c.pixels() * c.kernels());
        const int table = c.table(c.K1);
        const float *small = rpb1 + head * table, *large = rpb2 + head * c.table(c.K2);
        for (int i = 0; i < c.H; i++)
            for (int j = 0; j < c.W; j++) {
                float* at = bias.data() + (int64_t)(i * c.W + j) * c.kernels();
                c.for_window_rows(i, j, [=](int k, int entry, int K) {
                    std::copy_n(entry < table ? small + entry : large + entry - table, K, at + k);
                });
            }
    }

    // Affinity (pixels, regions) of a head's query (query_dim, pixels) and key (query_dim, regions).
    void find_affinity(const ContMixGeometry& c, const float* q, const float* k) {
        pad_rows(k, c.regions, c.query_dim, c.regions, key.data());
        product(q, 1, c.pixels(), key.data(), regions, nullptr, affinity.data(), regions,
                c.pixels(), c.query_dim, regions);
    }
};

// a = softmax(x + bias), of n floats.
inline void softmax(const float* x, const float* bias, int n, float* a) {
    const auto value = [=](int k, int count) {
        return load_few(x + k, count, -1e30f) + load_few(bias + k, count);
    };
    Lanes largest = Lanes{} - 1e30f, sum = {};
    for_vectors(n, [&](int k, int count) {
        const Lanes v = value(k, count);
        largest = v > largest ? v : largest;
    });
    const float top = reduce(largest, [](float a, float b) { return std::max(a, b); });
    for_vectors(n, [&](int k, int count) {
        float power[LANES];
        store(value(k, count) - top, power);
        for (int i = 0; i < LANES; i++) power[i] = exp_of(power[i]);
        const Lanes v = load(power);
        sum += v;
        store_few(v, count, a + k);
    });
    const float scale = 1 / sum_of(sum);
    for_vectors(n, [=](int k, int count) { store_few(load_few(a + k, count) * scale, count, a + k); });
}

// In place: from the gradient of a softmax `a`, of n floats, to that of what it was taken of.
inline void softmax_backward(const float* a, float* grad, int n) {
    Lanes sum = {};
    for_vectors(n, [&](int k, int count) { sum += load_few(a + k, count) * load_few(grad + k, count); });
    const float dot = sum_of(sum);
    for_vectors(n, [=](int k, int count) {
        store_few(load_few(a + k, count) * (load_few(grad + k, count) - dot), count, grad + k);
    });
}

// out (B, 2 * heads * value_dim, H, W) and, for the backward pass, attn (B, heads, H, W, kernels) unless null.
// query (B, heads * query_dim, H, W), key (B, heads * query_dim, regions), proj (kernels, regions), bias (kernels),
// rpb1 (heads, 2 * K1 - 1, 2 * K1 - 1), rpb2 likewise, x like out.
inline void contmix(const float* query, const float* key, const float* proj, const float* bias, const float* rpb1,
                    const float* rpb2, const float* x, float* out, float* attn, const ContMixGeometry& c) {
    const int P = c.pixels(), S = c.kernels(), small = c.K1 * c.K1;
    const int padded = whole_vectors(S);
    std::vector<float> proj_t((int64_t)c.regions * padded), start(padded);  // (regions, kernels)
    transpose(proj, c.regions, S, c.regions, proj_t.data(), padded);
    std::copy_n(bias, S, start.data());
    #pragma omp parallel
    {
        ContMixScratch s(c);
        std::vector<float> own(attn ? 0 : (int64_t)P * S);
        #pragma omp for collapse(2) schedule(static)
        for (int head = 0; head < c.heads; head++)
            for (int b = 0; b < c.B; b++) {
                s.find_bias(c, head, rpb1, rpb2);
                s.find_affinity(c, query + c.query(b, head), key + c.key(b, head));
                product(s.affinity.data(), s.regions, 1, proj_t.data(), padded, start.data(), s.weights.data(), padded,
                        P, c.regions, padded);
                float* weights = attn ? attn + c.attn(b, head) : own.data();
                for (int64_t p = 0; p < P; p++) {
                    const float *raw = s.weights.data() + p * padded, *of_position = s.bias.data() + p * S;
                    softmax(raw, of_position, small, weights + p * S);
                    softmax(raw + small, of_position + small, S - small, weights + p * S + small);
                }
                for (int half = 0; half < 2; half++) {
                    const Windows windows = c.windows(half);
                    transpose(x + c.value(b, head, half), P, c.value_dim, P, s.value.data(), s.width);
                    for (int i = 0; i < windows.rows(); i++)
                        windows.forward(i, weights + half * small, s.value.data(),
                                        s.rows.data() + (int64_t)i * c.W * s.width, s.width, s.windows[half].data());
                    transpose(s.rows.data(), s.width, P, c.value_dim, out + c.value(b, head, half), P);
                }
            }
    }
}

// Gradients of all seven inputs; attn as `contmix` left it.
inline void contmix_backward(const float* query, const float* key, const float* proj, const float* x, const float* attn,
                             const float* grad_out, float* grad_query, float* grad_key, float* grad_proj,
                             float* grad_bias, float* grad_rpb1, float* grad_rpb2, float* grad_x,
                             const ContMixGeometry& c) {
    const int P = c.pixels(), S = c.kernels(), small = c.K1 * c.K1, R = whole_vectors(c.regions);
    const int tables = c.table(c.K1) + c.table(c.K2);
    std::vector<float> padded_proj((int64_t)S * R);
    pad_rows(proj, c.regions, S, c.regions, padded_proj.data());
    // Sums over the images: a part for each chunk of the batch and each head: proj, bias, rpb1, rpb2.
    const int chunks = std::min(c.B, 16);
    const int64_t part = (int64_t)S * R + S + tables;
    std::vector<float> partial(chunks * c.heads * part);
    #pragma omp parallel
    {
        ContMixScratch s(c);
        std::vector<float> sum_pixels((int64_t)P * S);  // of `grad` below
        #pragma omp for collapse(2) schedule(static)
        for (int chunk = 0; chunk < chunks; chunk++)
            for (int head = 0; head < c.heads; head++) {
                float* sum_proj = partial.data() + ((int64_t)chunk * c.heads + head) * part;
                float *sum_bias = sum_proj + (int64_t)S * R, *sum_rpb = sum_bias + S;
                std::fill(sum_pixels.begin(), sum_pixels.end(), 0.f);
                for (int b = (int64_t)chunk * c.B / chunks; b < (int64_t)(chunk + 1) * c.B / chunks; b++) {
                    const float* weights = attn + c.attn(b, head);
                    float* grad = s.weights.data();  // of the weights, then of what the softmax was taken of: (P, S)
                    for (int half = 0; half < 2; half++) {
                        const Windows windows = c.windows(half);
                        const int64_t at = c.value(b, head, half);
                        transpose(grad_out + at, P, c.value_dim, P, s.grad_out.data(), s.width);
                        for (int d = 0; d < c.value_dim; d++)
                            std::copy_n(x + at + (int64_t)d * P, P, s.value_t.data() + d * s.value_step);
                        for (int i = 0; i < windows.rows(); i++) {
                            windows.grad_attn(i, s.grad_out.data(), s.value_t.data(), s.value_step, grad + half * small,
                                              s.width, c.value_dim, s.tile.data());
                            windows.grad_value(i, weights + half * small, s.grad_out.data(),
                                               s.rows.data() + (int64_t)i * c.W * s.width, s.width,
                                               s.windows[half].data());
                        }
                        transpose(s.rows.data(), s.width, P, c.value_dim, grad_x + at, P);
                    }
                    for (int64_t at = 0; at < (int64_t)P * S; at += S) {
                        softmax_backward(weights + at, grad + at, small);
                        softmax_backward(weights + at + small, grad + at + small, S - small);
                    }
                    for (int64_t at = 0; at < (int64_t)P * S; at++) sum_pixels[at] += grad[at];
                    const float *q = query + c.query(b, head), *k = key + c.key(b, head);
                    s.find_affinity(c, q, k);
                    product(grad, 1, S, s.affinity.data(), R, nullptr, sum_proj, R, S, P, R, true);
                    product(grad, S, 1, padded_proj.data(), R, nullptr, s.grad_affinity.data(), R, P, S, R);
                    float* key_t = s.key.data();  // (regions, query_dim)
                    transpose(k, c.regions, c.query_dim, c.regions, key_t, s.query_width);
                    product(s.grad_affinity.data(), R, 1, key_t, s.query_width, nullptr, s.grad_query.data(),
                            s.query_width, P, c.regions, s.query_width);
                    transpose(s.grad_query.data(), s.query_width, P, c.query_dim, grad_query + c.query(b, head), P);
                    // key_t becomes (query_dim, regions).
                    product(q, P, 1, s.grad_affinity.data(), R, nullptr, key_t, R, c.query_dim, P, R);
                    for (int d = 0; d < c.query_dim; d++)
                        std::copy_n(key_t + d * R, c.regions, grad_key + c.key(b, head) + (int64_t)d * c.regions);
                }
                for (int i = 0; i < c.H; i++)
                    for (int j = 0; j < c.W; j++) {
                        const float* g = sum_pixels.data() + (int64_t)(i * c.W + j) * S;
                        for (int k = 0; k < S; k++) sum_bias[k] += g[k];
                        c.for_window_rows(i, j, [=](int k, int entry, int K) {
                            for (int q = 0; q < K; q++) sum_rpb[entry + q] += g[k + q];
                        });
                    }
            }
    }
    const auto total = [&](int64_t at, int first_head, int heads) {
        float sum = 0;
        for (int chunk = 0; chunk < chunks; chunk++)
            for (int head = first_head; head < first_head + heads; head++)
                sum += partial[((int64_t)chunk * c.heads + head) * part + at];
        return sum;
    };
    for (int k = 0; k < S; k++) {
        for (int r = 0; r < c.regions; r++) grad_proj[k * c.regions + r] = total((int64_t)k * R + r, 0, c.heads);
        grad_bias[k] = total((int64_t)S * R + k, 0, c.heads);
    }
    for (int head = 0; head < c.heads; head++)
        for (int e = 0; e < tables; e++) {
            const int large = e - c.table(c.K1);
            float& grad = large < 0 ? grad_rpb1[head * c.table(c.K1) + e] : grad_rpb2[head * c.table(c.K2) + large];
            grad = total((int64_t)S * R + S + e, head, 1);
        }
}

}  // namespace overlock
