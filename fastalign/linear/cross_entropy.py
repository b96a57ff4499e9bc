"""Cross-entropy from hidden states, streamed token by token."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastalign.linear.metrics import accuracy_and_entropy
from fastalign.losses import check_reduction, mean_metric
from fastalign.ops import linear_logps, linear_loss
from fastalign.types import IGNORE_INDEX, LinearLogps, LossOutput, Metric


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, reduction: str = "mean", num_items: int | Tensor | None = None,
    rows: Tensor | None = None, bias: Tensor | None = None, temperature: float = 1.0, logit_scale: float = 1.0,
    softcap: float | None = None, ignore_index: int = IGNORE_INDEX, token_metrics: bool = False, backend: str = "auto",
    schedule: str = "auto", workspace_mb: float | None = None,
    accumulate_into: Tensor | None = None,
) -> LossOutput:  # fmt: skip
    """Cross-entropy of a linear head, −Σ logps / D, streamed token by token: three GEMMs, no logits.

    Args:
        hidden: (..., H); targets: (...) int64, aligned with hidden, `ignore_index` where not scored. weight (V, H),
            bias (V,).
        reduction: "mean" over scored tokens, "sum", or "none": (...), 0 where ignored, which scores everything first.
        num_items: denominator of "mean", the scored tokens over all micro-batches and processes; None: those at hand.
        token_metrics: also `entropy` and `mean_token_accuracy`.
        The others as in `linear_logps`.
    Returns:
        LossOutput with `nll`, the mean negative log-prob in nats per token.
    """
    check_reduction(reduction, num_items)
    head: dict[str, Any] = {
        "bias": bias, "temperature": temperature, "logit_scale": logit_scale, "softcap": softcap,
        "ignore_index": ignore_index, "backend": backend, "workspace_mb": workspace_mb,
        "accumulate_into": accumulate_into,
    }  # fmt: skip
    if reduction == "none":
        if token_metrics:
            raise ValueError(
                "token_metrics are means over tokens; take reduction='mean' or 'sum', or call linear_logps"
            )
        if schedule == "streamed":
            raise ValueError(
                "schedule='streamed' needs a reduction; take reduction='mean' or 'sum', or schedule='auto'"
            )
        losses = -linear_logps(hidden, weight, targets, rows=rows, schedule=schedule, **head).logps
        scored = (targets != ignore_index).sum().to(losses.dtype)
        return LossOutput(losses, {"nll": Metric(losses.detach().sum(), scored)})

    def metrics(scored: LinearLogps, cu: Tensor | None) -> dict[str, Metric]:
        return {"nll": mean_metric(-scored.logps)} | (accuracy_and_entropy(scored) if token_metrics else {})

    if reduction == "sum":
        denominator: float | Tensor | None = 1.0
    else:
        denominator = num_items  # None: the number of scored tokens
    return linear_loss(
        lambda scored, cu: -scored.logps, hidden, weight, targets, groups="tokens", denominator=denominator, rows=rows,
        metrics_fn=metrics, entropy=token_metrics, entropy_grad=False, top1=token_metrics, schedule=schedule, **head,
    )  # fmt: skip
