// The CUDA kernel of csrc/cuda/row_loss_grad.cuh on a host, for test_row_loss_grad.py.
#include "emulated_device.h"

#include "row_loss_grad.cuh"

using namespace fastalign;

namespace {

template <int THREADS, int CHUNK, class OUT, bool SOFTCAP, bool SUMS>
void run(const RowLossGrad& a, const ClusterShape& shape, bool aligned, int seed) {
  device::machine.kernel = [&](char* shared) { Row<THREADS, CHUNK, OUT, SOFTCAP, SUMS>(a, shape, aligned, shared).run(); };
  for (int64_t row = 0; row < a.n; ++row) device::machine.run(row, THREADS, shape.cluster, shape.shared_bytes, seed + row);
}

template <int THREADS, int CHUNK, class OUT>
void choose(const RowLossGrad& a, bool softcap, bool sums, const ClusterShape& shape, bool aligned, int seed) {
  if (softcap) (sums ? run<THREADS, CHUNK, OUT, true, true> : run<THREADS, CHUNK, OUT, true, false>)(a, shape, aligned, seed);
  else (sums ? run<THREADS, CHUNK, OUT, false, true> : run<THREADS, CHUNK, OUT, false, false>)(a, shape, aligned, seed);
}

template <int THREADS, int CHUNK>
void choose(const RowLossGrad& a, int out, bool softcap, bool sums, const ClusterShape& shape, bool aligned, int seed) {
  if (out == 0) choose<THREADS, CHUNK, float>(a, softcap, sums, shape, aligned, seed);
  if (out == 1) choose<THREADS, CHUNK, device::Bf16>(a, softcap, sums, shape, aligned, seed);
  if (out == 2) choose<THREADS, CHUNK, device::Fp16>(a, softcap, sums, shape, aligned, seed);
}

}  // namespace

extern "C" {

ClusterShape shape_of(int64_t v) { return cluster_shape(v); }
int64_t max_columns() { return MAX_COLUMNS; }

// small: 64 threads and chunks of 512 columns; else the sizes of the launch.
void emulate(const RowLossGrad* a, int out, bool softcap, bool sums, int cluster, int slice, bool aligned, bool small, int seed) {
  const ClusterShape shape{cluster, slice, SHARED_HEADER + 4 * int64_t{slice}};
  if (small) choose<64, 512>(*a, out, softcap, sums, shape, aligned, seed);
  else choose<256, 4096>(*a, out, softcap, sums, shape, aligned, seed);
}

}
