// Which kernels run, and on how many threads.

#include <cstring>

#include "fastalign/parallel.h"
#include "fastalign/row_kernels.h"

namespace fastalign {
namespace {

bool supported(const Kernels& k) {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  if (&k == &kernels_avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (&k == &kernels_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return true;
}

const Kernels* const candidates[] = {
#if defined(__x86_64__) || defined(_M_X64)
    &kernels_avx512, &kernels_avx2,
#endif
    &kernels_baseline};

const Kernels* chosen = nullptr;

}  // namespace

const Kernels& kernels() {
  if (!chosen)
    for (const Kernels* k : candidates)
      if (supported(*k)) {
        chosen = k;
        break;
      }
  return *chosen;
}

bool choose_kernels(const char* name) {
  for (const Kernels* k : candidates)
    if (!std::strcmp(k->name, name) && supported(*k)) {
      chosen = k;
      return true;
    }
  return false;
}

OpenMP omp;

void use_openmp(void* gomp_parallel, void* omp_get_thread_num) {
  omp.parallel = reinterpret_cast<OpenMP::Parallel>(gomp_parallel);
  omp.thread_number = reinterpret_cast<OpenMP::ThreadNumber>(omp_get_thread_num);
}

void row_stats(const RowStats& a, int threads) {
  const Kernels& k = kernels();
  parallel_for(a.n, k.lanes, threads, [&](int64_t first, int64_t last) { k.stats(a, first, last); });
}

void row_grad(const RowGrad& a, int threads) {
  const Kernels& k = kernels();
  parallel_for(a.v, 1, threads, [&](int64_t first, int64_t last) { k.grad(a, first, last); });
}

void row_exp(const RowExp& a, int threads) {
  const Kernels& k = kernels();
  parallel_for(a.v, 1, threads, [&](int64_t first, int64_t last) { k.exponentials(a, first, last); });
}

}  // namespace fastalign
