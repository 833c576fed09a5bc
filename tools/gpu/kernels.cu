// The CUDA kernels of jittor_impl behind C functions, without Jittor, for kernels.py, which compiles it. dtype is that
// of the maps: 0 float32, 1 float16, 2 bfloat16; each function returns what went wrong, or a null pointer. With
// ON_A_CPU, tests/cuda_on_cpu.h runs them on a CPU, in float32 alone.
#ifndef ON_A_CPU
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif
#include <cstdint>
#include <exception>
#include <string>
#include <vector>

#include "neighbourhood.h"
#include "foreach_cpu.h"
#include "adamw_cpu.h"
#include "inference_cpu.h"
#include "cuda_launch.h"
#include "cuda_sum.h"
#include "foreach_cuda.h"
#include "adamw_cuda.h"
#include "depthwise_cuda.h"
#include "grn_cuda.h"
#include "merged_cuda.h"
#include "na2d_av_cuda.h"
#include "norm_cuda.h"
#include "separable_cuda.h"

#ifdef ON_A_CPU
#define OF_TYPE(dtype, ...) typedef float T; __VA_ARGS__
#else
#define OF_TYPE(dtype, ...) \
    if (dtype == 0) { typedef float T; __VA_ARGS__ } \
    if (dtype == 1) { typedef __half T; __VA_ARGS__ } \
    if (dtype == 2) { typedef __nv_bfloat16 T; __VA_ARGS__ }
#endif
#define KERNEL(name, arguments, call) \
    extern "C" const char* name(int64_t dtype, ARGUMENTS arguments) { \
        static std::string wrong; \
        try { \
            OF_TYPE(dtype, overlock::call;) \
            return nullptr; \
        } catch (const std::exception& error) { \
            wrong = error.what(); \
            return wrong.c_str(); \
        } \
    }
#define ARGUMENTS(...) __VA_ARGS__
typedef int64_t I;
typedef void* M;   // maps of T
typedef float* F;
typedef int* N;

KERNEL(depthwise, (M x, M w, M b, M y, I B, I C, I H, I W, I K, I d, I residual),
       depthwise((T*)x, (T*)w, (T*)b, (T*)y, B, C, H, W, K, d, residual, 0))
KERNEL(depthwise_gradients, (M x, M w, M gy, M gx, M gw, M gb, F partial, I B, I C, I H, I W, I K, I d, I residual,
                             I chunks),
       depthwise_gradients((T*)x, (T*)w, (T*)gy, (T*)gx, (T*)gw, (T*)gb, partial, B, C, H, W, K, d, residual, chunks,
                           0))
KERNEL(batch_norm, (M x, F w, F b, F rm, F rv, N n, M y, F m, F s, F nm, F nv, N nn, F sums, I B, I C, I P, I chunks),
       batch_norm((T*)x, w, b, rm, rv, n, (T*)y, m, s, nm, nv, nn, sums, B, C, P, 1e-5, 0.1, chunks, 0))
KERNEL(batch_norm_backward, (M x, F w, F m, F s, M gy, M gx, F gw, F gb, F sums, I B, I C, I P, I chunks),
       batch_norm_backward((T*)x, w, m, s, (T*)gy, (T*)gx, gw, gb, sums, B, C, P, chunks, 0))
KERNEL(channel_norm, (M x, F w, F b, M y, F m, F s, I B, I C, I P),
       channel_norm((T*)x, w, b, (T*)y, m, s, B, C, P, 1e-6, 0))
KERNEL(channel_norm_backward, (M x, F w, F m, F s, M gy, M gx, F gw, F gb, F sums, I B, I C, I P, I chunks),
       channel_norm_backward((T*)x, w, m, s, (T*)gy, (T*)gx, gw, gb, sums, B, C, P, chunks, 0))
KERNEL(grn, (M x, F g, F b, M y, F norms, F images, I B, I C, I P),
       grn((T*)x, g, b, (T*)y, norms, images, B, C, P, 0))
