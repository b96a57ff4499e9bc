"""Rows whose upstream gradients are known before they are scored: one pass over the logits instead of two."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.ops import rows as R


class KnownGrads(NamedTuple):
    """Upstream gradients that do not depend on the log-probs: ∂L/∂logps (n,) and ∂L/∂entropy (n,) or None, float32.

    Cross-entropy: logps = −1/D in every row. A row in which they are 0 gets a gradient of 0.
    """

    logps: Tensor
    entropy: Tensor | None = None

    def rescale(self) -> tuple[KnownGrads, Tensor]:
        """Both times 2^k with the largest near 1, and 2^−k, as `rows.rescale` does to coefficients."""
        largest = self.logps.abs().amax()
        if self.entropy is not None:
            largest = torch.maximum(largest, self.entropy.abs().amax())
        up, down = R.powers_of_two(largest)
        return KnownGrads(self.logps * up, None if self.entropy is None else self.entropy * up), down


def two_passes(row_stats: Callable[..., None], row_grad: Callable[..., None]) -> Callable[..., None]:
    """row_loss_grad of a backend that has the two passes only: the logits are read twice."""

    def row_loss_grad(
        tile: Tensor, bias: Tensor | None, targets: Tensor, state: R.RowState, known: KnownGrads, spec: R.RowSpec,
        out: Tensor,
    ) -> None:  # fmt: skip
        """Fill `state` (as R.RowState.start made it) and write ∂L/∂u to `out`. tile (n, V); the rest as in row_grad.

        known.entropy needs spec.entropy; spec.exp_tile has no meaning here.
        """
        row_stats(tile, bias, targets, 0, state, spec)
        stats = R.finish(state, spec)
        row_grad(tile, bias, targets, 0, stats, R.coefficients(stats, known.logps, None, known.entropy), spec, out)

    return row_loss_grad
