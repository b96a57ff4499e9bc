// What csrc/cuda exports: no CUDA header, so that the bindings compile without one.
#pragma once

#include "fastalign/row_loss_grad.h"

namespace fastalign {

// Each returns null, or what went wrong. The launch goes to `stream`, a CUstream of the calling thread's current context:
// this runtime is linked in beside the caller's, and the two share a context only if nobody but the caller sets it.
const char* why_not(int device);
const char* row_loss_grad(const RowLossGrad& a, Element out, bool softcap, bool sums, void* stream);

}  // namespace fastalign