KERNEL(grn_backward, (M x, F g, F norms, M gy, M gx, F gg, F gb, F dots, F images, I B, I C, I P),
       grn_backward((T*)x, g, norms, (T*)gy, (T*)gx, gg, gb, dots, images, B, C, P, 0))
KERNEL(na2d_av_forward, (M attn, M value, M out, I N, I H, I W, I K, I dim),
       na2d_av_forward((T*)attn, (T*)value, (T*)out, N, H, W, K, dim, 0))
KERNEL(na2d_av_grad_attn, (M grad, M value, M out, I N, I H, I W, I K, I dim),
       na2d_av_grad_attn((T*)grad, (T*)value, (T*)out, N, H, W, K, dim, 0))
KERNEL(na2d_av_grad_value, (M attn, M grad, M out, I N, I H, I W, I K, I dim),
       na2d_av_grad_value((T*)attn, (T*)grad, (T*)out, N, H, W, K, dim, 0))
KERNEL(separable, (M x, F rows, F cols, M out, I planes, I H, I W, I h, I w, I transposed),
       separable((T*)x, rows, cols, (T*)out, planes, H, W, h, w, transposed, 0))

template <typename T>
static void adamw_of(T** arrays, const int64_t* sizes, int64_t count, const float* n) {
    std::vector<overlock::AdamWParameter<T>> parameters;
    for (int64_t k = 0; k < count; k++, arrays += 7)
        parameters.push_back({arrays[0], arrays[1], arrays[2], arrays[3], arrays[4], arrays[5], arrays[6], sizes[k]});
    overlock::adamw(parameters.data(), (int)count, {n[0], n[1], n[2], n[3], n[4], n[5], n[6]}, 0);
}

// arrays: two inputs and an output of each.
template <typename T>
static std::vector<overlock::Arrays<T>> arrays_of(void** arrays, const int64_t* sizes, int64_t count) {
    std::vector<overlock::Arrays<T>> all;
    for (int64_t k = 0; k < count; k++, arrays += 3)
        all.push_back({(T*)arrays[0], (T*)arrays[1], (T*)arrays[2], sizes[k]});
    return all;
}

template <typename T>
static void merged_of(const T* x, float** arrays, const int64_t* kernels, const int64_t* dilations, int64_t count, T* y,
                      T* weight, T* bias, int64_t B, int64_t C, int64_t H, int64_t W) {
    std::vector<overlock::Branch> branches;
    for (int64_t k = 0; k < count; k++, arrays += 5)
        branches.push_back({arrays[0], nullptr, (int)kernels[k], (int)dilations[k],
                            {arrays[1], arrays[2], arrays[3], arrays[4], 1e-5f}});
    overlock::merged_depthwise(x, branches.data(), (int)count, y, weight, bias, B, C, H, W, 0);
}

// arrays: parameter, gradient, moments, and their new ones, of each; numbers: those of AdamWNumbers; all on the host.
namespace overlock { using ::adamw_of; using ::arrays_of; using ::merged_of; }
KERNEL(adamw, (void** arrays, int64_t* sizes, I count, F numbers), adamw_of<T>((T**)arrays, sizes, count, numbers))
KERNEL(lerp, (void** arrays, int64_t* sizes, I count, I percent),
       lerp(arrays_of<T>(arrays, sizes, count).data(), count, percent / 100.f, 0))
KERNEL(scale, (void** arrays, int64_t* sizes, I count, F factor),
       scale(arrays_of<T>(arrays, sizes, count).data(), count, factor, 0))
KERNEL(sum_of_squares, (void** arrays, int64_t* sizes, I count, double* total, F sums, I blocks),
       sum_of_squares(arrays_of<T>(arrays, sizes, count).data(), count, total, sums, blocks, 0))
// arrays: weight and BatchNorm's weight, bias, mean and variance of each branch.
KERNEL(merged_depthwise, (M x, float** arrays, int64_t* kernels, int64_t* dilations, I count, M y, M w, M b,
                          I B, I C, I H, I W),
       merged_of<T>((T*)x, arrays, kernels, dilations, count, (T*)y, (T*)w, (T*)b, B, C, H, W))
