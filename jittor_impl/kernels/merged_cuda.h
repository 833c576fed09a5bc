// Parallel depthwise convolutions, each with its BatchNorm, as one on the GPU, in inference; arguments as in
// depthwise_cpu.h, maps of type T, parameters float. Include inference_cpu.h, cuda_launch.h and depthwise_cuda.h
// before it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace overlock {

constexpr int MERGED_BRANCHES = 8;

struct Branches {
    Branch branches[MERGED_BRANCHES];
    int count;
};

// weight (C, K, K) and bias (C) of the convolution that is the sum of all branches, K that of the first; a thread for
// each.
template <typename T>
__global__ void merge_branches_kernel(Branches given, T* __restrict__ weight, T* __restrict__ bias, int C, int K) {
    const int id = blockIdx.x * blockDim.x + threadIdx.x, taps = K * K;
    if (id >= C * (taps + 1)) return;
    const int c = id / (taps + 1), k = id % (taps + 1);
    float sum = 0;
    for (int n = 0; n < given.count; n++) {
        const Branch& b = given.branches[n];
        const float scale = b.norm.weight ? b.norm.weight[c] / sqrtf(b.norm.var[c] + b.norm.eps) : 1;
        if (k == taps) {
            sum += (b.norm.weight ? b.norm.bias[c] - b.norm.mean[c] * scale : 0) + (b.bias ? b.bias[c] * scale : 0);
            continue;
        }
        const int first = K / 2 - b.dilation * (b.kernel / 2), y = k / K - first, x = k % K - first;
        const int p = y / b.dilation, q = x / b.dilation;
        if (y >= 0 && x >= 0 && y % b.dilation == 0 && x % b.dilation == 0 && p < b.kernel && q < b.kernel)
            sum += scale * b.weight[((int64_t)c * b.kernel + p) * b.kernel + q];
    }
    if (k < taps) weight[(int64_t)c * taps + k] = (T)sum;
    else bias[c] = (T)sum;
}

// count: at most MERGED_BRANCHES. weight (C, K, K) and bias (C): scratch memory.
template <typename T>
void merged_depthwise(const T* x, const Branch* branches, int count, T* y, T* weight, T* bias, int B, int C, int H,
                      int W, cudaStream_t stream) {
    Branches given;
    std::copy_n(branches, count, given.branches);
    given.count = count;
    const int K = branches[0].kernel;
    OVERLOCK_LAUNCH(merge_branches_kernel, blocks_of(C * (K * K + 1), 256), 256, 0, stream, given, weight, bias, C, K);
    depthwise<T>(x, weight, bias, y, B, C, H, W, K, 1, false, stream);
}

}  // namespace overlock
