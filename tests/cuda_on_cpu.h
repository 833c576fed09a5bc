// Runs CUDA kernels on a CPU: include it before the kernels. The threads of a block are fibers of one thread of the
// CPU; each runs to the next __syncthreads(), then the next one does. `last_first` turns the order of threads and
// blocks round: what comes out the same in both orders waits for no other thread's work without a barrier between.
#pragma once
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#define __global__
#define __device__
typedef int cudaStream_t;
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
static dim3 threadIdx, blockIdx, blockDim, gridDim;

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 16);
    bool done;
};
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static std::function<void()> kernel_call;
static std::vector<float> shared_memory;
static bool last_first = false;

inline void __syncthreads() { swapcontext(&fibers[threadIdx.x].context, &scheduler); }

static void run_fiber() {
    kernel_call();
    fibers[threadIdx.x].done = true;
}

static void refuse(const char* why) {
    std::printf("%s\n", why);
    std::fflush(stdout);
    std::abort();
}

static void run_block(unsigned threads) {
    std::fill(shared_memory.begin(), shared_memory.end(), NAN);
    for (unsigned t = 0; t < threads; t++) {
        Fiber& fiber = fibers[t];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = &scheduler;
        fiber.done = false;
        makecontext(&fiber.context, run_fiber, 0);
    }
    for (unsigned done = 0; done < threads;) {
        for (unsigned k = 0; k < threads; k++) {
            threadIdx = dim3(last_first ? threads - 1 - k : k);
            swapcontext(&scheduler, &fibers[threadIdx.x].context);
            done += fibers[threadIdx.x].done;
        }
        if (done > 0 && done < threads) refuse("some threads left a kernel while others waited for them");
    }
}

static void launch(dim3 grid, unsigned threads, size_t shared_bytes, std::function<void()> call) {
    const unsigned blocks = grid.x * grid.y * grid.z;
    if (!blocks || grid.y > 65535 || grid.z > 65535 || !threads || threads > 1024 || shared_bytes > 48 * 1024)
        refuse("no GPU takes such a grid");
    if (fibers.size() < threads) fibers.resize(threads);
    shared_memory.resize((shared_bytes + sizeof(float) - 1) / sizeof(float));
    kernel_call = call;
    gridDim = grid;
    blockDim = dim3(threads);
    for (unsigned k = 0; k < blocks; k++) {
        const unsigned block = last_first ? blocks - 1 - k : k;
        blockIdx = dim3(block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y);
        run_block(threads);
    }
}

#define OVERLOCK_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
    launch(grid, threads, shared_bytes, [=] { kernel(__VA_ARGS__); })
#define OVERLOCK_SHARED(name) float* name = shared_memory.data()
