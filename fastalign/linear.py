"""The fused public losses: a pure loss of fastalign.losses and a schedule of fastalign.ops, a few lines each."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastalign.losses import (
    check_policy_options,
    check_reduction,
    dpo_metrics,
    mean_metric,
    pair_losses,
    policy_losses,
    policy_metrics,
    token_weights,
)
from fastalign.ops import linear_logps, linear_loss, sequence_logps
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


def linear_ppo_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, old_logps: Tensor, advantages: Tensor,
    ref_logps: Tensor | None = None, epsilon_low: float = 0.2, epsilon_high: float = 0.2,
    dual_clip: float | None = None, kl_coef: float = 0.0, kl_estimator: str = "k3", entropy_coef: float = 0.0,
    aggregation: str = "token_mean", max_completion_length: int | None = None, reduction: str = "mean",
    num_items: int | Tensor | None = None, rows: Tensor | None = None, bias: Tensor | None = None,
    temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None, ignore_index: int = IGNORE_INDEX,
    token_metrics: bool = False, backend: str = "auto", schedule: str = "auto", workspace_mb: float | None = None,
) -> LossOutput:  # fmt: skip
    """PPO from hidden states, streamed token by token: three GEMMs, no logits, no second pass.

    Equal to `losses.ppo_loss(linear_logps(...).logps, ...)` in loss, gradients and metrics; REINFORCE, RLOO and GRPO
    are this function with other advantages. Tokens without a gradient, which are the clipped ones and those whose
    advantage is 0, unless a KL or entropy term gives them one, cost one GEMM instead of three: they are scored for the
    metrics and left out of the gradient GEMMs. On the CPU only: a GPU's host would have to wait to know them.

    Args:
        hidden: (B, T, H), or (N, H) with aggregation="token_mean"; targets: (B, T) or (N,) int64, aligned with hidden,
            `ignore_index` on prompt, padding and whatever was not sampled, whose rows cost nothing.
        weight: (V, H) the head. bias: (V,) or None. temperature: that of the sampler, so that ratios start at 1.
        old_logps, advantages, ref_logps: targets' shape, float; what they hold where targets are ignored, NaN included,
            never enters.
        epsilon_low, epsilon_high, dual_clip, kl_coef, kl_estimator, entropy_coef, aggregation, max_completion_length,
            reduction, num_items: as in `losses.ppo_loss`. The entropy's gradient flows through the head.
        token_metrics: also `entropy` (without entropy_coef it is computed for this metric alone).
        rows, logit_scale, softcap, backend, schedule, workspace_mb: as in `linear_logps`.
    Returns:
        LossOutput with the metrics of `losses.ppo_loss`.
    Raises:
        ValueError: as those two, and for old_logps, advantages or ref_logps of another shape or requiring grad.
    """
    check_reduction(reduction, num_items)
    if reduction == "none":
        raise ValueError("reduction='none' keeps every token's loss: call linear_logps and losses.ppo_loss")
    check_policy_options(
        epsilon_low=epsilon_low, epsilon_high=epsilon_high, dual_clip=dual_clip, kl_coef=kl_coef,
        kl_estimator=kl_estimator, entropy_coef=entropy_coef, aggregation=aggregation,
        max_completion_length=max_completion_length, has_reference=ref_logps is not None,
    )  # fmt: skip
    if targets.dim() != 2 and aggregation != "token_mean":
        raise ValueError(f"aggregation={aggregation!r} needs sequences: targets (B, T), got {tuple(targets.shape)}")
    given = {"old_logps": old_logps, "advantages": advantages}
    if ref_logps is not None:
        given["ref_logps"] = ref_logps
    for name, tensor in given.items():
        if tensor.shape != targets.shape:
            raise ValueError(
                f"{name}: shape {tuple(tensor.shape)}, accepted is that of targets, {tuple(targets.shape)}"
            )
    weights, denominator = token_weights(targets != ignore_index, aggregation, num_items, max_completion_length)
    options: dict[str, Any] = {
        "epsilon_low": epsilon_low, "epsilon_high": epsilon_high, "dual_clip": dual_clip, "kl_estimator": kl_estimator
    }  # fmt: skip

    def losses(scored: LinearLogps, cu: None, weights: Tensor, **given: Any) -> Tensor:
        given = {name: tensor.to(scored.logps.dtype) for name, tensor in given.items()}
        return weights.to(scored.logps.dtype) * policy_losses(
            scored.logps, **given, entropy=scored.entropy, kl_coef=kl_coef, entropy_coef=entropy_coef, **options
        )

    def metrics(scored: LinearLogps, cu: None, weights: Tensor, **given: Any) -> dict[str, Metric]:
        given = {name: tensor.to(scored.logps.dtype) for name, tensor in given.items()}
        return policy_metrics(scored.logps, **given, entropy=scored.entropy, **options)

    return linear_loss(
        losses, hidden, weight, targets, groups="tokens", inputs={"weights": weights, **given}, metrics_fn=metrics,
        denominator=1.0 if reduction == "sum" else denominator, entropy=bool(entropy_coef) or token_metrics, rows=rows,
        bias=bias, temperature=temperature, logit_scale=logit_scale, softcap=softcap, ignore_index=ignore_index,
        backend=backend, schedule=schedule, workspace_mb=workspace_mb,
    )  # fmt: skip


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, reduction: str = "mean", num_items: int | Tensor | None = None,
    rows: Tensor | None = None, bias: Tensor | None = None, temperature: float = 1.0, logit_scale: float = 1.0,
    softcap: float | None = None, ignore_index: int = IGNORE_INDEX, token_metrics: bool = False, backend: str = "auto",
    schedule: str = "auto", workspace_mb: float | None = None,
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
        return {"nll": mean_metric(-scored.logps)} | (_accuracy_and_entropy(scored) if token_metrics else {})

    if reduction == "sum":
        denominator: float | Tensor | None = 1.0
    else:
        denominator = num_items  # None: the number of scored tokens
    return linear_loss(
        lambda scored, cu: -scored.logps, hidden, weight, targets, groups="tokens", denominator=denominator, rows=rows,
        metrics_fn=metrics, entropy=token_metrics, top1=token_metrics, schedule=schedule, **head,
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


def _accuracy_and_entropy(scored: LinearLogps, last: int | None = None) -> dict[str, Metric]:
    """Mean entropy of all tokens, and accuracy of the first `last` of them."""
    assert scored.entropy is not None
    assert scored.is_top1 is not None
    return {"entropy": mean_metric(scored.entropy), "mean_token_accuracy": mean_metric(scored.is_top1[:last].float())}


def _token_metrics(scored: LinearLogps, cu: Tensor) -> dict[str, Metric]:
    assert scored.mean_logits is not None
    middle = int(cu[len(cu) // 2])  # cu is on the host
    return _accuracy_and_entropy(scored, middle) | {
        "logits/chosen": mean_metric(scored.mean_logits[:middle]),
        "logits/rejected": mean_metric(scored.mean_logits[middle:]),
    }
