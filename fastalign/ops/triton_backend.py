"""The Triton kernels behind the row functions' contract, and the fused forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign.kernels import fused_forward as fused_kernels
from fastalign.kernels import row_kernels
from fastalign.kernels.gae import gae_scan
from fastalign.ops import rows as R
from fastalign.ops.backends import Backend, architecture


def _scales(spec: R.RowSpec) -> dict[str, Any]:
    return {"in_scale": spec.in_scale, "out_scale": spec.out_scale, "softcap": spec.softcap}


def _outputs(spec: R.RowSpec) -> dict[str, Any]:
    return {"entropy": spec.entropy, "top1": spec.top1, "sum_sq": spec.sum_sq, "sum_z": spec.sum_z}


def row_stats(tile: Tensor, bias: Tensor | None, targets: Tensor, v0: int, state: R.RowState, spec: R.RowSpec) -> None:
    row_kernels.row_stats_fwd(tile, bias, targets, v0, state.values, state.argmax, **_outputs(spec), **_scales(spec))


def row_grad(
    tile: Tensor, bias: Tensor | None, targets: Tensor, v0: int, stats: R.RowStats, coef: R.RowCoef, spec: R.RowSpec,
    out: Tensor, rows: Tensor | None = None,
) -> None:  # fmt: skip
    if rows is not None:  # CPU tensors, interpreted: on a GPU nobody knows the rows
        tile = tile.index_select(0, rows)
    if spec.exp_tile:
        bias = None  # the exponentials hold it
    row_kernels.row_grad_bwd(
        tile, bias, targets, v0, stats.max.contiguous(), stats.log_sum, coef.base, coef.target, coef.entropy, out,
        exp_tile=spec.exp_tile, **_scales(spec),
    )  # fmt: skip


def row_exp(tile: Tensor, bias: Tensor | None, stats: R.RowStats, spec: R.RowSpec, out: Tensor) -> None:
    row_kernels.row_exp_fwd(tile, bias, stats.max, out, **_scales(spec))


def fused_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None, spec: R.RowSpec
) -> R.RowState:
    """State of the scored rows without a logits tile; weight in hidden's dtype."""
    picked = targets if rows is None else targets.index_select(0, rows)
    values, argmax = fused_kernels.fused_logps_fwd(
        hidden, weight, bias, picked, rows, arch=architecture(hidden.device), **_outputs(spec), **_scales(spec)
    )
    outside = (picked < 0) | (picked >= weight.shape[0])  # the kernel knows 32 bits of a target
    values[R.TARGET].masked_fill_(outside, torch.nan)
    return R.RowState(values, argmax)


BACKEND = Backend("triton", row_stats, row_grad, row_exp, gae_scan, fused_forward)
