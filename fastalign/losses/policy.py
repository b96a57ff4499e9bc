"""Policy-gradient losses on sampled tokens: clipped and capped ratios, PPO's penalty, KL to a reference, entropy.

REINFORCE, RLOO and GRPO are the same function with other advantages (`fastalign.ops.advantages`): at logps = old_logps
the gradient of ratio·A is that of logps·A. The variants stand in `policy_options.POLICY_LOSSES`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastalign.losses.masking import masked
from fastalign.losses.policy_options import AGGREGATIONS, KL_ESTIMATORS, PolicyOptions, check_policy_options
from fastalign.losses.reduction import check_reduction
from fastalign.losses.sampler import check_sampler_options, sampler_weights
from fastalign.losses.sequences import Sequences
from fastalign.types import LossOutput, Metric

__all__ = [
    "AGGREGATIONS",
    "KL_ESTIMATORS",
    "check_policy_options",
    "kl_estimate",
    "policy_losses",
    "policy_metrics",
    "ppo_loss",
    "ppo_penalty_loss",
    "token_weights",
]


def kl_estimate(logps: Tensor, ref_logps: Tensor, estimator: str = "k3") -> Tensor:
    """Per-token estimate of KL(π‖π_ref) in nats, of logps' shape: "k1" d, "k2" d²/2, "k3" exp(−d) − 1 + d.

    d = logps − ref_logps at tokens sampled from π. k1 and k3 are unbiased, k2 is not, but its gradient is that of the
    KL. As a loss k1 has an expected gradient of zero.

    Raises:
        ValueError: an unknown estimator, or shapes, devices or dtypes that do not fit.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"estimator={estimator!r}: accepted are {', '.join(map(repr, KL_ESTIMATORS))}")
    if logps.shape != ref_logps.shape or logps.device != ref_logps.device:
        raise ValueError(
            f"ref_logps: shape {tuple(ref_logps.shape)} on {ref_logps.device}, accepted is that of logps, "
            f"{tuple(logps.shape)} on {logps.device}"
        )
    for name, values in (("logps", logps), ("ref_logps", ref_logps)):
        if not values.is_floating_point():
            raise ValueError(f"{name}: dtype {values.dtype}, accepted are floating-point log-probs")
    return KL_ESTIMATORS[estimator](logps - ref_logps)


def policy_losses(
    options: PolicyOptions,
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    ref_logps: Tensor | None = None,
    entropy: Tensor | None = None,
    sampler_weights: Tensor | None = None,
    sequences: Sequences | None = None,
) -> Tensor:
    """The loss of `ppo_loss` at each token, of logps' shape, not aggregated and without metrics or a mask.

    sampler_weights: of `sampler_weights`. sequences: needed where `options.by_sequence`; all tensors are then 0 outside
    its mask.
    """
    ratio = _ratio(options, logps - old_logps, sequences)
    bounded = ratio.clamp(1 - options.epsilon_low, 1 + options.epsilon_high)
    if options.objective == "cispo":
        objective = bounded.detach() * advantages * logps
    else:
        objective = torch.minimum(ratio * advantages, bounded * advantages)
        if options.dual_clip is not None:
            floor = torch.maximum(objective, options.dual_clip * advantages)
            objective = torch.where(advantages < 0, floor, objective)
    losses = -objective if sampler_weights is None else -objective * sampler_weights
    if options.kl_coef:
        assert ref_logps is not None
        losses = losses + options.kl_coef * kl_estimate(logps, ref_logps, options.kl_estimator)
    if options.entropy_coef:
        assert entropy is not None
        losses = losses - options.entropy_coef * entropy
    return losses


def _ratio(options: PolicyOptions, log_ratio: Tensor, sequences: Sequences | None) -> Tensor:
    """The ratio that weighs each token, at the level asked for."""
    if not options.by_sequence:
        return log_ratio.exp()
    assert sequences is not None
    mean = sequences.mean(log_ratio)
    if options.importance_sampling_level == "sequence_token":  # the sequence's value, the token's own gradient
        mean = mean.detach() + (log_ratio - log_ratio.detach())
    return mean.exp()


