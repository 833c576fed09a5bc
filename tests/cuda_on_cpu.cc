// Runs the CUDA kernels on a CPU, a thread for each of CUDA's, and compares them with the CPU kernels: prints the largest
// relative error of each and exits with status 1 if one is beyond rounding.
#include <pthread.h>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#define __global__
#define __device__
typedef int cudaStream_t;
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
static thread_local dim3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;
static pthread_barrier_t barrier;
static std::vector<float> shared_memory;
inline void __syncthreads() { pthread_barrier_wait(&barrier); }

// A thread that leaves a kernel early would be missed at the barrier, so blocks end with one that all of them reach; a kernel
// must not wait for others after some have left, which holds on a GPU too.
template <typename Kernel>
void launch(Kernel kernel, dim3 grid, unsigned threads, size_t shared_bytes) {
    gridDim = grid;
    blockDim = dim3(threads);
    std::vector<std::thread> pool;
    pthread_barrier_init(&barrier, nullptr, threads);
    shared_memory.assign(shared_bytes / sizeof(float) + 1, NAN);
    for (unsigned t = 0; t < threads; t++)
        pool.emplace_back([=] {
            threadIdx = dim3(t);
            for (unsigned z = 0; z < grid.z; z++)
                for (unsigned y = 0; y < grid.y; y++)
                    for (unsigned x = 0; x < grid.x; x++) {
                        blockIdx = dim3(x, y, z);
                        kernel();
                        __syncthreads();
                    }
        });
    for (auto& thread : pool) thread.join();
    pthread_barrier_destroy(&barrier);
}
#define OVERLOCK_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
    launch([=] { kernel(__VA_ARGS__); }, grid, threads, shared_bytes)
#define OVERLOCK_SHARED(name) float* name = shared_memory.data()

#include "neighbourhood.h"
#include "lanes.h"
#include "inference_cpu.h"
#include "product.h"
#include "na2d_av_cpu.h"
#include "depthwise_cpu.h"
#include "cuda_launch.h"
#include "na2d_av_cuda.h"
#include "depthwise_cuda.h"

static std::mt19937 generator;
static bool failed = false;

static std::vector<float> normal(size_t size) {
    std::normal_distribution<float> distribution;
    std::vector<float> values(size);
    for (float& v : values) v = distribution(generator);
    return values;
}

static void compare(const char* name, const std::vector<float>& cuda, const std::vector<float>& cpu) {
    double difference = 0, size = 0;
    for (size_t i = 0; i < cpu.size(); i++) {
        difference = std::max(difference, std::isfinite(cuda[i]) ? (double)std::abs(cuda[i] - cpu[i]) : 1e30);
        size = std::max(size, (double)std::abs(cpu[i]));
    }
    std::printf("  %s %.1e\n", name, difference / size);
    failed |= !(difference < 5e-6 * size);
}

static void depthwise(int B, int C, int H, int W, int K, int dilation) {
    std::printf("depthwise %dx%dx%dx%d, kernel %d, dilation %d\n", B, C, H, W, K, dilation);
    const size_t size = (size_t)B * C * H * W;
    const int chunks = std::min(B, 16);
    const auto x = normal(size), grad_y = normal(size), weight = normal(C * K * K), bias = normal(C);
    std::vector<float> cpu(size), cuda(size, NAN), cpu_w(C * K * K), cuda_w(C * K * K, NAN), cpu_b(C), cuda_b(C, NAN);
    std::vector<float> partial((size_t)chunks * C * (K * K + 1), NAN);
    for (const bool backward : {false, true}) {
        const float* b = backward ? nullptr : bias.data();
        overlock::depthwise(x.data(), weight.data(), b, cpu.data(), B, C, H, W, K, dilation, true, backward);
        overlock::depthwise(x.data(), weight.data(), b, cuda.data(), B, C, H, W, K, dilation, true, backward, 0);
        compare(backward ? "grad_x" : "y", cuda, cpu);
    }
    overlock::depthwise_grad_weight(x.data(), grad_y.data(), cpu_w.data(), cpu_b.data(), B, C, H, W, K, dilation);
    overlock::depthwise_grad_weight(x.data(), grad_y.data(), cuda_w.data(), cuda_b.data(), partial.data(), B, C, H, W, K, dilation, chunks, 0);
    compare("grad_weight", cuda_w, cpu_w);
    compare("grad_bias", cuda_b, cpu_b);
}

static void na2d_av(int N, int H, int W, int K, int dim) {
    std::printf("na2d_av %dx%dx%dx%d, kernel %d\n", N, H, W, dim, K);
    const size_t pixels = (size_t)N * H * W;
    const auto attn = normal(pixels * K * K), value = normal(pixels * dim), grad_out = normal(pixels * dim);
    std::vector<float> cpu(pixels * dim), cuda(pixels * dim, NAN), cpu_a(pixels * K * K), cuda_a(pixels * K * K, NAN);
    overlock::na2d_av_forward(attn.data(), value.data(), cpu.data(), N, H, W, K, dim);
    overlock::na2d_av_forward(attn.data(), value.data(), cuda.data(), N, H, W, K, dim, 0);
    compare("out", cuda, cpu);
    overlock::na2d_av_grad_attn(grad_out.data(), value.data(), cpu_a.data(), N, H, W, K, dim);
    overlock::na2d_av_grad_attn(grad_out.data(), value.data(), cuda_a.data(), N, H, W, K, dim, 0);
    compare("grad_attn", cuda_a, cpu_a);
    overlock::na2d_av_grad_value(attn.data(), grad_out.data(), cpu.data(), N, H, W, K, dim);
    overlock::na2d_av_grad_value(attn.data(), grad_out.data(), cuda.data(), N, H, W, K, dim, 0);
    compare("grad_value", cuda, cpu);
}

int main() {
    depthwise(2, 3, 4, 4, 3, 1);
    depthwise(3, 2, 17, 20, 3, 7);
    depthwise(1, 2, 9, 33, 5, 2);
    depthwise(2, 1, 16, 16, 13, 1);
    depthwise(1, 1, 7, 18, 17, 1);
    depthwise(18, 1, 2, 3, 19, 1);
    na2d_av(2, 9, 9, 9, 12);
    na2d_av(3, 7, 11, 5, 3);
    return failed;
}
