"""Preference losses from hidden states, streamed pair by pair."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastalign.linear.metrics import accuracy_and_entropy
from fastalign.losses import check_reduction, dpo_metrics, mean_metric, pair_losses
from fastalign.ops import linear_loss, sequence_logps
from fastalign.types import IGNORE_INDEX, LinearLogps, LossOutput, Metric


def linear_dpo_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ref_logps: Tensor, cu_seqlens: Tensor | None = None,
    beta: float = 0.1, loss_type: str = "sigmoid", label_smoothing: float = 0.0, length_alpha: float = 0.0,
    reduction: str = "mean", num_items: int | Tensor | None = None, rows: Tensor | None = None, bias: Tensor | None =
    None,
    temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None, ignore_index: int = IGNORE_INDEX,
    token_metrics: bool = False, backend: str = "auto", schedule: str = "auto", workspace_mb: float | None = None,
) -> LossOutput:  # fmt: skip
    """DPO and its pairwise relatives from hidden states, streamed pair by pair: three GEMMs, no logits, no second pass.

    Equal to `dpo_loss(sequence_logps(linear_logps(...)), ref_logps)` in loss, gradients and metrics.

    Args:
        hidden: padded (2P, T, H), chosen responses in the first half of the batch and rejected in the second; or packed
            (N, H) with cu_seqlens (2P + 1,) on the host, sequences in the same order.
        weight: (V, H) the head. bias: (V,) or None.
        targets: (2P, T) or (N,) int64, aligned with hidden (already shifted); `ignore_index` on prompt and padding,
            whose rows cost nothing.
        ref_logps: (2P,) float32, the reference's log-prob of each response, summed over its completion, in nats.
        beta, loss_type, label_smoothing, length_alpha, reduction, num_items: as in `losses.dpo_loss`; |y| is the number
            of scored tokens of a response. reduction="none" gives (P,) and scores everything before the loss
            (deferred).
        rows, temperature, logit_scale, softcap, backend, schedule, workspace_mb: as in `linear_logps`.
        token_metrics: also, as TRL logs them, `entropy` (nats, mean over completion tokens), `mean_token_accuracy` (of
            the chosen responses), `logits/chosen` and `logits/rejected` (mean over tokens and vocabulary).
    Returns:
        LossOutput with the metrics of `losses.dpo_loss`.
    Raises:
        ValueError: as those two, and where hidden does not hold an even number of sequences.
    """
    check_reduction(reduction, num_items)
    sequences = _count_sequences(hidden, targets, cu_seqlens)
    if sequences % 2:
        raise ValueError(f"hidden must hold chosen and rejected responses in equal halves, got {sequences} sequences")
    if tuple(ref_logps.shape) != (sequences,):
        raise ValueError(f"ref_logps must be ({sequences},), one sum per sequence, got {tuple(ref_logps.shape)}")
    if ref_logps.requires_grad:
        raise ValueError("ref_logps requires grad; the reference is fixed: detach it")
    pairs = sequences // 2
    options: dict[str, Any] = {
        "beta": beta, "loss_type": loss_type, "label_smoothing": label_smoothing, "length_alpha": length_alpha
    }  # fmt: skip
    head: dict[str, Any] = {
        "rows": rows, "bias": bias, "temperature": temperature, "logit_scale": logit_scale, "softcap": softcap,
        "ignore_index": ignore_index, "backend": backend, "schedule": schedule, "workspace_mb": workspace_mb,
    }  # fmt: skip

    def losses(scored: LinearLogps, cu: Tensor, ref_logps: Tensor) -> Tensor:
        chosen_lengths, rejected_lengths = _lengths(cu, ref_logps)
        return pair_losses(
            *_halves(scored, cu, ref_logps), chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths, **options
        )

    def metrics(scored: LinearLogps, cu: Tensor, ref_logps: Tensor) -> dict[str, Metric]:
        chosen_lengths, rejected_lengths = _lengths(cu, ref_logps)
        found = dpo_metrics(
            *_halves(scored, cu, ref_logps), chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths, beta=beta
        )
        return found | (_token_metrics(scored, cu) if token_metrics else {})

    groups = list(range(pairs)) * 2
    denominator: float | Tensor = 1.0
    if reduction == "mean":
        denominator = max(pairs, 1) if num_items is None else num_items
    return linear_loss(
        losses, hidden, weight, targets, cu_seqlens=cu_seqlens, groups=groups, inputs={"ref_logps": ref_logps},
        denominator=denominator, metrics_fn=metrics, entropy=token_metrics, top1=token_metrics,
        mean_logits=token_metrics,
        reduce=reduction != "none", **head,
    )  # fmt: skip


def _count_sequences(hidden: Tensor, targets: Tensor, cu_seqlens: Tensor | None) -> int:
    if cu_seqlens is not None:
        return cu_seqlens.shape[0] - 1
    if targets.dim() != 2:
        raise ValueError(
            f"give padded hidden (2P, T, H), or packed hidden (N, H) with cu_seqlens; got hidden {tuple(hidden.shape)}"
        )
    return targets.shape[0]


def _halves(scored: LinearLogps, cu: Tensor, ref_logps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(chosen, rejected, ref chosen, ref rejected) log-probs, (P',) each, of a chunk of whole pairs."""
    logps = sequence_logps(scored.logps, cu_seqlens=cu)
    chosen, rejected = logps.chunk(2) if len(logps) else (logps, logps)
    ref_chosen, ref_rejected = ref_logps.chunk(2) if len(logps) else (ref_logps, ref_logps)
    return chosen, rejected, ref_chosen, ref_rejected


def _lengths(cu: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(chosen, rejected) completion lengths, (P',) each."""
    lengths = cu.diff().to(device=like.device, non_blocking=True)
    chosen, rejected = lengths.chunk(2) if len(lengths) else (lengths, lengths)
    return chosen, rejected


def _token_metrics(scored: LinearLogps, cu: Tensor) -> dict[str, Metric]:
    assert scored.mean_logits is not None
    middle = int(cu[len(cu) // 2])  # cu is on the host
    return accuracy_and_entropy(scored, middle) | {
        "logits/chosen": mean_metric(scored.mean_logits[:middle]),
        "logits/rejected": mean_metric(scored.mean_logits[middle:]),
    }
