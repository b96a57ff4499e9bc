"""From a phase's completions to what an update trains on: token rewards, advantages and returns, one per row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastalign.losses import (
    RunningMoments,
    deviation_metrics,
    explained_variance_metrics,
    kl_estimate,
    shape_scores,
    token_rewards,
)
from fastalign.losses.shaping import overlong_penalty
from fastalign.ops import discounted_returns, gae, group_advantages, whiten
from fastalign.trainers.ppo_config import PPOConfig
from fastalign.types import Metric


class TokenGrid:
    """Where the n completion tokens of S sequences, flat and in order, lie in an (S, C) tensor.

    cu_seqlens: (S + 1,) numpy, on the host. C is the longest completion.
    """

    def __init__(self, cu_seqlens: np.ndarray, device: torch.device) -> None:
        lengths = np.diff(cu_seqlens)
        self.shape = (len(lengths), int(lengths.max(initial=0)))
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        flat = sequence * self.shape[1] + np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
        self._index = torch.from_numpy(flat).to(device)
        self.mask = self.spread(torch.ones(len(flat), dtype=torch.bool, device=device))

    def spread(self, flat: Tensor) -> Tensor:
        """(n,) to (S, C), zero where there is no token."""
        grid = flat.new_zeros(self.shape[0] * self.shape[1])
        return grid.index_copy(0, self._index, flat).view(self.shape)

    def gather(self, grid: Tensor) -> Tensor:
        """(S, C) to (n,)."""
        return grid.flatten().index_select(0, self._index)


@dataclass(frozen=True, kw_only=True, eq=False)
class Experience:
    """What an update trains on, (n,) float32 each, in the order of the batch's rows; and the phase's metrics.

    returns: None without a critic. kept: (S,) bool, on the host, the completions to train on; None: all.
    """

    advantages: Tensor
    returns: Tensor | None
    metrics: dict[str, Metric]
    kept: np.ndarray | None = None


@torch.no_grad()
def make_experience(
    args: PPOConfig,
    *,
    scores: Tensor,
    finished: Tensor,
    cu_seqlens: np.ndarray,
    logps: Tensor,
    ref_logps: Tensor | None,
    values: Tensor | None,
    kl_coef: float,
    moments: RunningMoments | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
    counts: bool = True,
) -> Experience:
    """Scores → KL-shaped token rewards → advantages and returns, by the config.

    scores (S,), finished (S,) bool: of the completions, prompt-major, num_generations of each prompt. logps, ref_logps,
    values: (n,) float32, of their tokens. kl_coef: of the rewards, now. moments: running statistics that normalise the
    scores; they have taken them in. reduce: sums a tensor over processes, for whitening; None for one. counts: False
    for a process that only takes part: its metrics have weight 0.

    Metrics: means over completions of sums over their tokens, beside the fraction that was cut (completions/*) and the
    critic's explained variance, 1 − Var(returns − values)/Var(returns) over tokens.

    Raises ValueError for completions that are not a multiple of num_generations.
    """
    if len(scores) % args.num_generations:
        raise ValueError(f"{len(scores)} completions are not a multiple of num_generations={args.num_generations}")
    grid, raw = TokenGrid(cu_seqlens, logps.device), scores.float()
    shaped = shape_scores(
        raw, moments=moments, clip=args.score_clip, finished=finished, missing_eos_penalty=args.missing_eos_penalty
    )
    if args.overlong_buffer is not None:
        share = overlong_penalty(grid.mask.sum(1), max_length=args.response_length, buffer=args.overlong_buffer)
        shaped = shaped - args.overlong_penalty * share
    own = grid.spread(logps)
    reference = None if ref_logps is None else grid.spread(ref_logps)
    rewards, kl = token_rewards(
        shaped, own, reference, grid.mask,
        kl_coef=0.0 if reference is None else kl_coef, kl_estimator=args.kl_estimator,
    )  # fmt: skip
    metrics = {
        "objective/scores": _mean(raw),
        "objective/rlhf_reward": _mean(rewards.sum(1)),
        "objective/non_score_reward": _mean(-kl_coef * kl.sum(1)),
        "objective/entropy": _mean(-own.sum(1)),
        "completions/mean_length": _mean(grid.mask.sum(1).float()),
        "completions/clipped_ratio": _mean((~finished).float()),
    } | deviation_metrics("objective/scores_std", raw)
    if args.num_generations > 1:
        group = raw.view(-1, args.num_generations)
        metrics["frac_reward_zero_std"] = _mean((group.amax(1) == group.amin(1)).float())
    if reference is not None:  # the KL that is measured and controlled is k1, whatever estimator shapes the rewards
        metrics["objective/kl"] = _mean((own - reference).sum(1))
        metrics["objective/kl_k3"] = _mean(kl_estimate(own, reference, "k3").sum(1))
    if args.whiten_rewards:
        rewards = whiten(rewards, grid.mask, shift_mean=False, reduce=reduce)
    advantages, returns = _advantages(args, rewards, None if values is None else grid.spread(values), grid.mask)
    if args.whitens_advantages:
        advantages = whiten(advantages, grid.mask, reduce=reduce)
    flat_returns = None if returns is None else grid.gather(returns)
    if flat_returns is not None:
        assert values is not None
        metrics |= explained_variance_metrics("val/explained_variance", values, flat_returns)
    kept = _kept(args, shaped, finished)
    if kept is not None:
        metrics["completions/filtered_ratio"] = _mean((~kept).float())
    if not counts:
        metrics = {name: Metric(metric.total * 0, metric.weight * 0) for name, metric in metrics.items()}
    return Experience(
        advantages=grid.gather(advantages), returns=flat_returns, metrics=metrics,
        kept=None if kept is None else kept.cpu().numpy(),
    )  # fmt: skip


def _kept(args: PPOConfig, scores: Tensor, finished: Tensor) -> Tensor | None:
    """(S,) bool: the completions that the config's filters leave; None without one."""
    kept = _with_spread(scores, args.num_generations) if args.filter_groups else None
    if args.mask_truncated_completions:
        kept = finished if kept is None else kept & finished
    return kept


def _with_spread(scores: Tensor, num_generations: int) -> Tensor:
    """(S,) bool: whether the completions of the same prompt were scored in more than one way."""
    groups = scores.view(-1, num_generations)
    return (groups.amax(1) != groups.amin(1)).repeat_interleave(num_generations)


def _advantages(args: PPOConfig, rewards: Tensor, values: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """(advantages (S, C), returns (S, C) for a critic or None), 0 outside the mask."""
    if args.advantage_estimator == "gae":
        assert values is not None
        return gae(rewards, values, mask, gamma=args.gamma, lam=args.lam)
    if args.advantage_estimator == "reinforce":
        return discounted_returns(rewards, mask, gamma=args.gamma), None
    groups = torch.arange(len(rewards), device=rewards.device) // args.num_generations
    whole = group_advantages(
        rewards.sum(1), groups, estimator=str(args.advantage_estimator), scale=bool(args.scale_rewards)
    )
    return torch.where(mask, whole[:, None], 0.0), None


def _mean(values: Tensor) -> Metric:
    return Metric(values.sum(), torch.full_like(values.sum(), values.numel()))
