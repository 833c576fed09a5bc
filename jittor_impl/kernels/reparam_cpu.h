// UniRepLKNet's dilated reparam block in training on the CPU, forward and backward: the sum of a BatchNorm of each of some
// depthwise convolutions of one map. An image's planes stay in the cache while all branches look at them.
// Variances about each plane's own mean, then of the planes' means (Chan, Golub and LeVeque, 1983), in double.
// Include lanes.h, activation_cpu.h, inference_cpu.h and depthwise_cpu.h before it.
#pragma once

namespace overlock {

// weight (C, kernel, kernel), batches a number; the others (C). What the forward pass writes: the running statistics
// after this batch, and the number of batches in them.
struct TrainedBranch {
    const float *weight, *gamma, *beta, *running_mean, *running_var;
    const int* batches;
    float *new_mean, *new_var;
    int* new_batches;
    int kernel, dilation;
};

struct BranchGradients {
    const float *weight, *gamma;
    float *grad_weight, *grad_gamma, *grad_beta;
    int kernel, dilation;
};

// The taps of each branch, in one frame that is wide enough for all.
template <typename Branch>
inline std::vector<Taps> taps_of(const Branch* branches, int count, int H, int W) {
    std::vector<Taps> taps;
    int height = 0, width = 0;
    for (int n = 0; n < count; n++) {
        taps.emplace_back(H, W, branches[n].kernel, branches[n].dilation);
        height = std::max(height, taps[n].frame_h);
        width = std::max(width, taps[n].frame_w);
    }
    for (Taps& t : taps) t.set_frame(height, width);
    return taps;
}

// y (B, C, H, W). For the backward pass: the convolutions, (count, groups, H*W, LANES), and statistics (2, count, C),
// mean and 1 / deviation.
inline void reparam(const float* x, const TrainedBranch* branches, int count, float* y, float* convolved,
                    float* statistics, int B, int C, int H, int W, float eps, float momentum) {
    const std::vector<Taps> taps = taps_of(branches, count, H, W);
    const PlaneGroups planes(B, C);
    const int64_t pixels = (int64_t)H * W, padded = planes.groups * LANES;
    std::vector<Scratch> weights(count);
    for (int n = 0; n < count; n++) taps[n].spread(planes, branches[n].weight, false, weights[n]);
    std::vector<float> means(count * padded), squares(count * padded);  // of each plane; squares about its mean
    #pragma omp parallel
    {
        Scratch image, framed, out;
        image.resize(pixels);
        framed.resize(taps[0].framed_size());
        out.resize(pixels);
        #pragma omp for schedule(static)
        for (int64_t group = 0; group < planes.groups; group++) {
            to_lanes(x + group * LANES * pixels, planes.count(group), pixels, image.data);
            taps[0].place(image.data, framed.data);
            for (int n = 0; n < count; n++) {
                convolve(taps[n], framed.data, weights[n].data + group % planes.patterns * taps[n].count, out.data);
                const Lanes* plane = out.data;
                const Lanes mean = sum_of(pixels, [=](int64_t i) { return plane[i]; }) / (Lanes{} + (float)pixels);
                store(mean, means.data() + n * padded + group * LANES);
                store(sum_of(pixels, [=](int64_t i) { return (plane[i] - mean) * (plane[i] - mean); }),
                      squares.data() + n * padded + group * LANES);
                float* target = convolved + (n * planes.groups + group) * pixels * LANES;
                std::memcpy(target, out.data, pixels * sizeof(Lanes));
            }
        }
    }
    std::vector<float> shift(C);  // of all branches
    std::vector<float> scale((int64_t)count * C);
    for (int n = 0; n < count; n++) {
        const TrainedBranch& b = branches[n];
        *b.new_batches = *b.batches + 1;
        for (int c = 0; c < C; c++) {
            double mean = 0, square = 0;
            for (int64_t at = c; at < planes.planes; at += C) mean += means[n * padded + at];
            mean /= B;
            for (int64_t at = c; at < planes.planes; at += C) {
                const double apart = means[n * padded + at] - mean;
                square += squares[n * padded + at] + pixels * apart * apart;
            }
            const double var = square / (pixels * B);
            const float inv = 1 / std::sqrt(var + eps), m = mean;
            b.new_mean[c] = b.running_mean[c] + (m - b.running_mean[c]) * momentum;
            b.new_var[c] =
                b.running_var[c] + ((float)(square / (pixels * B - 1)) - b.running_var[c]) * momentum;
            statistics[n * C + c] = m;
            statistics[(count + n) * C + c] = inv;
            scale[n * C + c] = b.gamma[c] * inv;
            shift[c] += b.beta[c];
        }
    }
    Scratch mean_lanes, scale_lanes, shift_lanes;
    planes.spread(count, mean_lanes, [&](int c, int n) { return statistics[n * C + c]; });
    planes.spread(count, scale_lanes, [&](int c, int n) { return scale[n * C + c]; });
    planes.spread(1, shift_lanes, [&](int c, int) { return shift[c]; });
    #pragma omp parallel
    {
        Scratch sum;
        sum.resize(pixels);
        #pragma omp for schedule(static)
        for (int64_t group = 0; group < planes.groups; group++) {
            const int pattern = group % planes.patterns;
            for (int n = 0; n < count; n++) {
                const float* from = convolved + (n * planes.groups + group) * pixels * LANES;
                const Lanes mean = mean_lanes.data[pattern * count + n], scale = scale_lanes.data[pattern * count + n];
                for (int64_t i = 0; i < pixels; i++)
                    sum.data[i] = (n ? sum.data[i] : shift_lanes.data[pattern]) + (load(from + i * LANES) - mean) * scale;
            }
            from_lanes(sum.data, planes.count(group), pixels, y + group * LANES * pixels);
        }
    }
}

inline void reparam_backward(const float* x, const BranchGradients* branches, int count, const float* convolved,
                             const float* statistics, const float* grad_y, float* grad_x,
                             int B, int C, int H, int W) {
    const std::vector<Taps> taps = taps_of(branches, count, H, W);
    const PlaneGroups planes(B, C);
    const int64_t pixels = (int64_t)H * W;
    std::vector<Scratch> weights(count);
    for (int n = 0; n < count; n++) taps[n].spread(planes, branches[n].weight, true, weights[n]);
    Scratch means, invs;
    planes.spread(count, means, [&](int c, int n) { return statistics[n * C + c]; });
    planes.spread(count, invs, [&](int c, int n) { return statistics[(count + n) * C + c]; });
    // Sums over each channel: of grad_y, and of grad_y * the normalised convolution of each branch.
    std::vector<double> sum_grad(C), sum_normal((int64_t)count * C);
    {
        std::vector<float> of_planes((count + 1) * planes.groups * LANES);
        #pragma omp parallel
        {
            Scratch grad;
            grad.resize(pixels);
            #pragma omp for schedule(static)
            for (int64_t group = 0; group < planes.groups; group++) {
                const int pattern = group % planes.patterns;
                to_lanes(grad_y + group * LANES * pixels, planes.count(group), pixels, grad.data);
                const Lanes* g = grad.data;
                store(sum_of(pixels, [=](int64_t i) { return g[i]; }),
                      of_planes.data() + (count * planes.groups + group) * LANES);
                for (int n = 0; n < count; n++) {
                    const float* from = convolved + (n * planes.groups + group) * pixels * LANES;
                    const Lanes mean = means.data[pattern * count + n];
                    const Lanes sum =
                        sum_of(pixels, [=](int64_t i) { return g[i] * (load(from + i * LANES) - mean); });
                    store(sum * invs.data[pattern * count + n], of_planes.data() + (n * planes.groups + group) * LANES);
                }
            }
        }
        for (int64_t at = 0; at < planes.planes; at++) {
            sum_grad[at % C] += of_planes[count * planes.groups * LANES + at];
            for (int n = 0; n < count; n++)
                sum_normal[n * C + at % C] += of_planes[n * planes.groups * LANES + at];
        }
    }
    const double values = (double)B * pixels;
    for (int n = 0; n < count; n++)
        for (int c = 0; c < C; c++) {
            branches[n].grad_beta[c] = sum_grad[c];
            branches[n].grad_gamma[c] = sum_normal[n * C + c];
        }
    Scratch grad_means, slopes, scales;
    planes.spread(1, grad_means, [&](int c, int) { return sum_grad[c] / values; });
    planes.spread(count, slopes, [&](int c, int n) {
        return sum_normal[n * C + c] / values * statistics[(count + n) * C + c];
    });
    planes.spread(count, scales, [&](int c, int n) {
        return branches[n].gamma[c] * statistics[(count + n) * C + c];
    });
    std::vector<int> first(count + 1);  // of each branch's weights among the sums
    for (int n = 0; n < count; n++) first[n + 1] = first[n] + taps[n].count;
    GroupSums sums(planes, first[count]);
    #pragma omp parallel
    {
        Scratch image, framed, grad, branch, framed_grad, out;
        for (Scratch* map : {&image, &grad, &branch, &out}) map->resize(pixels);
        framed.resize(taps[0].framed_size());
        framed_grad.resize(taps[0].framed_size());
        sums.for_groups([&](int64_t group, Lanes* sum) {
            const int pattern = group % planes.patterns;
            to_lanes(x + group * LANES * pixels, planes.count(group), pixels, image.data);
            taps[0].place(image.data, framed.data);
            to_lanes(grad_y + group * LANES * pixels, planes.count(group), pixels, grad.data);
            for (int n = 0; n < count; n++) {
                const int at = pattern * count + n;
                const float* from = convolved + (n * planes.groups + group) * pixels * LANES;
                const Lanes mean = means.data[at], slope = slopes.data[at], scale = scales.data[at],
                            grad_mean = grad_means.data[pattern];
                for (int64_t i = 0; i < pixels; i++)
                    branch.data[i] = (grad.data[i] - grad_mean - (load(from + i * LANES) - mean) * slope) * scale;
                correlate(taps[n], framed.data, branch.data, sum + first[n]);
                taps[n].place(branch.data, framed_grad.data);
                convolve(taps[n], framed_grad.data, weights[n].data + (int64_t)pattern * taps[n].count, out.data, n > 0);
            }
            from_lanes(out.data, planes.count(group), pixels, grad_x + group * LANES * pixels);
        });
    }
    for (int n = 0; n < count; n++)  // taps that reach no pixel
        std::fill_n(branches[n].grad_weight, (int64_t)C * taps[n].K * taps[n].K, 0.f);
    sums.total([&](int c, int k, float sum) {
        const int n = std::upper_bound(first.begin(), first.end(), k) - first.begin() - 1;
        branches[n].grad_weight[(int64_t)c * taps[n].K * taps[n].K + taps[n].index[k - first[n]]] += sum;
    });
}

}  // namespace overlock
