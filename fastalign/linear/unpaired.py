"""Preference losses on single responses from hidden states, streamed response by response."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign.linear.metrics import accuracy_and_entropy
from fastalign.linear.sequences import check_per_sequence, count_sequences, lengths_on, sums
from fastalign.losses import check_reduction, check_response_call, response_losses, response_metrics
from fastalign.ops import linear_loss
from fastalign.types import IGNORE_INDEX, LinearLogps, LossOutput, Metric


def linear_kto_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ref_logps: Tensor, labels: Tensor, kl: Tensor | None = None,
    shift: float | Tensor = 0.0, cu_seqlens: Tensor | None = None, beta: float = 0.1, loss_type: str = "kto",
    desirable_weight: float = 1.0, undesirable_weight: float = 1.0, reduction: str = "mean",
    num_items: int | Tensor | None = None, rows: Tensor | None = None, bias: Tensor | None = None,
    temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None, ignore_index: int = IGNORE_INDEX,
    token_metrics: bool = False, backend: str = "auto", schedule: str = "auto", workspace_mb: float | None = None,
    accumulate_into: Tensor | None = None,
) -> LossOutput:  # fmt: skip
    """KTO and its relatives from hidden states, streamed response by response: three GEMMs, no logits.

    Equal to `kto_loss(sequence_logps(linear_logps(...)), ref_logps, labels)` in loss, gradients and metrics. The
    reference point of "kto" is not of this pass: score the mismatched pairs without a gradient first (`linear_logps`,
    `losses.kto_kl`) and hand in the value of the whole batch.

    Args:
        hidden: padded (S, T, H), or packed (N, H) with cu_seqlens (S + 1,) on the host: one sequence a response.
        weight: (V, H) the head. bias: (V,) or None.
        targets: (S, T) or (N,) int64, aligned with hidden (already shifted); `ignore_index` on prompt and padding,
            whose rows cost nothing.
        ref_logps: (S,) float32, the reference's log-prob of each response, summed over its completion, in nats.
        labels: (S,) bool, True = desirable.
        kl, shift, beta, loss_type, desirable_weight, undesirable_weight, reduction, num_items: as in
            `losses.kto_loss`. reduction="none" gives (S,) and scores everything before the loss (deferred).
        rows, temperature, logit_scale, softcap, backend, schedule, workspace_mb, accumulate_into: as in `linear_logps`.
        token_metrics: also `entropy` (nats, mean over completion tokens), `mean_token_accuracy` and `logits/chosen`,
            `logits/rejected` (mean over the tokens of desirable and undesirable responses, and the vocabulary).
    Returns:
        LossOutput with the metrics of `losses.kto_loss`, and `length/chosen`, `length/rejected` (mean completion
        tokens of desirable and undesirable responses).
    Raises:
        ValueError: as those two, and for ref_logps or labels that are not one per sequence or require grad.
    """
    check_reduction(reduction, num_items)
    sequences = count_sequences(hidden, targets, cu_seqlens)
    check_per_sequence("ref_logps", ref_logps, sequences)
    check_per_sequence("labels", labels, sequences)
    if labels.dtype != torch.bool:
        raise ValueError(f"labels: dtype {labels.dtype}, accepted is bool, True = desirable")
    options: dict[str, Any] = {
        "kl": kl, "shift": shift, "beta": beta, "loss_type": loss_type, "desirable_weight": desirable_weight,
        "undesirable_weight": undesirable_weight,
    }  # fmt: skip
    check_response_call(**options)

    def losses(scored: LinearLogps, cu: Tensor, ref_logps: Tensor, labels: Tensor) -> Tensor:
        return response_losses(sums(scored.logps, cu), ref_logps, labels, **options)

    def metrics(scored: LinearLogps, cu: Tensor, ref_logps: Tensor, labels: Tensor) -> dict[str, Metric]:
        logps = sums(scored.logps, cu)
        found = response_metrics(logps, ref_logps, labels, kl=kl, beta=beta)
        return found | _lengths_and_logits(scored, cu, labels, token_metrics)

    denominator: float | Tensor = 1.0
    if reduction == "mean":
        denominator = max(sequences, 1) if num_items is None else num_items
    return linear_loss(
        losses, hidden, weight, targets, cu_seqlens=cu_seqlens, inputs={"ref_logps": ref_logps, "labels": labels},
        denominator=denominator, metrics_fn=metrics, entropy=token_metrics, entropy_grad=False, top1=token_metrics,
        mean_logits=token_metrics, reduce=reduction != "none", rows=rows, bias=bias, temperature=temperature,
        logit_scale=logit_scale, softcap=softcap, ignore_index=ignore_index, backend=backend, schedule=schedule,
        workspace_mb=workspace_mb, accumulate_into=accumulate_into,
    )  # fmt: skip


def _lengths_and_logits(scored: LinearLogps, cu: Tensor, labels: Tensor, token_metrics: bool) -> dict[str, Metric]:
    lengths = lengths_on(cu, scored.logps).to(scored.logps.dtype)
    found = accuracy_and_entropy(scored) if token_metrics else {}
    logits = None if scored.mean_logits is None else sums(scored.mean_logits, cu)
    for side, of_side in (("chosen", labels), ("rejected", ~labels)):
        counts = of_side.to(lengths.dtype)
        found[f"length/{side}"] = Metric((lengths * counts).sum(), counts.sum())
        if logits is not None:
            found[f"logits/{side}"] = Metric((logits * counts).sum(), (lengths * counts).sum())
    return found
