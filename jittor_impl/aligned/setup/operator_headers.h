// What the operators that Jittor generates for the CPU include, to be compiled once, ahead of them.
#define JIT 1
#define JIT_cpu 1
#include <assert.h>
#ifdef __AVX__
#include <immintrin.h>
#endif
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#include "fused_op.h"
#include "op.h"
#include "ops/op_register.h"
#include "var.h"
