"""What crosses the layers: log-probs, losses and metrics. Imports torch only."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

IGNORE_INDEX = -100
"""A target with this value is not scored: it gets log-prob 0 and no gradient."""


class LinearLogps(NamedTuple):
    """Per-token quantities of the linear head, of the targets' shape, float32 unless said otherwise; 0 where ignored.

    `entropy`, `is_top1` (bool), `log_sum_sq_probs` and `mean_logits` are None unless they were asked for.
    Gradients flow from `logps`, `lse` and `entropy`; the others carry none.
    """

    logps: Tensor
    lse: Tensor
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None


class Metric(NamedTuple):
    """A weighted sum kept on the device: totals and weights add up over micro-batches and processes.

    `total` and `weight` are detached 0-dim float tensors on one device; `value` = total / weight (nan if weight is 0).
    """

    total: Tensor
    weight: Tensor

    @property
    def value(self) -> Tensor:
        """total / weight, 0-dim."""
        return self.total / self.weight

    def merge(self, other: Metric) -> Metric:
        """The metric of both parts together."""
        return Metric(self.total + other.total, self.weight + other.weight)


class LossOutput(NamedTuple):
    """A loss with the metrics that explain it. `loss` is 0-dim, or per group with reduction="none"."""

    loss: Tensor
    metrics: dict[str, Metric]
