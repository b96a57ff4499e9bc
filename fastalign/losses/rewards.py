"""Losses of reward models: pairs compared, lists ranked, responses labelled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.losses.metrics import correlation_metrics, mean_metric
from fastalign.losses.reduction import check_reduction, reduce_losses
from fastalign.losses.sequences import host_bounds
from fastalign.types import LossOutput, Metric

MARGIN_BUCKETS = (0.5, 1.0, 2.0, 4.0)
"""Edges of the calibration buckets: |difference of rewards| in [0, ½), [½, 1), [1, 2), [2, 4), [4, ∞)."""


def bradley_terry_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margin: Tensor | None = None,
    center_rewards_coefficient: float = 0.0,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> LossOutput:
    """Reward modelling on pairs: p(chosen ≻ rejected) = σ(r_w − r_l), Bradley and Terry 1952.

        −log σ(r_w − r_l − margin) + c·(r_w + r_l)²

    Args:
        chosen_rewards, rejected_rewards: (P,) float, the scores of both responses to a prompt. 16-bit scores are
            computed in float32; float64 stays float64.
        margin: (P,), how much better the chosen response is (Llama 2, arXiv 2307.09288 eq. 2); None is 0.
        center_rewards_coefficient: c ≥ 0, keeps rewards centred at 0 (arXiv 2312.09244); TRL advises 0.01.
        reduction: "mean" (over pairs), "sum" or "none". num_items: denominator of "mean", the pairs of the whole step.
    Returns:
        LossOutput with `accuracy` (a tie is not a win), `margin` (mean of r_w − r_l), `mean_reward`, and for each
        bucket of |r_w − r_l| (edges `MARGIN_BUCKETS`) the accuracy and the mean probability that the model gives its
        preference, `calibration/{i}/accuracy` and `calibration/{i}/confidence`: equal where it is calibrated.
    Raises:
        ValueError: shapes, devices or dtypes that differ, c < 0, an unknown reduction.
    """
    check_reduction(reduction, num_items)
    if not 0 <= center_rewards_coefficient < float("inf"):
        raise ValueError(f"center_rewards_coefficient={center_rewards_coefficient}: it must be at least 0 and finite")
    chosen, rejected = _floats("chosen_rewards", chosen_rewards), _floats("rejected_rewards", rejected_rewards)
    if chosen.dim() != 1:
        raise ValueError(f"chosen_rewards: shape {tuple(chosen.shape)}, accepted is (P,), one score per response")
    given = {"rejected_rewards": rejected} | ({} if margin is None else {"margin": margin})
    for name, values in given.items():
        if values.shape != chosen.shape or values.device != chosen.device or values.is_complex():
            raise ValueError(
                f"{name}: shape {tuple(values.shape)} of {values.dtype} on {values.device}, accepted is that of "
                f"chosen_rewards, {tuple(chosen.shape)} on {chosen.device}"
            )
    difference = chosen - rejected
    losses = -F.logsigmoid(difference if margin is None else difference - margin.to(difference.dtype))
    if center_rewards_coefficient:
        losses = losses + center_rewards_coefficient * (chosen + rejected).square()
    metrics = comparison_metrics(difference.detach()) | {"mean_reward": mean_metric(torch.cat([chosen, rejected]))}
    return LossOutput(reduce_losses(losses, reduction, num_items), metrics)


@torch.no_grad()
def comparison_metrics(difference: Tensor, weight: Tensor | None = None) -> dict[str, Metric]:
    """`accuracy`, `margin` and calibration of comparisons whose outcome is known: (n,) better minus worse reward.

    weight: (n,) 1 where the comparison counts; None counts all.
    """
    weight = torch.ones_like(difference) if weight is None else weight.to(difference.dtype)
    right = (difference > 0).to(difference.dtype)
    size = difference.abs()
    confidence = torch.sigmoid(size)
    metrics = {
        "accuracy": Metric((right * weight).sum(), weight.sum()),
        "margin": Metric((difference * weight).sum(), weight.sum()),
    }
    bucket = torch.bucketize(size, size.new_tensor(MARGIN_BUCKETS), right=True)
    for i in range(len(MARGIN_BUCKETS) + 1):
        inside = weight * (bucket == i)
        metrics[f"calibration/{i}/accuracy"] = Metric((right * inside).sum(), inside.sum())
        metrics[f"calibration/{i}/confidence"] = Metric((confidence * inside).sum(), inside.sum())
    return metrics


def ranking_loss(
    rewards: Tensor, ranks: Tensor, *, cu_lists: Tensor, reduction: str = "mean", num_items: int | Tensor | None = None
) -> LossOutput:
    """K-wise reward modelling (InstructGPT, arXiv 2203.02155 eq. 1): all comparisons of a prompt in one batch element.

        −(1/#{(i, j): i ≻ j}) · Σ_{i ≻ j} log σ(r_i − r_j)        for each list

    Args:
        rewards: (C,) float, scores of all responses, list after list; each response is scored once.
        ranks: (C,) integer or float, 1 is best; equal ranks are ties and are not compared.
        cu_lists: (L+1,) int on the host, where each list starts: 0 … C.
        reduction: "mean" (over lists), "sum" or "none". num_items: denominator of "mean", the lists of the whole step.
    Returns:
        LossOutput with `accuracy`, `margin` and calibration over all strict comparisons, and `mean_reward`. A list
        without a strict comparison has loss 0.
    Raises:
        ValueError: shapes that differ, cu_lists that do not rise from 0 to C, an unknown reduction.
    """
    check_reduction(reduction, num_items)
    rewards = _floats("rewards", rewards)
    if rewards.dim() != 1:
        raise ValueError(f"rewards: shape {tuple(rewards.shape)}, accepted is (C,), one score per response")
    if ranks.shape != rewards.shape or ranks.device != rewards.device or ranks.is_complex():
        raise ValueError(
            f"ranks: shape {tuple(ranks.shape)} of {ranks.dtype} on {ranks.device}, accepted is that of rewards, "
            f"{tuple(rewards.shape)} on {rewards.device}"
        )
    first, second, lists = list_pairs(cu_lists, len(rewards))
    first, second, lists = (index.to(rewards.device, non_blocking=True) for index in (first, second, lists))
    strict = (ranks[first] < ranks[second]).to(rewards.dtype)
    difference = rewards[first] - rewards[second]
    zeros = rewards.new_zeros(len(cu_lists) - 1)
    totals = zeros.index_add(0, lists, -F.logsigmoid(difference) * strict)
    losses = totals / zeros.index_add(0, lists, strict).clamp(min=1)
    metrics = comparison_metrics(difference.detach(), strict) | {"mean_reward": mean_metric(rewards)}
    return LossOutput(reduce_losses(losses, reduction, num_items), metrics)


def label_loss(
    rewards: Tensor,
    labels: Tensor,
    *,
    label_type: str = "scalar",
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> LossOutput:
    """Reward modelling on labels: what each response's reward should be, or whether the response is good.

        scalar    (r − label)²
        binary    −label·log σ(r) − (1 − label)·log σ(−r)

    Args:
        rewards: (S,) float, the scores of S responses.
        labels: (S,) numbers or bool; with "binary" 1 is good and 0 is not.
        label_type: one of LABEL_LOSSES. reduction: "mean" (over responses), "sum" or "none". num_items: denominator of
            "mean", the responses of the whole step.
    Returns:
        LossOutput with `mean_reward`; scalar: `mean_label` and what `summarize` turns into `label_correlation`; binary:
        `accuracy` of the sign of the reward, `margin` (mean of r for good responses and −r for others) and calibration,
        as in `bradley_terry_loss` with a response of reward 0 on the other side.
    Raises:
        ValueError: shapes or devices that differ, an unknown label_type or reduction.
    """
    check_reduction(reduction, num_items)
    if label_type not in LABEL_LOSSES:
        raise ValueError(f"label_type={label_type!r}: accepted are {', '.join(map(repr, LABEL_LOSSES))}")
    rewards = _floats("rewards", rewards)
    fits = labels.shape == rewards.shape and labels.device == rewards.device and not labels.is_complex()
    if rewards.dim() != 1 or not fits:
        raise ValueError(
            f"rewards: shape {tuple(rewards.shape)} on {rewards.device}, labels: {tuple(labels.shape)} of "
            f"{labels.dtype} on {labels.device}; accepted are two of one shape (S,) on one device"
        )
    labels = labels.to(rewards.dtype)
    losses = LABEL_LOSSES[label_type](rewards, labels)
    metrics = {"mean_reward": mean_metric(rewards)}
    if label_type == "binary":
        metrics |= comparison_metrics(rewards.detach() * (2 * labels - 1))
    else:
        metrics |= {"mean_label": mean_metric(labels)} | correlation_metrics("label_correlation", rewards, labels)
    return LossOutput(reduce_losses(losses, reduction, num_items), metrics)


def _squared_error(rewards: Tensor, labels: Tensor) -> Tensor:
    return (rewards - labels).square()


def _cross_entropy(rewards: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(rewards, labels, reduction="none")


LABEL_LOSSES = {"scalar": _squared_error, "binary": _cross_entropy}


def list_pairs(cu_lists: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ordered pairs of different members of each list: (first, second, list), int64 on the host."""
    bounds = list_bounds(cu_lists, count)
    sizes = bounds.diff()
    lists = torch.arange(len(sizes)).repeat_interleave(sizes * sizes)
    within = torch.arange(len(lists)) - (torch.cumsum(sizes * sizes, 0) - sizes * sizes)[lists]
    first = bounds[lists] + torch.div(within, sizes[lists], rounding_mode="floor")
    second = bounds[lists] + within % sizes[lists]
    different = first != second
    return first[different], second[different], lists[different]


def list_bounds(cu_lists: Tensor, count: int) -> Tensor:
    """cu_lists (L + 1,) as int64, once it is known to be on the host and to rise from 0 to `count`, or ValueError."""
    return host_bounds(cu_lists, count, "cu_lists", "responses")


def _floats(name: str, values: Tensor) -> Tensor:
    if not values.is_floating_point():
        raise ValueError(f"{name}: dtype {values.dtype}, accepted are floating-point scores")
    return values.to(torch.promote_types(values.dtype, torch.float32))