def token_weights(
    mask: Tensor, aggregation: str, num_items: int | Tensor | None = None, max_completion_length: int | None = None,
    *, cu_seqlens: Tensor | None = None, dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | int]:  # fmt: skip
    """How per-token losses are added up: (weights of mask's shape, 0 outside the mask; the denominator).

    mask: bool (B, T), or (N,) with cu_seqlens on the host. num_items: the denominator's count over all micro-batches
    and processes: tokens for "token_mean", sequences with at least one token for the others. None: those at hand.
    """
    if aggregation == "token_mean":
        weights = mask.to(dtype)
        return weights, weights.sum().clamp(min=1) if num_items is None else num_items
    sequences = Sequences(mask, cu_seqlens, dtype=dtype)
    weights = sequences.shares() if aggregation == "sequence_mean" else mask.to(dtype)
    count = sequences.count.clamp(min=1) if num_items is None else num_items
    if aggregation == "constant":
        assert max_completion_length is not None
        count = count * max_completion_length
    return weights, count


def ppo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    ref_logps: Tensor | None = None,
    entropy: Tensor | None = None,
    loss_type: str = "ppo",
    importance_sampling_level: str | None = None,
    epsilon_low: float | None = None,
    epsilon_high: float | None = None,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    aggregation: str | None = None,
    max_completion_length: int | None = None,
    sampler_logps: Tensor | None = None,
    sampler_correction: str = "token_truncate",
    sampler_cap: float = 2.0,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> LossOutput:
    """PPO with a clipped ratio (arXiv 1707.06347 eq. 7) and its variants, an entropy bonus, and a KL to the reference.

        ρ = exp(logps − old_logps)
        −w·min(ρA, clip(ρ, 1 − epsilon_low, 1 + epsilon_high)·A) + kl_coef·KL − entropy_coef·H

    Args:
        logps, old_logps, advantages: (B, T) float, log-probs in nats of the sampled tokens under the policy and under
            the policy that sampled them, and the advantage of each. float64 stays float64, else float32.
        mask: (B, T) bool, True where a token was sampled and counts; what lies outside, NaN included, never enters.
        ref_logps: (B, T), needed by kl_coef. entropy: (B, T) nats, differentiable, needed by entropy_coef.
        loss_type: "ppo", "rloo", "grpo", "dr_grpo", "dapo", "gspo" or "cispo" (`POLICY_LOSSES`, with formulas and
            sources): which values the following take where they are None. CISPO's −w·sg(clip(ρ))·A·logps takes the
            place of the clipped objective.
        importance_sampling_level: "token"; "sequence", exp of the mean log-ratio of each sequence, through all of whose
            log-probs the gradient flows (GSPO); "sequence_token", the same value with the gradient of each token's own
            log-prob, for advantages that vary within a sequence (GSPO-token).
        epsilon_low, epsilon_high: the clip range, from 1 on; "ppo" has 0.2. epsilon_high > epsilon_low is DAPO's
            clip-higher. In "cispo" weights are clipped, so its cap is 1 + epsilon_high; TRL's epsilon_high is there the
            cap itself. epsilon_low=1 has no lower side.
        dual_clip: > 1; where A < 0 the objective is not below dual_clip·A (arXiv 1912.09729). Not in "cispo".
        kl_estimator: "k1", "k2" or "k3", see `kl_estimate`.
        aggregation: "token_mean" over valid tokens ("ppo", DAPO, CISPO); "sequence_mean", the mean of per-sequence
            means (GRPO, GSPO); "sequence_sum", the mean of per-sequence sums; "constant", the sum over sequences ×
            max_completion_length (Dr. GRPO). Sequences without a valid token do not count.
        sampler_logps: (B, T), the tokens' log-probs under the distribution that the sampler really drew from, where
            that is not old_logps'. The policy term then weighs w = min(exp(old_logps − sampler_logps), sampler_cap),
            without a gradient; KL and entropy do not.
        sampler_correction: "token_truncate", or "token_mask", "sequence_truncate", "sequence_mask": how, see
            `sampler_weights`; TRL's vllm_importance_sampling_mode. sampler_cap: TRL's vllm_importance_sampling_cap.
        reduction: "mean" as above, "sum" leaves out the denominator, "none" gives (B, T), 0 outside the mask.
        num_items: the tokens ("token_mean") or sequences of the whole optimiser step; None: those at hand.

    Returns:
        LossOutput with, as means over valid tokens, `approx_kl` (old_logps − logps), `approx_kl_k3`; over tokens, or
        over sequences where ratios are those of sequences, `ratio`, `clip_fraction`, `clip_fraction/low` and
        `clip_fraction/high`, which are where the clip takes the gradient away, in "cispo" where it changes the weight;
        `kl` with ref_logps, `entropy` where given, `sampler_ratio`, `sampler_ratio/max` and `sampler_capped` with
        sampler_logps.

    Raises:
        ValueError: shapes or devices that differ, or an option that cannot be honoured.
    """
    check_reduction(reduction, num_items)
    options = check_policy_options(
        loss_type=loss_type, importance_sampling_level=importance_sampling_level, epsilon_low=epsilon_low,
        epsilon_high=epsilon_high, dual_clip=dual_clip, kl_coef=kl_coef, kl_estimator=kl_estimator,
        entropy_coef=entropy_coef, aggregation=aggregation, max_completion_length=max_completion_length,
        has_reference=ref_logps is not None, has_entropy=entropy is not None,
    )  # fmt: skip
    check_sampler_options(sampler_correction, sampler_cap, sampler_logps is not None)
    given = {
        "old_logps": old_logps, "advantages": advantages, "ref_logps": ref_logps, "entropy": entropy,
        "sampler_logps": sampler_logps,
    }  # fmt: skip
    values, mask = masked(logps, given, mask)
    sequences = Sequences(mask, dtype=values["logps"].dtype) if options.by_sequence else None
    weights: Tensor | None = None
    corrections: dict[str, Metric] = {}
    if sampler_logps is not None:
        weights, corrections = sampler_weights(
            values["old_logps"], values.pop("sampler_logps"), mask, sampler_correction=sampler_correction,
            sampler_cap=sampler_cap,
        )  # fmt: skip
    losses = policy_losses(options, **values, sampler_weights=weights, sequences=sequences)
    metrics = policy_metrics(options, **values, mask=mask, sequences=sequences)
    how = options.aggregation, reduction, num_items, max_completion_length
    return LossOutput(_aggregated(losses, mask, *how), metrics | corrections)


