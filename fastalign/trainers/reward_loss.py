"""Loss and metrics of a reward model's batch: pairs, lists or labelled responses, whichever the batch holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastalign.losses import (
    bradley_terry_loss,
    correlation_metrics,
    label_loss,
    mean_metric,
    ranking_loss,
    reduce_losses,
)
from fastalign.losses.rewards import list_pairs
from fastalign.trainers.batches import Batch, num_examples, sequence_groups
from fastalign.trainers.meters import Meter
from fastalign.types import LossOutput, Metric

_HIDDEN = "_se/"  # sums that only standard errors are made of


class Comparisons(NamedTuple):
    """n comparisons whose outcome is known: better minus worse reward, 1 where it counts, and its example."""

    difference: Tensor  # (n,)
    weight: Tensor  # (n,)
    example: Tensor  # (n,) int64


def reward_loss(
    rewards: Tensor,
    batch: Batch,
    *,
    center_rewards_coefficient: float = 0.0,
    label_type: str = "scalar",
    num_items: int | Tensor | None = None,
) -> LossOutput:
    """Bradley–Terry for pairs, minus their margin; the ranking loss for lists; `label_loss` for labels.

    rewards (S,) float32, one per sequence of a `RewardCollator`'s batch. loss: the sum over examples divided by
    num_items (None: by the batch's examples). Metrics: those of the loss in fastalign.losses, `min_reward` and
    `max_reward` (see `RewardMeter`), `length/reward_correlation` with completion lengths, for pairs also
    `length/margin_correlation`, `length/chosen` and `length/rejected`.
    """
    lengths = batch["completion_lengths"].to(rewards.device)
    comparisons: Comparisons | None
    if "ranks" in batch:
        output, comparisons, extra = _lists(rewards, batch)
    elif "labels" in batch:
        output, comparisons, extra = _labels(rewards, batch, label_type)
    else:
        output, comparisons, extra = _pairs(rewards, batch, lengths, center_rewards_coefficient)
    detached = rewards.detach()
    one = detached.new_ones(())
    metrics = output.metrics | extra | correlation_metrics("length/reward_correlation", detached, lengths)
    metrics |= {"min_reward": Metric(detached.min(), one), "max_reward": Metric(detached.max(), one)}
    metrics |= _spread(output.loss.detach(), comparisons)
    return LossOutput(reduce_losses(output.loss, "mean", num_items), metrics)


Parts = tuple[LossOutput, Comparisons | None, dict[str, Metric]]


def _pairs(rewards: Tensor, batch: Batch, lengths: Tensor, coefficient: float) -> Parts:
    chosen, rejected = rewards.chunk(2)
    output = bradley_terry_loss(
        chosen, rejected, margin=batch.get("margin"), center_rewards_coefficient=coefficient, reduction="none"
    )
    difference = (chosen - rejected).detach()
    longer, shorter = lengths.chunk(2)
    extra = {"length/chosen": mean_metric(longer), "length/rejected": mean_metric(shorter)}
    extra |= correlation_metrics("length/margin_correlation", difference, longer - shorter)
    example = torch.arange(len(difference), device=rewards.device)
    return output, Comparisons(difference, torch.ones_like(difference), example), extra


def _lists(rewards: Tensor, batch: Batch) -> Parts:
    groups, ranks = sequence_groups(batch), batch["ranks"]
    sizes = np.bincount(groups, minlength=num_examples(batch))
    cu_lists = torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]))
    output = ranking_loss(rewards, ranks, cu_lists=cu_lists, reduction="none")
    indices = list_pairs(cu_lists, len(rewards))
    first, second, lists = (index.to(rewards.device, non_blocking=True) for index in indices)
    difference = (rewards[first] - rewards[second]).detach()
    return output, Comparisons(difference, (ranks[first] < ranks[second]).to(difference.dtype), lists), {}


def _labels(rewards: Tensor, batch: Batch, label_type: str) -> Parts:
    labels = batch["labels"]
    output = label_loss(rewards, labels, label_type=label_type, reduction="none")
    if label_type != "binary":
        return output, None, {}
    difference = rewards.detach() * (2 * labels - 1)
    example = torch.arange(len(difference), device=rewards.device)
    return output, Comparisons(difference, torch.ones_like(difference), example), {}


@torch.no_grad()
def _spread(losses: Tensor, comparisons: Comparisons | None) -> dict[str, Metric]:
    """Second moments over examples: n comparisons, their wins r and their margins m of each; see `spread_errors`."""
    spread = {f"{_HIDDEN}l": mean_metric(losses), f"{_HIDDEN}ll": mean_metric(losses.square())}
    if comparisons is None:
        return spread
    difference, weight, example = comparisons
    zeros = torch.zeros_like(losses, dtype=difference.dtype)
    n = zeros.index_add(0, example, weight)
    r = zeros.index_add(0, example, weight * (difference > 0))
    m = zeros.index_add(0, example, weight * difference)
    products = {"n": n, "nn": n * n, "r": r, "rr": r * r, "rn": r * n, "m": m, "mm": m * m, "mn": m * n}
    return spread | {f"{_HIDDEN}{name}": mean_metric(value) for name, value in products.items()}


def spread_errors(sums: Mapping[str, Metric]) -> dict[str, float]:
    """Standard errors of loss, accuracy and margin over examples, from the sums of `reward_loss`'s metrics.

    Comparisons of one list share responses, so examples are the units that are independent, and accuracy is a ratio of
    sums over them, Σr/Σn: its standard error is √(Σ(r − A·n)² · G/(G − 1)) / Σn over G examples (Cochran 1977 eq.
    6.13), which for pairs is √(A(1 − A)/(G − 1)).
    """
    moments = {name.removeprefix(_HIDDEN): metric for name, metric in sums.items() if name.startswith(_HIDDEN)}
    if not moments or moments["l"].weight <= 1:
        return {}
    count = float(moments["l"].weight)
    mean = {name: float(metric.value) for name, metric in moments.items()}
    errors = {"loss_se": (max(mean["ll"] - mean["l"] ** 2, 0.0) / (count - 1)) ** 0.5}
    if mean.get("n"):
        for name, x in (("accuracy", "r"), ("margin", "m")):
            ratio = mean[x] / mean["n"]
            variance = mean[x + x] - 2 * ratio * mean[f"{x}n"] + ratio**2 * mean["nn"]
            errors[f"{name}_se"] = (max(variance, 0.0) / (count - 1)) ** 0.5 / mean["n"]
    return errors


class RewardMeter(Meter):
    """A Meter that also knows extremes: `min_reward` and `max_reward` are those of all responses since the last log.

    (TRL's are means over batches of each batch's extreme, which change with the batch size.) gather: a tensor (k,) to
    the tensors of all processes, (processes·k,). errors: also give standard errors. Calibration buckets that nothing
    fell into are left out.
    """

    def __init__(self, gather: Callable[[Tensor], Tensor], *, errors: bool = False) -> None:
        super().__init__()
        self._gather, self._errors = gather, errors
        self._extremes: Tensor | None = None  # (2,): minimum, and minimum of the negative

    def update(self, metrics: Mapping[str, Metric]) -> None:
        low, high = metrics["min_reward"], metrics["max_reward"]
        extremes = torch.where(low.weight > 0, torch.stack([low.total, -high.total]), torch.inf)
        self._extremes = extremes if self._extremes is None else torch.minimum(self._extremes, extremes)
        super().update({name: value for name, value in metrics.items() if name not in ("min_reward", "max_reward")})

    def values(self, reduce: Callable[[Tensor], Tensor] | None = None) -> tuple[dict[str, float], dict[str, Metric]]:
        values, sums = super().values(reduce)
        values = {name: v for name, v in values.items() if not name.startswith(_HIDDEN) and v == v}  # v == v: not nan
        if self._extremes is not None:
            extremes = self._extremes if reduce is None else self._gather(self._extremes)
            low, high = extremes.view(-1, 2).amin(0).tolist()
            values |= {"min_reward": low, "max_reward": -high}
        return values | (spread_errors(sums) if self._errors else {}), sums

    def clear(self) -> None:
        super().clear()
        self._extremes = None
