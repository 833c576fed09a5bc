// Runs the CUDA kernels on a CPU, for every type, and compares them with the CPU kernels: prints the largest relative
// error of each and exits with status 1 if one is beyond rounding.
#include "cuda_on_cpu.h"
#include <random>

#include "neighbourhood.h"
#include "lanes.h"
#include "activation_cpu.h"
#include "inference_cpu.h"
#include "product.h"
#include "na2d_av_cpu.h"
#include "depthwise_cpu.h"
#include "norm_cpu.h"
#include "foreach_cpu.h"
#include "adamw_cpu.h"
#include "separable_cpu.h"
#include "cuda_launch.h"
#include "cuda_sum.h"
#include "na2d_av_cuda.h"
#include "depthwise_cuda.h"
#include "norm_cuda.h"
#include "grn_cuda.h"
#include "separable_cuda.h"
#include "merged_cuda.h"
#include "foreach_cuda.h"
#include "adamw_cuda.h"

// A number of so many significant bits, as its type on a GPU: rounded to nearest, ties to even.
template <int BITS, int MIN_EXPONENT>
struct Rounded {
    float value;
    Rounded() : value(NAN) {}
    explicit Rounded(float x) {
        int exponent = 0;  // frexp leaves it alone for NaN
        std::frexp(x, &exponent);
        const float unit = std::ldexp(1.f, std::max(exponent, MIN_EXPONENT) - BITS);
        value = std::nearbyint(x / unit) * unit;
    }
    operator float() const { return value; }
};
typedef Rounded<11, -13> Half;
typedef Rounded<8, -125> BFloat16;

template <typename T> constexpr double roundoff() { return 0; }  // by storing a result as T
template <> constexpr double roundoff<Half>() { return 1. / (1 << 11); }
template <> constexpr double roundoff<BFloat16>() { return 1. / (1 << 8); }

static std::mt19937 generator;
static bool failed = false;

// Numbers that T holds exactly, as T and as float.
template <typename T>
struct Array {
    std::vector<T> cuda;
    std::vector<float> cpu;
    operator const T*() const { return cuda.data(); }
    const float* f() const { return cpu.data(); }
};

template <typename T>
static Array<T> normal(size_t size, float mean = 0) {
    std::normal_distribution<float> distribution(mean);
    Array<T> array;
    for (size_t i = 0; i < size; i++) {
        array.cuda.push_back((T)distribution(generator));
        array.cpu.push_back(array.cuda.back());
    }
    return array;
}

// A result of both: float of the CPU, T of CUDA. Their difference may be the rounding to T beside `limit` for the sums.
template <typename T>
struct Result {
    std::vector<T> cuda;
    std::vector<float> cpu;
    explicit Result(size_t size) : cuda(size, T(NAN)), cpu(size, NAN) {}
    operator T*() { return cuda.data(); }
    float* f() { return cpu.data(); }

    void compare(const char* name, double limit = 5e-6) {
        double difference = 0, size = 0;
        for (size_t i = 0; i < cpu.size(); i++) {
            const double d = std::abs((double)(float)cuda[i] - cpu[i]);
            difference = std::max(difference, d < 1e30 ? d : 1e30);
            size = std::max(size, (double)std::abs(cpu[i]));
        }
        limit += roundoff<T>();
        std::printf("  %s %.1e (limit %.1e)\n", name, difference / size, limit);
        failed |= !(difference <= limit * size);
        std::fill(cuda.begin(), cuda.end(), T(NAN));
    }
};

