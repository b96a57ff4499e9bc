// Loops over threads that are borrowed: torch's own OpenMP runtime is handed to us as the addresses of two of its functions
// (use_openmp), so that the process has one runtime and one set of threads, which the GEMMs around us keep warm. Without it
// we start our own.
#pragma once

#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace fastalign {

struct OpenMP {
  using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);  // GOMP_parallel
  using ThreadNumber = int (*)();                                                       // omp_get_thread_num
  Parallel parallel = nullptr;
  ThreadNumber thread_number = nullptr;
};

extern OpenMP omp;

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
  if (omp.parallel) {
    struct Shared { decltype(piece)* run; int64_t pieces; std::vector<char> done; } shared{&piece, pieces, std::vector<char>(pieces)};
    omp.parallel(
        [](void* data) {
          auto* s = static_cast<Shared*>(data);
          int64_t i = omp.thread_number();
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

}  // namespace fastalign
