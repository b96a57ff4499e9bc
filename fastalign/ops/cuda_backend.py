"""The Triton kernels, with statistics and gradient of whole rows from the C++ kernel of csrc/cuda.

Where upstream gradients are known beforehand (`row_loss_grad`) that kernel reads a row once, 6 bytes of traffic a logit
instead of 10. In every other place reading and writing once is what Triton does too, so its kernels serve.
`backend="auto"` takes "triton" until the two have been measured beside each other on a device.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fastalign.kernels import cuda_rows
from fastalign.ops import rows as R
from fastalign.ops import triton_backend
from fastalign.ops.known_grads import KnownGrads


def row_loss_grad(
    tile: Tensor, bias: Tensor | None, targets: Tensor, state: R.RowState, known: KnownGrads, spec: R.RowSpec,
    out: Tensor,
) -> None:  # fmt: skip
    sums = spec.entropy or spec.top1 or spec.sum_sq or spec.sum_z
    cuda_rows.row_loss_grad(
        tile, bias, targets, state.values, state.argmax if spec.top1 else None, known.logps, known.entropy, out,
        in_scale=spec.in_scale, out_scale=spec.out_scale, softcap=spec.softcap, sums=sums,
    )  # fmt: skip


BACKEND = replace(triton_backend.BACKEND, name="cuda", row_loss_grad=row_loss_grad)
