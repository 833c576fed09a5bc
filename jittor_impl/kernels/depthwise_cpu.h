// Depthwise convolution on the CPU, stride 1, padding that keeps the size, any odd kernel and dilation:
// forward and both gradients. x, y (B, C, H, W), weight (C, K, K), bias (C), all contiguous float32.
// No atomics; sums are cut at fixed places, so the thread count changes no bit.
// Include lanes.h and inference_cpu.h before it.
#pragma once

namespace overlock {

// Planes (H, W) of a map (B, C, H, W), LANES at a time. They follow each other in memory whatever image they belong to,
// so that a group may reach into the next image, and no lane stays empty where C is no multiple of LANES. Groups that
// are `patterns` apart have the same channels.
struct PlaneGroups {
    int64_t planes, groups;
    int C, patterns;

    PlaneGroups(int B, int C) : planes((int64_t)B * C), groups((planes + LANES - 1) / LANES), C(C), patterns(1) {
        while (patterns * LANES % C) patterns++;
    }

    int count(int64_t group) const { return std::min<int64_t>(LANES, planes - group * LANES); }
    int channel(int64_t group, int lane) const { return (group * LANES + lane) % C; }

    // values(channel, k) for 0 <= k < size, in lanes: pattern, k, lane.
    template <typename Values>
    void spread(int size, Scratch& target, Values values) const {
        target.resize((int64_t)patterns * size);
        float* out = reinterpret_cast<float*>(target.data);
        for (int pattern = 0; pattern < patterns; pattern++)
            for (int k = 0; k < size; k++)
                for (int e = 0; e < LANES; e++) *out++ = values(channel(pattern, e), k);
    }
};

// Geometry of one convolution on lanes: the image stands in a frame of zeros, as wide as the taps that can reach it.
struct Taps {
    int H, W, K, frame_h, frame_w, stride, count = 0;
    std::vector<int> index, dy, dx, offset;  // of each tap that reaches the map: its place in K*K, and in the framed image

    Taps(int H, int W, int K, int dilation) : H(H), W(W), K(K) {
        const int reach = K / 2;
        const int reach_h = dilation * std::min(reach, (H - 1) / dilation);
        const int reach_w = dilation * std::min(reach, (W - 1) / dilation);
        for (int p = 0; p < K; p++)
            for (int q = 0; q < K; q++) {
                const int y = (p - reach) * dilation, x = (q - reach) * dilation;
                if (std::abs(y) > reach_h || std::abs(x) > reach_w) continue;
                index.push_back(p * K + q);
                dy.push_back(y);
                dx.push_back(x);
                count++;
            }
        set_frame(reach_h, reach_w);
    }

    void set_frame(int height, int width) {
        frame_h = height;
        frame_w = width;
        stride = W + 2 * width;
        offset.clear();
        for (int k = 0; k < count; k++) offset.push_back((dy[k] + height) * stride + dx[k] + width);
    }

    int64_t framed_size() const { return (int64_t)(H + 2 * frame_h) * stride; }

    // (H*W, LANES) into the middle of the frame; the frame itself is zero already.
    void place(const Lanes* image, Lanes* framed) const {
        for (int i = 0; i < H; i++)
            std::memcpy(framed + (int64_t)(i + frame_h) * stride + frame_w, image + (int64_t)i * W, W * sizeof(Lanes));
    }

