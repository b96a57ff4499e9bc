"""The C++ row kernels behind the row functions' contract."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastalign.kernels import cpu_rows
from fastalign.ops import rows as R
from fastalign.ops.backends import Backend
from fastalign.ops.known_grads import two_passes


def _side_by_side(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _scales(spec: R.RowSpec) -> dict[str, Any]:
    return {"in_scale": spec.in_scale, "out_scale": spec.out_scale, "softcap": spec.softcap}


def row_stats(tile: Tensor, bias: Tensor | None, targets: Tensor, v0: int, state: R.RowState, spec: R.RowSpec) -> None:
    cpu_rows.row_stats(
        tile, _side_by_side(bias), targets.contiguous(), v0, state.values, state.argmax if spec.top1 else None,
        entropy=spec.entropy, sum_sq=spec.sum_sq, sum_z=spec.sum_z, **_scales(spec),
    )  # fmt: skip


def row_grad(
    tile: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    v0: int,
    stats: R.RowStats,
    coef: R.RowCoef,
    spec: R.RowSpec,
    out: Tensor,
    rows: Tensor | None = None,
) -> None:
    cpu_rows.row_grad(
        tile, _side_by_side(bias), targets.contiguous(), v0, stats.max.contiguous(), stats.log_sum.contiguous(),
        coef.base.contiguous(), coef.target.contiguous(),
        None if coef.entropy is None else coef.entropy.contiguous(), out, rows,
        **_scales(spec),
    )  # fmt: skip


def row_exp(tile: Tensor, bias: Tensor | None, stats: R.RowStats, spec: R.RowSpec, out: Tensor) -> None:
    cpu_rows.row_exp(tile, _side_by_side(bias), stats.max.contiguous(), out, **_scales(spec))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    return cpu_rows.gae(rewards.contiguous(), values.contiguous(), mask.contiguous(), gamma, lam)


BACKEND = Backend("cpu", row_stats, row_grad, row_exp, two_passes(row_stats, row_grad), gae)
