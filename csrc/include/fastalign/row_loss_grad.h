// Statistics and gradient of rows whose upstream gradients are known, on CUDA tiles: plain addresses, sizes and strides;
// no framework header and no CUDA header. Formulas: fastalign/ops/rows.py; the kernel: csrc/cuda/row_loss_grad.cuh.
#pragma once

#include <cstdint>

namespace fastalign {

// A tile holds n rows × v columns, the whole vocabulary: element (row, column) at [row * stride + column].
struct RowLossGrad {
  const float* tile;
  int64_t tile_stride, n, v;
  float in_scale, out_scale;  // z = in_scale·(u + bias), or out_scale·tanh(in_scale·(u + bias)) with a softcap
  const float* bias;          // (v,) or null
  const int64_t* targets;     // (n,)
  float* values;              // (6, n): max, sum, target logit, then Σe·(z−m), Σe², Σz where sums are asked for
  int64_t* argmax;            // (n,) or null; written where sums are asked for
  const float* grad_logps;    // (n,) a = ∂L/∂logps
  const float* grad_entropy;  // (n,) e = ∂L/∂entropy, or null; needs sums
  void* out;                  // (n, v) float32, bfloat16 or float16: the tile itself, or a narrower view with its address
  int64_t out_stride;         //        and row pitch, or other memory
};

enum class Element : int { float32, bfloat16, float16 };

// How a row is cut: `cluster` blocks, each of which holds `slice` columns in `shared_bytes` of shared memory, behind the
// first `SHARED_HEADER`. It follows from v alone, so a row's sums are taken in the same order in any company.
struct ClusterShape {
  int cluster, slice;
  int64_t shared_bytes;
};

constexpr int MAX_CLUSTER = 8;                    // blocks, what every device with clusters can launch
constexpr int64_t SHARED_HEADER = 640;            // bytes
constexpr int64_t SHARED_LIMIT = 227 * 1024;      // of a block, compute capability 9.0 and 10.0
constexpr int64_t SHARED_COMFORTABLE = 75 * 1024; // so that three blocks fit a multiprocessor
constexpr int64_t MAX_COLUMNS = (SHARED_LIMIT - SHARED_HEADER) / 4 / 8 * 8 * MAX_CLUSTER;

// As few blocks as hold the row comfortably.
inline ClusterShape cluster_shape(int64_t v) {
  ClusterShape shape{1, 0, 0};
  for (;; shape.cluster *= 2) {
    const int64_t slice = (v + shape.cluster - 1) / shape.cluster;
    shape.slice = static_cast<int>((slice + 7) / 8 * 8);
    shape.shared_bytes = SHARED_HEADER + 4 * int64_t{shape.slice};
    if (shape.shared_bytes <= SHARED_COMFORTABLE || shape.cluster == MAX_CLUSTER) return shape;
  }
}

}  // namespace fastalign
