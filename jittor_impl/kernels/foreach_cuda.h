// One operation on many arrays on the GPU, as one kernel. Include foreach_cpu.h, cuda_launch.h and cuda_sum.h before it.
#pragma once
#include <cstdint>

namespace overlock {

// A kernel takes as many arrays as its arguments have room for, 4 KB, and a compiler patience (foreach.py).
constexpr int FOREACH_GROUP = 32, FOREACH_BLOCK = 4 * SUM_THREADS;

// Items have a `size`, that of their arrays. Blocks first_block[k] to first_block[k + 1] - 1 are those of item k, for
// FOREACH_BLOCK numbers each.
template <typename Item>
struct ForeachGroup {
    Item items[FOREACH_GROUP];
    int first_block[FOREACH_GROUP + 1];
    int blocks;
};

// count: at most FOREACH_GROUP.
template <typename Item>
ForeachGroup<Item> group_of(const Item* items, int count) {
    ForeachGroup<Item> group;
    group.blocks = group.first_block[0] = 0;
    for (int k = 0; k < count; k++) {
        group.items[k] = items[k];
        group.blocks += blocks_of(items[k].size, FOREACH_BLOCK);
        group.first_block[k + 1] = group.blocks;
    }
    return group;
}

// The numbers of a thread in block `block` of a group: item->...[i] for i = start; i < end; i += SUM_THREADS.
template <typename Item>
struct ForeachPart {
    const Item* item;
    int64_t start, end;
};

template <typename Item>
__device__ ForeachPart<Item> part_of(const ForeachGroup<Item>& group, int block) {
    int k = 0;
    while (group.first_block[k + 1] <= block) k++;
    const Item* item = &group.items[k];
    const int64_t start = (int64_t)(block - group.first_block[k]) * FOREACH_BLOCK, end = start + FOREACH_BLOCK;
    return {item, start + threadIdx.x, end < item->size ? end : item->size};
}

template <typename T>
__global__ void lerp_kernel(ForeachGroup<Arrays<T>> group, float weight) {
    const ForeachPart<Arrays<T>> part = part_of(group, blockIdx.x);
    for (int64_t i = part.start; i < part.end; i += SUM_THREADS) {
        const float a = (float)part.item->a[i], b = (float)part.item->b[i];
        part.item->out[i] = (T)(a + weight * (b - a));
    }
}

template <typename T>
void lerp(const Arrays<T>* arrays, int count, float weight, cudaStream_t stream) {
    const ForeachGroup<Arrays<T>> group = group_of(arrays, count);
    OVERLOCK_LAUNCH(lerp_kernel, group.blocks, SUM_THREADS, 0, stream, group, weight);
}

template <typename T>
__global__ void scale_kernel(ForeachGroup<Arrays<T>> group, const float* factor) {
    const ForeachPart<Arrays<T>> part = part_of(group, blockIdx.x);
    for (int64_t i = part.start; i < part.end; i += SUM_THREADS)
        part.item->out[i] = (T)((float)part.item->a[i] * factor[0]);
}

// factor: one number, on the GPU.
template <typename T>
void scale(const Arrays<T>* arrays, int count, const float* factor, cudaStream_t stream) {
    const ForeachGroup<Arrays<T>> group = group_of(arrays, count);
    OVERLOCK_LAUNCH(scale_kernel, group.blocks, SUM_THREADS, 0, stream, group, factor);
}

template <typename T>
__global__ void squares_kernel(ForeachGroup<Arrays<T>> group, float* sums) {
    OVERLOCK_SHARED(shared);
    float sum = 0;
    for (int block = blockIdx.x; block < group.blocks; block += gridDim.x) {
        const ForeachPart<Arrays<T>> part = part_of(group, block);
        for (int64_t i = part.start; i < part.end; i += SUM_THREADS) {
            const float a = (float)part.item->a[i];
            sum += a * a;
        }
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <typename T>  // it is a template as all kernels are
__global__ void total_kernel(const T* sums, int count, double* total) {
    OVERLOCK_SHARED(shared);
    float sum = 0;
    for (int i = threadIdx.x; i < count; i += SUM_THREADS) sum += sums[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) total[0] = sum;
}

// total: one number; sums: memory for `blocks` numbers.
template <typename T>
void sum_of_squares(const Arrays<T>* arrays, int count, double* total, float* sums, int blocks, cudaStream_t stream) {
    const ForeachGroup<Arrays<T>> group = group_of(arrays, count);
    OVERLOCK_LAUNCH(squares_kernel, blocks, SUM_THREADS, SUM_BYTES, stream, group, sums);
    OVERLOCK_LAUNCH(total_kernel, 1, SUM_THREADS, SUM_BYTES, stream, (const float*)sums, blocks, total);
}

}  // namespace overlock