template <typename T>
static void depthwise(int B, int C, int H, int W, int K, int dilation) {
    std::printf("depthwise %dx%dx%dx%d, kernel %d, dilation %d\n", B, C, H, W, K, dilation);
    const size_t size = (size_t)B * C * H * W;
    const int chunks = std::min(B, 16);
    const auto x = normal<T>(size), grad_y = normal<T>(size), weight = normal<T>(C * K * K), bias = normal<T>(C);
    Result<T> y(size), grad_x(size), grad_weight(C * K * K), grad_bias(C);
    std::vector<float> partial((size_t)chunks * C * (K * K + 1), NAN);
    overlock::depthwise(x.f(), weight.f(), bias.f(), y.f(), B, C, H, W, K, dilation, true);
    overlock::depthwise<T>(x, weight, bias, y, B, C, H, W, K, dilation, true, 0);
    y.compare("y");
    overlock::depthwise_gradients(x.f(), weight.f(), grad_y.f(), grad_x.f(), grad_weight.f(), grad_bias.f(),
                                  B, C, H, W, K, dilation, true);
    overlock::depthwise_gradients<T>(x, weight, grad_y, grad_x, grad_weight, grad_bias, partial.data(),
                                     B, C, H, W, K, dilation, true, chunks, 0);
    grad_x.compare("grad_x");
    grad_weight.compare("grad_weight");
    grad_bias.compare("grad_bias");
}

// A kernel of K, one of 3 with a bias and one dilated by 2 without a norm.
template <typename T>
static void merged_depthwise(int B, int C, int H, int W, int K) {
    std::printf("merged depthwise %dx%dx%dx%d, kernel %d\n", B, C, H, W, K);
    const auto x = normal<T>((size_t)B * C * H * W);
    const auto weight = normal<float>(C * (K * K + 9 + 9)), values = normal<float>(C * 8), var = normal<float>(C, 9);
    const float *w = weight.f(), *v = values.f();
    const overlock::Norm norm = {v, v + C, v + 2 * C, var.f(), 1e-5f};
    const overlock::Norm other = {v + 3 * C, v + 4 * C, v + 5 * C, var.f(), 1e-3f};
    const overlock::Branch branches[] = {
        {w, nullptr, K, 1, norm}, {w + C * K * K, v + 6 * C, 3, 1, other}, {w + C * (K * K + 9), nullptr, 3, 2, {}}};
    Result<T> y(x.cuda.size());
    std::vector<T> merged(C * K * K, T(NAN)), bias(C, T(NAN));
    overlock::merged_depthwise(x.f(), branches, 3, overlock::IDENTITY, y.f(), B, C, H, W);
    overlock::merged_depthwise<T>(x, branches, 3, y, merged.data(), bias.data(), B, C, H, W, 0);
    // The merged weights are of type T too, each off by its rounding.
    y.compare("y", 5e-6 + 2 * roundoff<T>());
}

template <typename T>
static void na2d_av(int N, int H, int W, int K, int dim) {
    const int channels[] = {overlock::choose_tiling(N, H, W, K, dim, overlock::windows_of).channels,
                            overlock::choose_tiling(N, H, W, K, dim, overlock::queries_of).channels};
    std::printf("na2d_av %dx%dx%dx%d, kernel %d, tiled by %d and %d channels\n",
                N, H, W, dim, K, channels[0], channels[1]);
    const size_t pixels = (size_t)N * H * W;
    const auto attn = normal<T>(pixels * K * K), value = normal<T>(pixels * dim), grad_out = normal<T>(pixels * dim);
    Result<T> out(pixels * dim), grad_attn(pixels * K * K);
    overlock::na2d_av_forward(attn.f(), value.f(), out.f(), N, H, W, K, dim);
    overlock::na2d_av_forward<T>(attn, value, out, N, H, W, K, dim, 0);
    out.compare("out");
    overlock::na2d_av_grad_attn(grad_out.f(), value.f(), grad_attn.f(), N, H, W, K, dim);
    overlock::na2d_av_grad_attn<T>(grad_out, value, grad_attn, N, H, W, K, dim, 0);
    grad_attn.compare("grad_attn");
    overlock::na2d_av_grad_value(attn.f(), grad_out.f(), out.f(), N, H, W, K, dim);
    overlock::na2d_av_grad_value<T>(attn, grad_out, out, N, H, W, K, dim, 0);
    out.compare("grad_value");
}