    // The weights (C, K, K) of the taps in lanes. flip: of the kernel turned by 180 degrees, which turns the forward pass
    // into the gradient with respect to x.
    void spread(const PlaneGroups& planes, const float* weight, bool flip, Scratch& target) const {
        planes.spread(count, target, [&](int c, int k) {
            return weight[(int64_t)c * K * K + (flip ? K * K - 1 - index[k] : index[k])];
        });
    }
};

// R x T pixels at once: enough independent sums to hide the latency of a multiply-add.
template <int R, int T>
inline void convolve_tile(const Taps& taps, const Lanes* framed, const Lanes* weight, Lanes* out, bool add) {
    Lanes sum[R][T] = {};
    for (int r = 0; add && r < R; r++)
        for (int t = 0; t < T; t++) sum[r][t] = out[(int64_t)r * taps.W + t];
    for (int k = 0; k < taps.count; k++) {
        const Lanes w = weight[k];
        const Lanes* x = framed + taps.offset[k];
        for (int r = 0; r < R; r++)
            for (int t = 0; t < T; t++) sum[r][t] += w * x[r * taps.stride + t];
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) out[(int64_t)r * taps.W + t] = sum[r][t];
}

template <int R>
inline void convolve_rows(const Taps& taps, const Lanes* framed, const Lanes* weight, Lanes* out, bool add) {
    int j = 0;
    if (R == 1)
        for (; j + 8 <= taps.W; j += 8) convolve_tile<R, 8>(taps, framed + j, weight, out + j, add);
    for (; j + 4 <= taps.W; j += 4) convolve_tile<R, 4>(taps, framed + j, weight, out + j, add);
    for (; j + 2 <= taps.W; j += 2) convolve_tile<R, 2>(taps, framed + j, weight, out + j, add);
    for (; j < taps.W; j++) convolve_tile<R, 1>(taps, framed + j, weight, out + j, add);
}

// out = the convolution of an image in its frame; plus what out was if add.
inline void convolve(const Taps& taps, const Lanes* framed, const Lanes* weight, Lanes* out, bool add = false) {
    int i = 0;
    if (taps.W < 8)
        for (; i + 2 <= taps.H; i += 2)
            convolve_rows<2>(taps, framed + (int64_t)i * taps.stride, weight, out + (int64_t)i * taps.W, add);
    for (; i < taps.H; i++)
        convolve_rows<1>(taps, framed + (int64_t)i * taps.stride, weight, out + (int64_t)i * taps.W, add);
}

// y = x * weight (+ bias) (+ x if residual)
inline void depthwise(const float* x, const float* weight, const float* bias, float* y, int B, int C, int H, int W,
                      int K, int dilation, bool residual, Activation activation = IDENTITY) {
    const Taps taps(H, W, K, dilation);
    const PlaneGroups planes(B, C);
    const int64_t pixels = (int64_t)H * W;
    Scratch weights, biases;
    taps.spread(planes, weight, false, weights);
    planes.spread(1, biases, [&](int c, int) { return bias ? bias[c] : 0; });
    #pragma omp parallel
    {
        Scratch image, framed, out;
        image.resize(pixels);
        framed.resize(taps.framed_size());
        out.resize(pixels);
        #pragma omp for schedule(static)
        for (int64_t group = 0; group < planes.groups; group++) {
            const int count = planes.count(group), pattern = group % planes.patterns;
            const int64_t start = group * LANES * pixels;
            to_lanes(x + start, count, pixels, image.data);
            taps.place(image.data, framed.data);
            convolve(taps, framed.data, weights.data + (int64_t)pattern * taps.count, out.data);
            const Lanes b = biases.data[pattern];
            if (residual)
                for (int64_t i = 0; i < pixels; i++) out.data[i] += image.data[i] + b;
            else if (bias)
                for (int64_t i = 0; i < pixels; i++) out.data[i] += b;
            from_lanes(out.data, count, pixels, y + start);
            activate(activation, y + start, count * pixels);
        }
    }
}

// N taps at once: sum[k] += gradient of each output pixel * the input pixel under tap k.
template <int N>
inline void correlate_taps(const Taps& taps, const Lanes* framed, const Lanes* grad, const int* offset, Lanes* sums) {
    Lanes sum[N] = {};
    for (int i = 0; i < taps.H; i++) {
        const Lanes* x = framed + (int64_t)i * taps.stride;
        const Lanes* g = grad + (int64_t)i * taps.W;
        for (int j = 0; j < taps.W; j++)
            for (int k = 0; k < N; k++) sum[k] += g[j] * x[j + offset[k]];
    }
    for (int k = 0; k < N; k++) sums[k] += sum[k];
}

// sums (taps) += the gradient of the weights, from an image in its frame and the gradient (H*W) of the output.
inline void correlate(const Taps& taps, const Lanes* framed, const Lanes* grad, Lanes* sums) {
    int k = 0;
    for (; k + 9 < taps.count; k += 8) correlate_taps<8>(taps, framed, grad, taps.offset.data() + k, sums + k);
    if (k + 9 == taps.count) {  // as for any odd square; the ninth alone would take as long as the eight
        correlate_taps<9>(taps, framed, grad, taps.offset.data() + k, sums + k);
        k += 9;
    }
    for (; k + 4 <= taps.count; k += 4) correlate_taps<4>(taps, framed, grad, taps.offset.data() + k, sums + k);
    for (; k < taps.count; k++) correlate_taps<1>(taps, framed, grad, taps.offset.data() + k, sums + k);
}

// Sums over a batch of what each group of planes adds to `size` vectors of its pattern's: cut at fixed places, a part
// for each chunk of the groups, so that the thread count changes no bit.
struct GroupSums {
    const PlaneGroups& planes;
    const int size, chunks;
    Scratch partial;  // chunk, pattern, size

