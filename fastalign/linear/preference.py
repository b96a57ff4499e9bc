"""Preference losses on pairs from hidden states, streamed pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastalign.linear.metrics import accuracy_and_entropy
from fastalign.linear.sequences import check_detached, count_sequences, halved_sums, halves, lengths_on, sums
from fastalign.losses import (
    DPOOptions,
    check_pair_call,
    check_reduction,
    dpo_metrics,
    mean_metric,
    pair_losses,
    reduce_losses,
    sft_scale,
    tail_mask,
    wpo_weights,
)
from fastalign.ops import linear_loss
from fastalign.types import IGNORE_INDEX, LinearLogps, LossOutput, Metric


def linear_dpo_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ref_logps: Tensor | None = None,
    cu_seqlens: Tensor | None = None, beta: float = 0.1, loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None, label_smoothing: float = 0.0, length_alpha: float = 0.0,
    f_divergence_type: str = "reverse_kl", f_alpha_divergence_coef: float = 0.5, discopop_tau: float = 0.05,
    ld_alpha: float | None = None, use_weighting: bool = False, simpo_gamma: float = 0.5, cpo_alpha: float = 1.0,
    shift: float | Tensor = 0.0, num_chosen_tokens: int | Tensor | None = None, reduction: str = "mean",
    num_items: int | Tensor | None = None, rows: Tensor | None = None, bias: Tensor | None = None,
    temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None, ignore_index: int = IGNORE_INDEX,
    token_metrics: bool = False, backend: str = "auto", schedule: str = "auto", workspace_mb: float | None = None,
    accumulate_into: Tensor | None = None,
) -> LossOutput:  # fmt: skip
    """DPO and its pairwise relatives from hidden states, streamed pair by pair: three GEMMs, no logits, no second pass.

    Equal to `dpo_loss(sequence_logps(linear_logps(...)), ref_logps)` in loss, gradients and metrics.

    Args:
        hidden: padded (2P, T, H), chosen responses in the first half of the batch and rejected in the second; or packed
            (N, H) with cu_seqlens (2P + 1,) on the host, sequences in the same order.
        weight: (V, H) the head. bias: (V,) or None.
        targets: (2P, T) or (N,) int64, aligned with hidden (already shifted); `ignore_index` on prompt and padding,
            whose rows cost nothing.
        ref_logps: the reference's log-probs in nats: (2P,) float32, summed over each completion, or of targets' shape,
            per token, as `ld_alpha` needs them; what that holds where targets are ignored, NaN included, never enters.
            None for losses without a reference, which refuse one.
        beta, loss_type, loss_weights, label_smoothing, length_alpha, f_divergence_type, f_alpha_divergence_coef,
            discopop_tau, ld_alpha, simpo_gamma, cpo_alpha, shift, reduction, num_items: as in `losses.dpo_loss`; |y| is
            the number of scored tokens of a response. reduction="none" gives (P,) and scores everything before the loss
            (deferred), and so does a loss that couples its batch ("aot", "aot_unpaired").
        use_weighting: weigh each pair by how likely the policy is to have written it (WPO, `losses.wpo_weights`), from
            the same pass over the vocabulary.
        num_chosen_tokens: denominator of "sft", the chosen tokens of all that `num_items` counts; None: those at hand.
        rows, temperature, logit_scale, softcap, backend, schedule, workspace_mb, accumulate_into: as in `linear_logps`.
        token_metrics: also, as TRL logs them, `entropy` (nats, mean over completion tokens), `mean_token_accuracy` (of
            the chosen responses), `logits/chosen` and `logits/rejected` (mean over tokens and vocabulary).
    Returns:
        LossOutput with the metrics of `losses.dpo_loss`.
    Raises:
        ValueError: as those two, where hidden does not hold an even number of sequences, and for schedule="streamed"
            with a loss that couples its batch.
    """
    check_reduction(reduction, num_items)
    sequences = count_sequences(hidden, targets, cu_seqlens)
    if sequences % 2:
        raise ValueError(f"hidden must hold chosen and rejected responses in equal halves, got {sequences} sequences")
    options: dict[str, Any] = {
        "beta": beta, "loss_type": loss_type, "loss_weights": loss_weights, "label_smoothing": label_smoothing,
        "length_alpha": length_alpha, "f_divergence_type": f_divergence_type,
        "f_alpha_divergence_coef": f_alpha_divergence_coef, "discopop_tau": discopop_tau, "ld_alpha": ld_alpha,
        "use_weighting": use_weighting, "simpo_gamma": simpo_gamma, "cpo_alpha": cpo_alpha,
    }  # fmt: skip
    variants = check_pair_call(has_reference=ref_logps is not None, shift=shift, **options)
    by_token = _check_reference(ref_logps, targets, sequences, ld_alpha)
    pairs = sequences // 2
    scale = sft_scale(loss_type, None, num_chosen_tokens, num_items, pairs)
    if scale is None and "sft" in DPOOptions(loss_type=loss_type).loss_types:
        scale = sft_scale(loss_type, None, _chosen_tokens(targets, rows, cu_seqlens, pairs, ignore_index), None, pairs)
    coupled = any(variant.couples_batch for variant in variants)
    if coupled and schedule == "streamed":
        raise ValueError(
            f"schedule='streamed' needs a sum over pairs, but loss_type={loss_type!r} couples the batch; "
            "take schedule='auto'"
        )
    head: dict[str, Any] = {
        "rows": rows, "bias": bias, "temperature": temperature, "logit_scale": logit_scale, "softcap": softcap,
        "ignore_index": ignore_index, "backend": backend, "schedule": schedule, "workspace_mb": workspace_mb,
        "accumulate_into": accumulate_into,
    }  # fmt: skip

    def losses(scored: LinearLogps, cu: Tensor, ref_logps: Tensor | None = None) -> Tensor:
        logps, given = _inputs(scored, cu, ref_logps, by_token, ld_alpha)
        weights = _wpo_weights(scored, cu) if use_weighting else None
        return pair_losses(*logps, weights=weights, shift=shift, sft_scale=scale, **(given | options))

    def metrics(scored: LinearLogps, cu: Tensor, ref_logps: Tensor | None = None) -> dict[str, Metric]:
        logps, given = _inputs(scored, cu, ref_logps, by_token, ld_alpha)
        found = dpo_metrics(*logps, **given, beta=beta, loss_type=loss_type, ld_alpha=ld_alpha)
        return found | (_token_metrics(scored, cu) if token_metrics else {})

    denominator: float | Tensor = 1.0
    if reduction == "mean":
        denominator = max(pairs, 1) if num_items is None else num_items
    out = linear_loss(
        losses, hidden, weight, targets, cu_seqlens=cu_seqlens, groups=list(range(pairs)) * 2,
        inputs={} if ref_logps is None else {"ref_logps": ref_logps}, denominator=denominator, metrics_fn=metrics,
        entropy=token_metrics, entropy_grad=False, top1=token_metrics, mean_logits=token_metrics,
        log_sum_sq_probs=use_weighting, reduce=reduction != "none" and not coupled, **head,
    )  # fmt: skip
    return LossOutput(reduce_losses(out.loss, reduction, num_items), out.metrics) if coupled else out


def _check_reference(ref_logps: Tensor | None, targets: Tensor, sequences: int, ld_alpha: float | None) -> bool:
    """Whether ref_logps, if there, is per token; as many values as sequences are their sums, as in linear_loss."""
    if ref_logps is None:
        return False
    check_detached("ref_logps", ref_logps)
    shape, sums, per_token = tuple(ref_logps.shape), (sequences,), tuple(targets.shape)
    if shape not in (sums, per_token):
        raise ValueError(f"ref_logps must be {sums}, one sum per sequence, or {per_token}, one per token, got {shape}")
    if ld_alpha is not None and shape == sums:
        raise ValueError(
            f"ld_alpha={ld_alpha} weighs the tokens of the reference: ref_logps must be {per_token}, one per token, "
            f"got {shape}, one per sequence"
        )
    return shape != sums


def _chosen_tokens(
    targets: Tensor, rows: Tensor | None, cu_seqlens: Tensor | None, pairs: int, ignore_index: int
) -> int | Tensor:
    """Scored tokens of the chosen half, at least 1: a number where the rows are on the host, else on the device."""
    end = pairs * targets.shape[1] if cu_seqlens is None else int(cu_seqlens[pairs])
    if rows is None or rows.device.type != "cpu":
        return (targets.reshape(-1)[:end] != ignore_index).sum().clamp(min=1)
    return max(int((rows < end).sum()), 1)


def _inputs(
    scored: LinearLogps, cu: Tensor, ref_logps: Tensor | None, by_token: bool, ld_alpha: float | None
) -> tuple[list[Tensor], dict[str, Any]]:
    """Log-probs of `pair_losses` and what it takes beside them, of a chunk of whole pairs."""
    values = [scored.logps] if ref_logps is None else [scored.logps, ref_logps.to(scored.logps.dtype)]
    logps = [*halved_sums(values[0], cu)]
    for reference in values[1:]:
        logps += halved_sums(reference, cu) if by_token else halves(reference)
    chosen_lengths, rejected_lengths = halves(lengths_on(cu, scored.logps))
    given: dict[str, Any] = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    if ld_alpha is not None:
        tail = tail_mask(cu).to(scored.logps.device, non_blocking=True)
        given["tail_logps"] = [half for value in values for half in halved_sums(torch.where(tail, value, 0.0), cu)]
    return logps, given


def _wpo_weights(scored: LinearLogps, cu: Tensor) -> Tensor:
    assert scored.log_sum_sq_probs is not None
    alignment = scored.logps.detach() - scored.log_sum_sq_probs
    return wpo_weights(*halves(sums(alignment, cu, reduction="mean")))


def _token_metrics(scored: LinearLogps, cu: Tensor) -> dict[str, Metric]:
    assert scored.mean_logits is not None
    middle = int(cu[len(cu) // 2])  # cu is on the host
    return accuracy_and_entropy(scored, middle) | {
        "logits/chosen": mean_metric(scored.mean_logits[:middle]),
        "logits/rejected": mean_metric(scored.mean_logits[middle:]),
    }