// BatchNorm and LayerNorm: parameters of type Param, mean `mean` standard deviations from 0.
template <typename T, typename Param>
static void norms(int B, int C, int P, int chunks, float mean) {
    std::printf("norms %dx%dx%d in %d chunks, mean %g\n", B, C, P, chunks, mean);
    const size_t size = (size_t)B * C * P;
    // A mean is off by half a unit in the last place at least, relative to the spread;
    // sums of float32 add several of them.
    const double limit = 5e-6 + 20 * mean * 1.2e-7;
    const auto x = normal<T>(size, mean), grad_y = normal<T>(size);
    const auto weight = normal<Param>(C), bias = normal<Param>(C);
    const auto old_mean = normal<float>(C), old_var = normal<float>(C);
    Result<T> y(size), grad_x(size);
    Result<Param> grad_weight(C), grad_bias(C);
    std::vector<float> scratch((size_t)(chunks + 1) * C * 2, NAN);
    {
        Result<float> m(C), inv(C), new_mean(C), new_var(C);
        const int batches = 7;
        int new_batches[2] = {};
        overlock::batch_norm(x.f(), weight.f(), bias.f(), old_mean.f(), old_var.f(), &batches, y.f(), m.f(), inv.f(),
                             new_mean.f(), new_var.f(), new_batches, B, C, P, 1e-5, 0.1);
        overlock::batch_norm<T, Param>(x, weight, bias, old_mean, old_var, &batches, y, m, inv, new_mean, new_var,
                                       new_batches + 1, scratch.data(), B, C, P, 1e-5, 0.1, chunks, 0);
        failed |= new_batches[0] != 8 || new_batches[1] != 8;
        y.compare("batch_norm y", limit);
        new_mean.compare("running mean");
        new_var.compare("running variance");
        overlock::batch_norm_backward(x.f(), weight.f(), m.f(), inv.f(), grad_y.f(), grad_x.f(), grad_weight.f(),
                                      grad_bias.f(), B, C, P);
        overlock::batch_norm_backward<T, Param>(x, weight, m, inv, grad_y, grad_x, grad_weight, grad_bias,
                                                scratch.data(), B, C, P, chunks, 0);
        grad_x.compare("batch_norm grad_x", limit);
        grad_weight.compare("batch_norm grad_weight", limit);
        grad_bias.compare("batch_norm grad_bias");
    }
    Result<float> m(B * P), inv(B * P);
    overlock::channel_norm(x.f(), weight.f(), bias.f(), y.f(), m.f(), inv.f(), B, C, P, 1e-6);
    overlock::channel_norm<T, Param>(x, weight, bias, y, m, inv, B, C, P, 1e-6, 0);
    y.compare("channel_norm y", limit);
    overlock::channel_norm_backward(x.f(), weight.f(), m.f(), inv.f(), grad_y.f(), grad_x.f(), grad_weight.f(),
                                    grad_bias.f(), B, C, P);
    overlock::channel_norm_backward<T, Param>(x, weight, m, inv, grad_y, grad_x, grad_weight, grad_bias, scratch.data(),
                                              B, C, P, chunks, 0);
    grad_x.compare("channel_norm grad_x", limit);
    grad_weight.compare("channel_norm grad_weight", limit);
    grad_bias.compare("channel_norm grad_bias");
}