    GroupSums(const PlaneGroups& planes, int size)
        : planes(planes), size(size), chunks(std::min<int64_t>(16, (planes.groups - 1) / planes.patterns + 1)) {
        partial.resize((int64_t)chunks * planes.patterns * size);
    }

    // Within a parallel region, by all threads: calls work(group, sums).
    template <typename Work>
    void for_groups(Work work) {
        #pragma omp for collapse(2) schedule(static)
        for (int chunk = 0; chunk < chunks; chunk++)
            for (int pattern = 0; pattern < planes.patterns; pattern++) {
                Lanes* sums = partial.data + ((int64_t)chunk * planes.patterns + pattern) * size;
                const int64_t rounds = (planes.groups - 1) / planes.patterns + 1;  // of all patterns
                for (int64_t n = rounds * chunk / chunks; n < rounds * (chunk + 1) / chunks; n++)
                    if (n * planes.patterns + pattern < planes.groups) work(n * planes.patterns + pattern, sums);
            }
    }

    // The sum of `size` vectors, by channel: add(channel, k, sum).
    template <typename Add>
    void total(Add add) const {
        const float* sums = reinterpret_cast<const float*>(partial.data);
        for (int64_t at = 0; at < (int64_t)planes.patterns * LANES; at++)
            for (int k = 0; k < size; k++) {
                float sum = 0;
                for (int chunk = 0; chunk < chunks; chunk++)
                    sum += sums[(((int64_t)chunk * planes.patterns + at / LANES) * size + k) * LANES + at % LANES];
                add(at % planes.C, k, sum);
            }
    }
};

// The gradients with respect to x, weight and, unless null, bias, given that of y.
inline void depthwise_gradients(const float* x, const float* weight, const float* grad_y, float* grad_x,
                                float* grad_weight, float* grad_bias, int B, int C, int H, int W, int K, int dilation,
                                bool residual) {
    const Taps taps(H, W, K, dilation);
    const PlaneGroups planes(B, C);
    const int64_t pixels = (int64_t)H * W;
    Scratch weights;
    taps.spread(planes, weight, true, weights);
    GroupSums sums(planes, taps.count + 1);  // the last one is the bias'
    #pragma omp parallel
    {
        Scratch image, grad, framed;
        image.resize(pixels);
        grad.resize(pixels);
        framed.resize(taps.framed_size());
        sums.for_groups([&](int64_t group, Lanes* sum) {
            const int count = planes.count(group);
            const int64_t start = group * LANES * pixels;
            to_lanes(x + start, count, pixels, image.data);
            taps.place(image.data, framed.data);
            to_lanes(grad_y + start, count, pixels, grad.data);
            correlate(taps, framed.data, grad.data, sum);
            const Lanes* g = grad.data;
            if (grad_bias) sum[taps.count] += sum_of(pixels, [=](int64_t i) { return g[i]; });
            taps.place(grad.data, framed.data);
            Lanes* out = image.data;
            convolve(taps, framed.data, weights.data + group % planes.patterns * taps.count, out);
            if (residual)
                for (int64_t i = 0; i < pixels; i++) out[i] += g[i];
            from_lanes(out, count, pixels, grad_x + start);
        });
    }
    std::fill(grad_weight, grad_weight + (int64_t)C * K * K, 0.f);  // taps that reach no pixel
    if (grad_bias) std::fill(grad_bias, grad_bias + C, 0.f);
    sums.total([&](int c, int k, float sum) {
        if (k < taps.count) grad_weight[(int64_t)c * K * K + taps.index[k]] += sum;
        else if (grad_bias) grad_bias[c] += sum;
    });
}

// y in inference: the sum of all branches as one convolution by a merged kernel of the first branch's size
// (UniRepLKNet's dilated reparam block), and an activation.
inline void merged_depthwise(const float* x, const Branch* branches, int count, Activation activation, float* y,
                             int B, int C, int H, int W) {
    const int K = branches[0].kernel;
    std::vector<float> weight((int64_t)C * K * K), bias(C);
    for (int n = 0; n < count; n++) {
        const Branch& b = branches[n];
        const int first = K / 2 - b.dilation * (b.kernel / 2);
        for (int c = 0; c < C; c++) {
            const float scale = b.norm.scale(c);
            for (int p = 0; p < b.kernel; p++)
                for (int q = 0; q < b.kernel; q++)
                    weight[((int64_t)c * K + first + p * b.dilation) * K + first + q * b.dilation] +=
                        scale * b.weight[((int64_t)c * b.kernel + p) * b.kernel + q];
            bias[c] += b.norm.shift(c, b.bias);
        }
    }
    depthwise(x, weight.data(), bias.data(), y, B, C, H, W, K, 1, false, activation);
}

}  // namespace overlock
