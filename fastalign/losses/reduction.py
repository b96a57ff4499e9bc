"""How per-item losses become one number, the same for every loss."""

from __future__ import annotations

from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")


def check_reduction(reduction: str, num_items: int | Tensor | None = None) -> None:
    """Raise ValueError for a `reduction` outside `REDUCTIONS`, or a `num_items` that it would not use."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}: accepted are {', '.join(map(repr, REDUCTIONS))}")
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f"num_items is the denominator of reduction='mean'; it means nothing with {reduction!r}")
    if not isinstance(num_items, Tensor) and num_items <= 0:
        raise ValueError(f"num_items={num_items}: it must be positive")


def reduce_losses(losses: Tensor, reduction: str = "mean", num_items: int | Tensor | None = None) -> Tensor:
    """Reduce `losses`, one per item, any shape.

    "none" returns them, "sum" adds them up, and "mean" divides the sum by `num_items`: the number of items over all
    micro-batches and processes of one optimiser step (int, or a 0-dim tensor on the losses' device), so that the
    gradients of the parts add up to those of the whole. None stands for the items at hand; no items at all give a
    zero that is still attached to the graph.
    """
    check_reduction(reduction, num_items)
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    return total / (max(losses.numel(), 1) if num_items is None else num_items)