template <typename T, typename Param>
static void grn(int B, int C, int P) {
    std::printf("grn %dx%dx%d\n", B, C, P);
    auto x = normal<T>((size_t)B * C * P);
    for (int i = 0; i < P; i++) x.cuda[i] = T(x.cpu[i] = 0);  // a dead channel
    const auto grad_y = normal<T>(x.cuda.size());
    const auto gamma = normal<Param>(C), beta = normal<Param>(C);
    Result<T> y(x.cuda.size());
    Result<float> norms(B * C);
    Result<Param> grad_gamma(C), grad_beta(C);
    std::vector<float> dots(B * C * 2, NAN), images(B * 2, NAN);
    overlock::grn(x.f(), gamma.f(), beta.f(), y.f(), norms.f(), B, C, P);
    overlock::grn<T, Param>(x, gamma, beta, y, norms, images.data(), B, C, P, 0);
    y.compare("y");
    overlock::grn_backward(x.f(), gamma.f(), norms.f(), grad_y.f(), y.f(), grad_gamma.f(), grad_beta.f(), B, C, P);
    overlock::grn_backward<T, Param>(x, gamma, norms, grad_y, y, grad_gamma, grad_beta, dots.data(), images.data(),
                                     B, C, P, 0);
    y.compare("grad_x");
    grad_gamma.compare("grad_gamma");
    grad_beta.compare("grad_beta");
}

// With zeros around a window of each row, and one row of nothing else.
template <typename T>
static void separable(int planes, int H, int W, int h, int w) {
    std::printf("separable %dx%dx%d to %dx%d\n", planes, H, W, h, w);
    const auto x = normal<T>((size_t)planes * H * W);
    auto rows = normal<float>(h * H), cols = normal<float>(w * W);
    for (int i = 0; i < h; i++)
        for (int y = 0; y < H; y++)
            if (y < i / 2 || y > H - i || i == h - 1) rows.cpu[i * H + y] = 0;
    for (const bool transposed : {false, true}) {
        Result<T> out((size_t)planes * h * w);
        overlock::separable(x.f(), rows.f(), cols.f(), out.f(), planes, H, W, h, w, transposed);
        overlock::separable<T>(x, rows.f(), cols.f(), out, planes, H, W, h, w, transposed, 0);
        out.compare(transposed ? "transposed" : "out");
    }
}

// Sizes of no number, of one block and of several, the last of which is not full.
template <typename T>
static void adamw(std::vector<int64_t> sizes) {
    std::printf("adamw of %d parameters\n", (int)sizes.size());
    const overlock::AdamWNumbers numbers = {0.9f, 0.1f, 0.999f, 0.001f, 0.02f, 0.3f, 1e-6f};
    std::vector<overlock::AdamWParameter<T>> parameters;
    std::vector<Array<T>> p, g, m, v;
    std::vector<Result<T>> new_p, new_m, new_v;
    for (int64_t size : sizes) {
        p.push_back(normal<T>(size)), g.push_back(normal<T>(size)), m.push_back(normal<T>(size));
        v.push_back(normal<T>(size, 9));  // a mean of squares is positive
        new_p.emplace_back(size), new_m.emplace_back(size), new_v.emplace_back(size);
    }
    for (size_t k = 0; k < sizes.size(); k++) {
        parameters.push_back({p[k], g[k], m[k], v[k], new_p[k], new_m[k], new_v[k], sizes[k]});
        overlock::adamw(p[k].f(), g[k].f(), m[k].f(), v[k].f(), new_p[k].f(), new_m[k].f(), new_v[k].f(), sizes[k],
                        numbers);
    }
    overlock::adamw<T>(parameters.data(), sizes.size(), numbers, 0);
    for (size_t k = 0; k < sizes.size(); k++) {
        if (!sizes[k]) continue;
        new_p[k].compare("p");
        new_m[k].compare("m");
        new_v[k].compare("v");
    }
}

