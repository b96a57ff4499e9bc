// The row kernels of fastalign/ops/rows.py on CPU tiles: plain addresses, sizes and strides; no framework header.
//
// A tile holds n rows (tokens) × v vocabulary columns, vocabulary-major: element (row, column) at [column * stride + row].
// Per-row vectors have n entries. Formulas: fastalign/ops/rows.py.
#pragma once

#include <cstdint>

namespace fastalign {

struct Logits {             // z = in_scale·(u + bias), or out_scale·tanh(in_scale·(u + bias)) with a softcap
  float in_scale;
  float out_scale;
  bool softcap;
  const float* bias;        // (v,) or null
};

struct RowStats {
  const float* tile;
  int64_t stride, n, v;
  Logits logits;
  const int64_t* targets;   // (n,)
  int64_t v0;               // vocabulary index of column 0
  float* values;            // (6, n): max, sum, target logit, Σe·(z−m), Σe², Σz
  int64_t* argmax;          // (n,) or null
  bool entropy, sum_sq, sum_z;
};

struct RowGrad {
  const void* tile;         // float32 u, or bfloat16 exp(z − max)
  int64_t stride, n, v;     // n: rows of out and of the vectors
  bool exponentials;
  Logits logits;
  const int64_t* targets;
  int64_t v0;
  const float *max, *log_sum, *base, *target;  // (n,)
  const float* entropy;     // (n,) or null
  float* out;               // may be the tile
  int64_t out_stride;
  const int64_t* rows;      // null, or (n,) ascending: row i works on the tile's row rows[i]; out may still be the tile
};

struct RowExp {
  const float* tile;
  int64_t stride, n, v;
  Logits logits;
  const float* max;         // (n,)
  uint16_t* out;            // bfloat16
  int64_t out_stride;
};

// One instruction set's kernels. Stats work on rows [first, last), the others on columns [first, last).
struct Kernels {
  const char* name;
  int64_t lanes;
  void (*stats)(const RowStats&, int64_t first, int64_t last);
  void (*grad)(const RowGrad&, int64_t first, int64_t last);
  void (*exponentials)(const RowExp&, int64_t first, int64_t last);
};

extern const Kernels kernels_baseline;
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

const Kernels& kernels();                       // the best this processor runs, or the one chosen
bool choose_kernels(const char* name);          // false if this processor does not run it
void use_openmp(void* gomp_parallel, void* omp_get_thread_num);  // both null: own threads

void row_stats(const RowStats&, int threads);
void row_grad(const RowGrad&, int threads);
void row_exp(const RowExp&, int threads);

}  // namespace fastalign
