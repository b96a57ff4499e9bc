"""Policy-gradient losses on sampled tokens: PPO's clip and penalty, KL to a reference, entropy.

REINFORCE, RLOO and GRPO are the same function with other advantages (`fastalign.ops.advantages`): at logps = old_logps
the gradient of ratio·A is that of logps·A.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastalign.losses.masking import masked
from fastalign.losses.reduction import check_reduction
from fastalign.types import LossOutput, Metric

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "constant")

KL_ESTIMATORS = {
    "k1": lambda d: d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: torch.expm1(-d) + d,
}
"""Estimators of KL(π‖π_ref) from d = logps − ref_logps at a token sampled from π (J. Schulman 2020); k3 is never
negative."""


def kl_estimate(logps: Tensor, ref_logps: Tensor, estimator: str = "k3") -> Tensor:
    """Per-token estimate of KL(π‖π_ref) in nats, of logps' shape: "k1" d, "k2" d²/2, "k3" exp(−d) − 1 + d.

    d = logps − ref_logps at tokens sampled from π. k1 and k3 are unbiased, k2 is not, but its gradient is that of the
    KL. As a loss k1 has an expected gradient of zero.

    Raises:
        ValueError: an unknown estimator, or shapes that differ.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"estimator={estimator!r}: accepted are {', '.join(map(repr, KL_ESTIMATORS))}")
    if logps.shape != ref_logps.shape:
        raise ValueError(f"ref_logps: shape {tuple(ref_logps.shape)}, accepted is that of logps, {tuple(logps.shape)}")
    return KL_ESTIMATORS[estimator](logps - ref_logps)


def policy_losses(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    ref_logps: Tensor | None = None,
    entropy: Tensor | None = None,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
) -> Tensor:
    """The loss of `ppo_loss` at each token, of logps' shape, not aggregated and without metrics or a mask."""
    ratio = torch.exp(logps - old_logps)
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    losses = -objective
    if kl_coef:
        assert ref_logps is not None
        losses = losses + kl_coef * kl_estimate(logps, ref_logps, kl_estimator)
    if entropy_coef:
        assert entropy is not None
        losses = losses - entropy_coef * entropy
    return losses


def check_policy_options(
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    aggregation: str = "token_mean",
    max_completion_length: int | None = None,
    has_reference: bool = True,
    has_entropy: bool = True,
) -> None:
    """Raise ValueError for an option of `ppo_loss` that cannot be honoured, naming it."""
    if not 0 <= epsilon_low <= 1:
        raise ValueError(f"epsilon_low={epsilon_low}: the ratio is clipped at 1 − epsilon_low, so it must be in [0, 1]")
    if not epsilon_high >= 0:
        raise ValueError(
            f"epsilon_high={epsilon_high}: the ratio is clipped at 1 + epsilon_high, so it must be at least 0"
        )
    if dual_clip is not None and not 1 < dual_clip < math.inf:
        raise ValueError(
            f"dual_clip={dual_clip}: it bounds the ratio where the advantage is negative and must exceed 1"
        )
    for name, value in (("kl_coef", kl_coef), ("entropy_coef", entropy_coef)):
        if not math.isfinite(value):
            raise ValueError(f"{name}={value}: it must be finite")
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator={kl_estimator!r}: accepted are {', '.join(map(repr, KL_ESTIMATORS))}")
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation={aggregation!r}: accepted are {', '.join(map(repr, AGGREGATIONS))}")
    if (max_completion_length is not None) != (aggregation == "constant"):
        raise ValueError("max_completion_length is the constant of aggregation='constant': give both or neither")
    if kl_coef and not has_reference:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logps, the reference's log-probs of the same tokens")
    if entropy_coef and not has_entropy:
        raise ValueError(f"entropy_coef={entropy_coef} needs entropy, of logps' shape")


def token_weights(
    mask: Tensor, aggregation: str, num_items: int | Tensor | None = None, max_completion_length: int | None = None
) -> tuple[Tensor, Tensor | int]:
    """How per-token losses (B, T) are added up: (weights (B, T) float32, 0 outside the mask; the denominator).

    num_items: the denominator's count over all micro-batches and processes: tokens for "token_mean", sequences with at
    least one token for the others. None: those at hand.
    """
    weights = mask.to(torch.float32)
    lengths = weights.sum(-1)
    if aggregation == "token_mean":
        return weights, lengths.sum().clamp(min=1) if num_items is None else num_items
    sequences = (lengths > 0).sum().clamp(min=1) if num_items is None else num_items
    if aggregation == "sequence_mean":
        weights = weights / lengths.clamp(min=1)[..., None]
    if aggregation == "constant":
        assert max_completion_length is not None
        sequences = sequences * max_completion_length
    return weights, sequences


