"""The critic's loss."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.losses.masking import masked
from fastalign.losses.metrics import correlation_metrics
from fastalign.losses.reduction import check_reduction
from fastalign.types import LossOutput, Metric


def value_loss(
    values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    old_values: Tensor | None = None,
    epsilon_value: float | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> LossOutput:
    """The critic's loss: ½·max((V − R)², (V_old + clip(V − V_old, ±epsilon_value) − R)²), mean over valid tokens.

    Args:
        values, returns, old_values: (B, T) float; old_values are those at the time of the rollout.
        mask: (B, T) bool, True where a token counts; what lies outside, NaN included, never enters.
        epsilon_value: how far V may usefully move from V_old; None does not clip.
        num_items: denominator of "mean", the valid tokens of the whole step.
    Returns:
        LossOutput with `clip_fraction` (where the clipped error is the larger), `values`, `returns`, `error` (mean
        squared) and, through `summarize`, `correlation` of values with returns.
    """
    check_reduction(reduction, num_items)
    if epsilon_value is not None and (old_values is None or not epsilon_value > 0):
        raise ValueError(f"epsilon_value={epsilon_value}: it must be positive and needs old_values")
    given, mask = masked(values, {"returns": returns, "old_values": old_values}, mask, name="values")
    v, target = given["values"], given["returns"]
    errors = (v - target).square()
    clipped = torch.zeros_like(mask)
    if epsilon_value is not None:
        old = given["old_values"]
        bounded = (old + (v - old).clamp(-epsilon_value, epsilon_value) - target).square()
        clipped = bounded > errors
        errors = torch.maximum(errors, bounded)
    weights = mask.to(errors.dtype)
    losses = errors * weights / 2
    with torch.no_grad():
        count = weights.sum()
        metrics = {
            "clip_fraction": Metric((clipped * weights).sum(), count),
            "values": Metric((v * weights).sum(), count),
            "returns": Metric((target * weights).sum(), count),
            "error": Metric(((v - target).square() * weights).sum(), count),
        } | correlation_metrics("correlation", v, target, mask)  # v[mask] would wait for the device
    if reduction == "none":
        return LossOutput(losses, metrics)
    total = losses.sum()
    if reduction == "sum":
        return LossOutput(total, metrics)
    return LossOutput(total / (count.clamp(min=1) if num_items is None else num_items), metrics)
