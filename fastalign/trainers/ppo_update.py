"""One mini-batch of a PPO update: policy loss through the fused head, critic's loss, and their metrics."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastalign.linear import linear_ppo_loss
from fastalign.losses import mean_metric, ppo_penalty_loss, token_weights, value_loss
from fastalign.models import Head
from fastalign.models.layouts import TokenLayout, run_layout
from fastalign.ops import linear_loss
from fastalign.trainers.batches import Batch
from fastalign.trainers.layouts import scored_rows
from fastalign.trainers.ppo_config import PPOConfig
from fastalign.types import IGNORE_INDEX, LinearLogps, LossOutput, Metric

# The loss functions' metrics under the names that TRL's PPO users know.
_POLICY_NAMES = {
    "approx_kl": "policy/approxkl_avg",
    "approx_kl_k3": "policy/approxkl_k3",
    "clip_fraction": "policy/clipfrac_avg",
    "clip_fraction/low": "policy/clipfrac_low",
    "clip_fraction/high": "policy/clipfrac_high",
    "ratio": "val/ratio",
    "kl": "policy/kl",
    "entropy": "policy/entropy_avg",
    "sampler_capped": "sampling/capped_fraction",
}
_VALUE_NAMES = {"clip_fraction": "val/clipfrac_avg"}


def policy_value_loss(
    model: nn.Module, batch: Batch, args: PPOConfig, *, tokens: int | Tensor, sequences: int | Tensor,
    penalty_coef: float, policy_coef: float | None = 1.0, with_value: bool = True, layout: TokenLayout | None = None,
) -> LossOutput:  # fmt: skip
    """policy_coef · policy loss + vf_coef · value loss of a piece of a mini-batch, each a share of the whole's mean.

    model: an `ActorCritic`, possibly wrapped. batch: padded sequences with old_logps, advantages, and where there are
    any ref_logps, returns and old_values, (n,) in the order of its rows. tokens, sequences: of the whole mini-batch,
    over its pieces and all processes. penalty_coef: of policy_loss="penalty". policy_coef: None leaves the policy out;
    0 takes it along without an effect, as data parallelism wants it of parameters that stay as they are. layout: of the
    batch, by `plan_layout`.
    """
    items = tokens if args.loss_aggregation == "token_mean" else sequences
    head_fn = None
    if policy_coef is not None:

        def head_fn(hidden: Tensor, head: Head) -> LossOutput:
            loss = _penalty_loss if args.policy_loss == "penalty" else _clip_loss
            return loss(hidden, head, batch, args, items, penalty_coef)

    policy, values = run_layout(model, batch, layout, head_fn, scores=with_value)
    loss = torch.zeros((), device=batch["input_ids"].device)
    metrics: dict[str, Metric] = {}
    if policy is not None:
        loss = loss + policy_coef * policy.loss
    if policy is not None and policy_coef:
        metrics |= {_POLICY_NAMES[name]: metric for name, metric in policy.metrics.items() if name in _POLICY_NAMES}
        share = len(batch["rows"]) if args.loss_aggregation == "token_mean" else scored_sequences(batch)
        metrics["loss/policy_avg"] = Metric(policy.loss.detach() * items, torch.full_like(policy.loss.detach(), share))
    if values is not None:
        critic = value_loss(
            values[None], batch["returns"][None], old_values=batch["old_values"][None],
            epsilon_value=args.cliprange_value, num_items=tokens,
        )  # fmt: skip
        loss = loss + args.vf_coef * critic.loss
        metrics |= {_VALUE_NAMES.get(name, f"val/{name}"): metric for name, metric in critic.metrics.items()}
        count = torch.full_like(critic.loss.detach(), len(batch["rows"]))
        metrics["loss/value_avg"] = Metric(critic.loss.detach() * tokens, count)
    return LossOutput(loss, metrics)


def scored_sequences(batch: Batch) -> int:
    """How many sequences have a token that counts."""
    return int(np.count_nonzero(np.diff(batch["cu_seqlens"])))


def _given(batch: Batch, device: torch.device) -> dict[str, Any]:
    names = ("old_logps", "advantages", "ref_logps", "sampler_logps")
    return {name: batch[name].to(device) for name in names if name in batch}


def _correction(batch: Batch, args: PPOConfig) -> dict[str, Any]:
    if "sampler_logps" not in batch:
        return {}
    return {"sampler_correction": args.sampler_correction, "sampler_cap": args.sampler_cap}


def _clip_loss(
    hidden: Tensor, head: Head, batch: Batch, args: PPOConfig, items: Any, penalty_coef: float
) -> LossOutput:
    return linear_ppo_loss(
        hidden, head.weight, **scored_rows(batch, hidden.device), **_given(batch, hidden.device),
        loss_type=args.loss_type, importance_sampling_level=args.importance_sampling_level,
        epsilon_low=args.cliprange, epsilon_high=args.epsilon_high, dual_clip=args.dual_clip,
        kl_coef=args.kl_loss_coef or 0.0, kl_estimator=args.kl_loss_estimator, entropy_coef=args.entropy_coef,
        aggregation=args.loss_aggregation, max_completion_length=args.max_completion_length, num_items=items,
        **_correction(batch, args),
        temperature=args.temperature, token_metrics=args.token_metrics, backend=args.backend, schedule=args.schedule,
        workspace_mb=args.workspace_mb, **head.options,
    )  # fmt: skip


def _penalty_loss(
    hidden: Tensor, head: Head, batch: Batch, args: PPOConfig, items: Any, penalty_coef: float
) -> LossOutput:
    scored_by = scored_rows(batch, hidden.device)
    targets = scored_by["targets"]
    weights, denominator = token_weights(
        targets != IGNORE_INDEX, str(args.loss_aggregation), items, args.max_completion_length,
        cu_seqlens=scored_by["cu_seqlens"],
    )  # fmt: skip
    given = {name: tensor for name, tensor in _given(batch, hidden.device).items() if name != "ref_logps"}

    def penalised(scored: LinearLogps, old_logps: Tensor, advantages: Tensor) -> LossOutput:
        return ppo_penalty_loss(
            scored.logps[None], old_logps[None], advantages[None], penalty_coef=penalty_coef, reduction="none"
        )

    def losses(scored: LinearLogps, cu: None, weights: Tensor, old_logps: Tensor, advantages: Tensor) -> Tensor:
        return penalised(scored, old_logps, advantages).loss[0] * weights.to(scored.logps.dtype)

    def metrics(
        scored: LinearLogps, cu: None, weights: Tensor, old_logps: Tensor, advantages: Tensor
    ) -> dict[str, Metric]:
        found = penalised(scored, old_logps, advantages).metrics
        return found if scored.entropy is None else found | {"entropy": mean_metric(scored.entropy)}

    return linear_loss(
        losses, hidden, head.weight, targets, groups="tokens", inputs={"weights": weights, **given},
        metrics_fn=metrics, denominator=denominator, entropy=args.token_metrics, rows=scored_by["rows"],
        temperature=args.temperature, backend=args.backend, schedule=args.schedule, workspace_mb=args.workspace_mb,
        **head.options,
    )  # fmt: skip
