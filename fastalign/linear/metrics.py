"""Metrics that every fused loss can add, from the outputs of the head."""

from __future__ import annotations

from fastalign.losses import mean_metric
from fastalign.types import LinearLogps, Metric


def accuracy_and_entropy(scored: LinearLogps, last: int | None = None) -> dict[str, Metric]:
    """Mean entropy of all tokens, and accuracy of the first `last` of them."""
    assert scored.entropy is not None
    assert scored.is_top1 is not None
    return {"entropy": mean_metric(scored.entropy), "mean_token_accuracy": mean_metric(scored.is_top1[:last].float())}
