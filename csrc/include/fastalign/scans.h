// Recurrences over the tokens of a sequence. Formulas: fastalign/ops/advantages.py.
#pragma once

#include <cstdint>

namespace fastalign {

struct Gae {
  const float *rewards, *values;  // (batch, length), rows contiguous
  const uint8_t* mask;            // 1 where a token is valid; what lies elsewhere, NaN included, is not read
  int64_t batch, length;
  double gamma, lam;
  float *advantages, *returns;    // 0 outside the mask
};

void gae(const Gae&, int threads);

}  // namespace fastalign