template <typename T>
static void foreach(std::vector<int64_t> sizes) {
    std::printf("foreach of %d arrays\n", (int)sizes.size());
    const float weight = 0.3f, factor = 0.7f;
    std::vector<overlock::Arrays<float>> cpu;
    std::vector<overlock::Arrays<T>> cuda;
    std::vector<Array<T>> a, b;
    std::vector<Result<T>> out;
    for (int64_t size : sizes) a.push_back(normal<T>(size)), b.push_back(normal<T>(size)), out.emplace_back(size);
    for (size_t k = 0; k < sizes.size(); k++) {
        cpu.push_back({a[k].f(), b[k].f(), out[k].f(), sizes[k]});
        cuda.push_back({a[k], b[k], out[k], sizes[k]});
    }
    const int count = sizes.size(), blocks = 5;
    overlock::lerp(cpu.data(), count, weight);
    overlock::lerp(cuda.data(), count, weight, 0);
    for (int k = 0; k < count; k++)
        if (sizes[k]) out[k].compare("lerp");
    overlock::scale(cpu.data(), count, &factor);
    overlock::scale(cuda.data(), count, &factor, 0);
    for (int k = 0; k < count; k++)
        if (sizes[k]) out[k].compare("scale");
    double total = NAN, cuda_total = NAN;
    std::vector<float> sums(blocks, NAN);
    overlock::sum_of_squares(cpu.data(), count, &total);
    overlock::sum_of_squares(cuda.data(), count, &cuda_total, sums.data(), blocks, 0);
    Result<float> squares(1);
    squares.cpu[0] = total, squares.cuda[0] = cuda_total;
    squares.compare("sum of squares");
}

template <typename T, typename Param>
static void a_few() {
    depthwise<T>(2, 2, 9, 18, 5, 1);
    depthwise<T>(3, 1, 5, 6, 3, 2);
    na2d_av<T>(2, 9, 9, 7, 5);
    na2d_av<T>(1, 11, 17, 3, 7);
    norms<T, Param>(3, 5, 6, 2, 1);
    grn<T, Param>(2, 5, 6);
    separable<T>(5, 9, 8, 7, 6);
    merged_depthwise<T>(2, 3, 7, 9, 7);
    adamw<T>({3, 1025});
    foreach<T>({1025, 3});
}

int main() {
    for (const bool reversed : {false, true}) {
        last_first = reversed;
        generator.seed(0);
        std::printf("%s\n", reversed ? "LAST THREAD FIRST" : "FIRST THREAD FIRST");
        depthwise<float>(2, 3, 4, 4, 3, 1);
        depthwise<float>(3, 2, 17, 20, 3, 7);
        depthwise<float>(1, 2, 9, 33, 5, 2);
        depthwise<float>(2, 1, 16, 16, 13, 1);
        depthwise<float>(1, 1, 7, 18, 17, 1);
        depthwise<float>(18, 1, 2, 3, 19, 1);
        depthwise<float>(1, 1, 3, 5, 31, 1);
        na2d_av<float>(2, 9, 9, 9, 12);
        na2d_av<float>(3, 7, 11, 5, 3);
        na2d_av<float>(2, 14, 15, 7, 18);
        na2d_av<float>(1, 16, 33, 3, 4);
        na2d_av<float>(1, 29, 28, 13, 6);
        na2d_av<float>(1, 15, 15, 15, 5);
        norms<float, float>(2, 2, 700, 2, 0);
        norms<float, float>(1, 2, 1333, 3, 20);
        norms<float, float>(33, 9, 1, 1, 200);
        norms<float, float>(2, 21, 3, 1, 200);
        grn<float, float>(3, 5, 16);
        grn<float, float>(2, 3, 1100);
        grn<float, float>(1, 300, 2);
        merged_depthwise<float>(2, 5, 9, 20, 13);
        merged_depthwise<float>(1, 20, 3, 2, 5);
        separable<float>(300, 13, 2, 7, 7);
        separable<float>(2, 4, 6, 9, 15);
        separable<float>(1, 40, 33, 1, 2);
        adamw<float>({0, 1, 1024, 1025, 3000, 7});
        adamw<float>(std::vector<int64_t>(overlock::FOREACH_GROUP, 2));
        foreach<float>({0, 1, 1024, 1025, 9000, 7});
        foreach<float>(std::vector<int64_t>(overlock::FOREACH_GROUP, 2));
        std::printf("half\n");
        a_few<Half, float>();
        a_few<Half, Half>();
        std::printf("bfloat16\n");
        a_few<BFloat16, float>();
    }
    return failed;
}
