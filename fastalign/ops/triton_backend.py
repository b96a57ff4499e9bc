"""The Triton kernels behind the row functions' contract, and the fused forward."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastalign.kernels import fused_forward as fused_kernels
from fastalign.kernels import row_kernels
from fastalign.kernels import row_loss_grad as loss_kernels
from fastalign.kernels._tiles import RowTiles, row_tiles
from fastalign.kernels.fused_exponentials import fused_exponentials_fwd
from fastalign.kernels.gae import gae_scan
from fastalign.ops import rows as R
from fastalign.ops.backends import Backend, architecture, multiprocessors
from fastalign.ops.known_grads import KnownGrads


def _scales(spec: R.RowSpec) -> dict[str, Any]:
    return {"in_scale": spec.in_scale, "out_scale": spec.out_scale, "softcap": spec.softcap}


def _outputs(spec: R.RowSpec) -> dict[str, Any]:
    return {"entropy": spec.entropy, "top1": spec.top1, "sum_sq": spec.sum_sq, "sum_z": spec.sum_z}


@functools.cache
def _tiles(v: int, device: torch.device) -> RowTiles:
    return row_tiles(v, architecture(device))


def row_stats(tile: Tensor, bias: Tensor | None, targets: Tensor, v0: int, state: R.RowState, spec: R.RowSpec) -> None:
    row_kernels.row_stats_fwd(
        tile, bias, targets, v0, state.values, state.argmax, tiles=_tiles(tile.shape[1], tile.device),
        **_outputs(spec), **_scales(spec),
    )  # fmt: skip


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
        exp_tile=spec.exp_tile, tiles=_tiles(tile.shape[1], tile.device), **_scales(spec),
    )  # fmt: skip


def row_exp(tile: Tensor, bias: Tensor | None, stats: R.RowStats, spec: R.RowSpec, out: Tensor) -> None:
    row_kernels.row_exp_fwd(
        tile, bias, stats.max, out, tiles=_tiles(tile.shape[1], tile.device), **_scales(spec)
    )  # fmt: skip


def row_loss_grad(
    tile: Tensor, bias: Tensor | None, targets: Tensor, state: R.RowState, known: KnownGrads, spec: R.RowSpec,
    out: Tensor,
) -> None:  # fmt: skip
    loss_kernels.row_loss_grad(
        tile, bias, targets, state.values, state.argmax, known.logps, known.entropy, out, **_outputs(spec),
        **_scales(spec),
    )  # fmt: skip


def _mark_targets(values: Tensor, targets: Tensor, weight: Tensor) -> None:
    """z_y of a target outside the vocabulary is nan: the fused kernels know 32 bits of one."""
    values[R.TARGET].masked_fill_((targets < 0) | (targets >= weight.shape[0]), torch.nan)


def fused_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None, spec: R.RowSpec
) -> R.RowState:
    """State of the scored rows without a logits tile; weight in hidden's dtype."""
    picked = targets if rows is None else targets.index_select(0, rows)
    values, argmax = fused_kernels.fused_logps_fwd(
        hidden, weight, bias, picked, rows, arch=architecture(hidden.device), programs=multiprocessors(hidden.device),
        **_outputs(spec), **_scales(spec),
    )  # fmt: skip
    _mark_targets(values, picked, weight)
    return R.RowState(values, argmax)


def fused_exponentials(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None, spec: R.RowSpec,
    out: Tensor,
) -> tuple[R.RowState, Tensor]:  # fmt: skip
    """State of the scored rows and the reference of the exponentials that `out` gets."""
    picked = targets if rows is None else targets.index_select(0, rows)
    values, argmax, reference = fused_exponentials_fwd(
        hidden, weight, bias, picked, rows, out, arch=architecture(hidden.device),
        programs=multiprocessors(hidden.device), **_outputs(spec), **_scales(spec),
    )  # fmt: skip
    _mark_targets(values, picked, weight)
    return R.RowState(values, argmax), reference


BACKEND = Backend(
    "triton", row_stats, row_grad, row_exp, row_loss_grad, gae_scan, fused_forward, fused_exponentials
)  # fmt: skip