def ppo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    ref_logps: Tensor | None = None,
    entropy: Tensor | None = None,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    aggregation: str = "token_mean",
    max_completion_length: int | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> LossOutput:
    """PPO with a clipped ratio (arXiv 1707.06347 eq. 7), an entropy bonus, and a KL to the reference in the loss.

        ρ = exp(logps − old_logps)
        −min(ρA, clip(ρ, 1 − epsilon_low, 1 + epsilon_high)·A) + kl_coef·KL − entropy_coef·H

    Args:
        logps, old_logps, advantages: (B, T) float, log-probs in nats of the sampled tokens under the policy and under
            the policy that sampled them, and the advantage of each. float64 stays float64, else float32.
        mask: (B, T) bool, True where a token was sampled and counts; what lies outside, NaN included, never enters.
        ref_logps: (B, T), needed by kl_coef. entropy: (B, T) nats, differentiable, needed by entropy_coef.
        epsilon_low, epsilon_high: the clip range; epsilon_high > epsilon_low is DAPO's clip-higher (arXiv 2503.14476).
        dual_clip: > 1; where A < 0 the objective is not below dual_clip·A (arXiv 1912.09729).
        kl_estimator: "k1", "k2" or "k3", see `kl_estimate`.
        aggregation: "token_mean" over valid tokens; "sequence_mean", the mean of per-sequence means (GRPO);
            "sequence_sum", the mean of per-sequence sums; "constant", the sum over sequences × max_completion_length
            (Dr. GRPO, arXiv 2503.20783). Sequences without a valid token do not count.
        reduction: "mean" as above, "sum" leaves out the denominator, "none" gives (B, T), 0 outside the mask.
        num_items: the tokens ("token_mean") or sequences of the whole optimiser step; None: those at hand.

    Returns:
        LossOutput with, as means over valid tokens, `approx_kl` (old_logps − logps), `approx_kl_k3`, `clip_fraction`,
        `clip_fraction/low`, `clip_fraction/high`, `ratio`; `kl` with ref_logps, `entropy` where given.

    Raises:
        ValueError: shapes or devices that differ, or an option that cannot be honoured.
    """
    check_reduction(reduction, num_items)
    check_policy_options(
        epsilon_low=epsilon_low, epsilon_high=epsilon_high, dual_clip=dual_clip, kl_coef=kl_coef,
        kl_estimator=kl_estimator, entropy_coef=entropy_coef, aggregation=aggregation,
        max_completion_length=max_completion_length, has_reference=ref_logps is not None,
        has_entropy=entropy is not None,
    )  # fmt: skip
    given = {"old_logps": old_logps, "advantages": advantages, "ref_logps": ref_logps, "entropy": entropy}
    values, mask = masked(logps, given, mask)
    options: dict[str, Any] = {
        "epsilon_low": epsilon_low, "epsilon_high": epsilon_high, "dual_clip": dual_clip,
    }  # fmt: skip
    losses = policy_losses(**values, **options, kl_coef=kl_coef, kl_estimator=kl_estimator, entropy_coef=entropy_coef)
    metrics = policy_metrics(**values, mask=mask, kl_estimator=kl_estimator, **options)
    how = aggregation, reduction, num_items, max_completion_length
    return LossOutput(_aggregated(losses, mask, *how), metrics)


@torch.no_grad()
def policy_metrics(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    ref_logps: Tensor | None = None,
    entropy: Tensor | None = None,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = None,
    kl_estimator: str = "k3",
) -> dict[str, Metric]:
    """The metrics of `ppo_loss`; None for a mask counts every token."""
    weights = torch.ones_like(logps) if mask is None else mask.to(logps.dtype)
    count = weights.sum()

    def mean(values: Tensor) -> Metric:
        return Metric((values.to(weights.dtype) * weights).sum(), count)

    difference = logps - old_logps
    ratio = difference.exp()
    high = (ratio > 1 + epsilon_high) & (advantages > 0)
    low = (ratio < 1 - epsilon_low) & (advantages < 0)
    if dual_clip is not None:
        high |= (ratio > dual_clip) & (advantages < 0)
    metrics = {
        "approx_kl": mean(-difference),
        "approx_kl_k3": mean(KL_ESTIMATORS["k3"](-difference)),
        "clip_fraction": mean(low | high),
        "clip_fraction/low": mean(low),
        "clip_fraction/high": mean(high),
        "ratio": mean(ratio),
    }
    if ref_logps is not None:
        metrics["kl"] = mean(kl_estimate(logps, ref_logps, kl_estimator))
    if entropy is not None:
        metrics["entropy"] = mean(entropy)
    return metrics


def ppo_penalty_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    penalty_coef: float,
    aggregation: str = "token_mean",
    max_completion_length: int | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> LossOutput:
    """PPO with a KL penalty instead of a clip (arXiv 1707.06347 eq. 8): −(ρA − penalty_coef·KL(π_old‖π)).

    The KL is estimated at the sampled tokens by ρ − 1 − log ρ, which is unbiased and never negative; its mean is the
    metric `approx_kl_k3`. Arguments otherwise as in `ppo_loss`.
    """
    check_reduction(reduction, num_items)
    if not 0 <= penalty_coef < math.inf:
        raise ValueError(f"penalty_coef={penalty_coef}: it must be at least 0 and finite")
    check_policy_options(aggregation=aggregation, max_completion_length=max_completion_length)
    values, mask = masked(logps, {"old_logps": old_logps, "advantages": advantages}, mask)
    log_ratio = values["logps"] - values["old_logps"]
    losses = -(log_ratio.exp() * values["advantages"] - penalty_coef * (torch.expm1(log_ratio) - log_ratio))
    metrics = policy_metrics(**values, mask=mask)
    how = aggregation, reduction, num_items, max_completion_length
    return LossOutput(_aggregated(losses, mask, *how), metrics)


def _aggregated(
    losses: Tensor, mask: Tensor, aggregation: str, reduction: str, num_items: int | Tensor | None,
    max_completion_length: int | None,
) -> Tensor:  # fmt: skip
    if reduction == "none":
        return losses * mask
    weights, denominator = token_weights(mask, aggregation, num_items, max_completion_length)
    total = (losses * weights.to(losses.dtype)).sum()
    return total if reduction == "sum" else total / denominator
