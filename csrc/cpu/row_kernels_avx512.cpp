// The row kernels for processors with avx512; only called on those.
#if defined(__x86_64__) || defined(_M_X64)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define LANES 16
#define NAME "avx512"
#define KERNELS kernels_avx512
#include "row_kernels_impl.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
