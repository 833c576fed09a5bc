/* A GPU that is not there, for compile_for_cuda.py: device memory is the host's, a kernel's launch does nothing. Only
   what must answer with something is here; every other function of CUDA's libraries is generated as
   `int name(void) { return 0; }`. */
#include <stdlib.h>
#include <string.h>

#define ALLOCATE(declaration) int declaration { *p = aligned_alloc(512, (n + 1023) / 512 * 512); return 0; }
ALLOCATE(cudaMalloc(void **p, size_t n))
ALLOCATE(cudaMallocHost(void **p, size_t n))
ALLOCATE(cudaHostAlloc(void **p, size_t n, unsigned flags))
ALLOCATE(cudaMallocManaged(void **p, size_t n, unsigned flags))
int cudaFree(void *p) { free(p); return 0; }
int cudaFreeHost(void *p) { free(p); return 0; }
int cudaMemcpy(void *to, const void *from, size_t n, int kind) { memmove(to, from, n); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *stream) { memmove(to, from, n); return 0; }
int cudaMemset(void *p, int value, size_t n) { memset(p, value, n); return 0; }
int cudaMemsetAsync(void *p, int value, size_t n, void *stream) { memset(p, value, n); return 0; }
int cudaMemGetInfo(size_t *available, size_t *total) { *available = *total = 8ull << 30; return 0; }
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) { *value = 1024; return 0; }
int cudaGetDeviceProperties(void *properties, int device) { memset(properties, 0, 512); return 0; }
int cudaStreamAddCallback(void *stream, void (*call)(void *, int, void *), void *data, unsigned flags) {
    call(stream, 0, data);
    return 0;
}
int cudaLaunchHostFunc(void *stream, void (*call)(void *), void *data) { call(data); return 0; }
const char *cudaGetErrorString(int error) { return ""; }
const char *cudaGetErrorName(int error) { return ""; }
void **__cudaRegisterFatBinary(void *binary) { static void *handle[1]; return handle; }

typedef struct { int algorithm, status; float time; size_t memory; int rest[5]; } Performance;
#define CUDNN(pass) \
    int cudnnGetConvolution##pass##WorkspaceSize(void *a, void *b, void *c, void *d, void *e, int algorithm, \
                                                 size_t *size) \
        { *size = 0; return 0; } \
    int cudnnGetConvolution##pass##Algorithm_v7(void *a, void *b, void *c, void *d, void *e, int wanted, \
                                                int *count, Performance *found) \
        { *count = 1; memset(found, 0, sizeof *found); return 0; } \
    int cudnnFindConvolution##pass##AlgorithmEx(void *a, void *b, void *x, void *c, void *w, void *d, void *e, \
                                                void *y, int wanted, int *count, Performance *found, \
                                                void *workspace, size_t size) \
        { *count = 1; memset(found, 0, sizeof *found); return 0; }
CUDNN(Forward) CUDNN(BackwardData) CUDNN(BackwardFilter)