@torch.no_grad()
def policy_metrics(
    options: PolicyOptions,
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    ref_logps: Tensor | None = None,
    entropy: Tensor | None = None,
    sequences: Sequences | None = None,
) -> dict[str, Metric]:
    """The metrics of `ppo_loss`; None for a mask counts every token. sequences: needed where `options.by_sequence`."""
    weights = torch.ones_like(logps) if mask is None else mask.to(logps.dtype)
    count = weights.sum()
    shares, ratios = weights, count
    if sequences is not None:
        shares, ratios = sequences.shares(), sequences.count.to(logps.dtype)

    def mean(values: Tensor) -> Metric:
        return Metric((values.to(weights.dtype) * weights).sum(), count)

    def of_ratios(values: Tensor) -> Metric:
        return Metric((values.to(weights.dtype) * shares).sum(), ratios)

    difference = logps - old_logps
    ratio = _ratio(options, difference, sequences)
    high, low = ratio > 1 + options.epsilon_high, ratio < 1 - options.epsilon_low
    if options.objective == "clip":
        high, low = high & (advantages > 0), low & (advantages < 0)
    if options.dual_clip is not None:
        high |= (ratio > options.dual_clip) & (advantages < 0)
    metrics = {
        "approx_kl": mean(-difference),
        "approx_kl_k3": mean(KL_ESTIMATORS["k3"](-difference)),
        "clip_fraction": of_ratios(low | high),
        "clip_fraction/low": of_ratios(low),
        "clip_fraction/high": of_ratios(high),
        "ratio": of_ratios(ratio),
    }
    if ref_logps is not None:
        metrics["kl"] = mean(kl_estimate(logps, ref_logps, options.kl_estimator))
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
    options = check_policy_options(aggregation=aggregation, max_completion_length=max_completion_length)
    values, mask = masked(logps, {"old_logps": old_logps, "advantages": advantages}, mask)
    log_ratio = values["logps"] - values["old_logps"]
    losses = -(log_ratio.exp() * values["advantages"] - penalty_coef * (torch.expm1(log_ratio) - log_ratio))
    metrics = policy_metrics(options, **values, mask=mask)
    how = aggregation, reduction, num_items, max_completion_length
    return LossOutput(_aggregated(losses, mask, *how), metrics)


def _aggregated(
    losses: Tensor, mask: Tensor, aggregation: str, reduction: str, num_items: int | Tensor | None,
    max_completion_length: int | None,
) -> Tensor:  # fmt: skip
    if reduction == "none":
        return losses * mask
    weights, denominator = token_weights(mask, aggregation, num_items, max_completion_length, dtype=losses.dtype)
    total = (losses * weights).sum()
    return total if reduction == "sum" else total / denominator
