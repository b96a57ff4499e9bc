// What csrc/cuda exports: no CUDA header, so that the bindings compile without one.
#pragma once

#include "fastalign/row_loss_grad.h"

namespace fastalign {

// Each returns null, or what went wrong. `device`: ordinal, whose primary context is used; `stream`: a CUstream of it.
const char* why_not(int device);
const char* row_loss_grad(const RowLossGrad& a, Element out, bool softcap, bool sums, int device, void* stream);

}  // namespace fastalign
