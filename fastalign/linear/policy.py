"""Policy-gradient losses from hidden states, streamed token by token."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastalign.losses import check_policy_options, check_reduction, policy_losses, policy_metrics, token_weights
from fastalign.ops import linear_loss
from fastalign.types import IGNORE_INDEX, LinearLogps, LossOutput, Metric


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
