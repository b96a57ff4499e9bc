// Which kernels run, and on how many threads.
//
// Threads are borrowed: torch's own OpenMP runtime is handed to us as the addresses of two of its functions, so that the
// process has one runtime and one set of threads, which the GEMMs around us keep warm. Without it we start our own.

#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include "fastalign/row_kernels.h"

namespace fastalign {
namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);  // GOMP_parallel
using ThreadNumber = int (*)();                                                       // omp_get_thread_num

Parallel omp_parallel = nullptr;
ThreadNumber omp_thread_number = nullptr;

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

// body(first, last) over [0, size) in pieces that are multiples of `grain`, one a thread. Every piece is its own work
// whatever thread runs it, so a runtime that gives fewer threads than asked for changes nothing but the time.
template <class Body>
void parallel_for(int64_t size, int64_t grain, int threads, const Body& body) {
  int64_t units = (size + grain - 1) / grain;
  int64_t pieces = threads < units ? threads : units;
  if (pieces <= 1) {
    if (size > 0) body(0, size);
    return;
  }
  auto piece = [&](int64_t i) {
    int64_t first = units * i / pieces * grain, last = units * (i + 1) / pieces * grain;
    body(first, last < size ? last : size);
  };
  if (omp_parallel) {
    struct Shared { decltype(piece)* run; int64_t pieces; std::vector<char> done; } shared{&piece, pieces, std::vector<char>(pieces)};
    omp_parallel(
        [](void* data) {
          auto* s = static_cast<Shared*>(data);
          int64_t i = omp_thread_number();
          if (i < s->pieces) (*s->run)(i), s->done[i] = 1;
        },
        &shared, (unsigned)pieces, 0);
    for (int64_t i = 0; i < pieces; ++i)
      if (!shared.done[i]) piece(i);
    return;
  }
  std::vector<std::thread> team;
  int64_t started = 1;
  try {
    for (; started < pieces; ++started) team.emplace_back(piece, started);
  } catch (const std::system_error&) {  // no more threads to be had: this one does the rest
  }
  piece(0);
  for (int64_t i = started; i < pieces; ++i) piece(i);
  for (auto& thread : team) thread.join();
}

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

void use_openmp(void* gomp_parallel, void* omp_get_thread_num) {
  omp_parallel = reinterpret_cast<Parallel>(gomp_parallel);
  omp_thread_number = reinterpret_cast<ThreadNumber>(omp_get_thread_num);
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
