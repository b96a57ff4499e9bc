"""Listwise preference losses: K responses to one prompt, ranked with or without ties, each with a score of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.losses.metrics import correlation_metrics, ratio_metrics
from fastalign.losses.reduction import check_reduction, reduce_losses
from fastalign.losses.rewards import list_bounds
from fastalign.types import LossOutput, Metric


class Lists(NamedTuple):
    """L lists side by side, padded to the K of the longest, on the scores' device."""

    members: Tensor  # (L, K) int64, positions among the C responses; any in the padding
    real: Tensor  # (L, K) bool
    worse: Tensor  # (L, K, K) bool: [l, k, i] where response i of list l is ranked strictly behind its response k
    responses: int  # C

    @classmethod
    def of(cls, ranks: Tensor, cu_lists: Tensor) -> Lists:
        """ranks (C,), cu_lists (L + 1,) on the host. ValueError as `list_bounds`."""
        bounds = list_bounds(cu_lists, len(ranks))
        sizes = bounds.diff()
        places = torch.arange(int(sizes.max()) if len(sizes) else 0)
        real = (places < sizes[:, None]).to(ranks.device, non_blocking=True)
        members = (bounds[:-1, None] + places).clamp(max=max(len(ranks) - 1, 0))
        members = members.to(ranks.device, non_blocking=True)
        ranked = ranks[members]
        worse = (ranked[:, :, None] < ranked[:, None, :]) & real[:, :, None] & real[:, None, :]
        return cls(members, real, worse, len(ranks))

    @property
    def best(self) -> Tensor:
        """(L, K) bool: no response of the list is ranked before it."""
        return self.real & ~self.worse.any(dim=1)

    @property
    def worst(self) -> Tensor:
        """(L, K) bool: no response of the list is ranked behind it."""
        return self.real & ~self.worse.any(dim=2)

    def of_responses(self, places: Tensor) -> Tensor:
        """(C,) bool: a mask (L, K), False in the padding, as one of the responses."""
        marked = torch.zeros(self.responses, device=places.device)
        return marked.index_add(0, self.members.flatten(), places.flatten().to(marked.dtype)) > 0

    def mean_of_best(self, values: Tensor) -> Tensor:
        """(L,): the mean of (C,) values over the best responses of each list, which are several if they are tied."""
        best = self.best
        return torch.where(best, values[self.members], 0).sum(dim=1) / best.sum(dim=1).clamp(min=1)


def _pro(terms: Tensor, lists: Lists) -> Tensor:
    return terms.sum(dim=1)


def _infonce(terms: Tensor, lists: Lists) -> Tensor:
    best = lists.best
    return torch.where(best, terms, 0).sum(dim=1) / best.sum(dim=1).clamp(min=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListwiseLoss:
    """How the terms of a list, one a response, become its loss."""

    fn: Callable[[Tensor, Lists], Tensor]  # (terms (L, K), lists) -> (L,)
    formula: str  # with t_k = −log [exp f_k / (exp f_k + Σ_{i worse than k} exp f_i)]
    source: str


LISTWISE_LOSSES: dict[str, ListwiseLoss] = {
    "pro": ListwiseLoss(
        fn=_pro,
        formula="Σ_k t_k",
        source="PRO, arXiv 2306.17492; without temperatures and ties Plackett and Luce's likelihood",
    ),
    "infonce": ListwiseLoss(
        fn=_infonce,
        formula="t_best",
        source="InfoNCE, arXiv 1807.03748: the best response against all others",
    ),
}
"""`loss_type` -> variant. Config choices, error messages and the test grid are made from this dict."""


def check_loss_type(loss_type: str) -> ListwiseLoss:
    """The variant called `loss_type`, or ValueError."""
    if loss_type not in LISTWISE_LOSSES:
        raise ValueError(f"loss_type={loss_type!r} is unknown: accepted are {', '.join(map(repr, LISTWISE_LOSSES))}")
    return LISTWISE_LOSSES[loss_type]


def pro_loss(
    scores: Tensor,
    ranks: Tensor,
    *,
    cu_lists: Tensor,
    rewards: Tensor | None = None,
    lengths: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> LossOutput:
    """Preference ranking optimisation (PRO, arXiv 2306.17492): every response against all that are ranked behind it.

        Σ_k −log [ exp f_k / (exp f_k + Σ_{i worse than k} exp f_i) ]        for each list

    Without ties that is the negative log-likelihood of the ranking under Plackett and Luce's model, and for two
    responses −log σ(f_1 − f_2). Tied responses are not compared: neither is in the other's denominator, and the order
    in which they stand changes nothing. With `rewards` r, PRO's temperatures: in term k the scores f_k and f_i are
    divided by

        T_k^i = 1 / (r_k − r_i),    T_k^k = min_i T_k^i    (i worse than k)

    so that a response is pushed hard from those that are far worse, and gently from those that are nearly as good.

    Args:
        scores: (C,) float, f of all responses, list after list: PRO takes the mean log-prob of the policy, a
            Plackett–Luce DPO β·(logps − ref_logps). 16-bit scores are computed in float32; float64 stays float64.
        ranks: (C,) integer or float, 1 is best; equal ranks are ties.
        cu_lists: (L+1,) int on the host, where each list starts: 0 … C. Lists may differ in length.
        rewards: (C,) float, how good each response is; must not contradict the ranks. 1/T is what is computed with, and
            is at least 0: responses of equal reward and different rank divide nothing by zero and add a constant.
        lengths: (C,), the numbers of completion tokens, for the length metrics alone.
        reduction: "mean" (over lists), "sum" or "none". num_items: denominator of "mean", the lists of the whole step.
    Returns:
        LossOutput. A list without a strict comparison has loss 0. Metrics: `accuracy` and `margin` (share of strict
        comparisons in which the better response has the higher score, and mean difference f_better − f_worse; through
        `summarize` with `accuracy_se` and `margin_se`, standard errors over lists), `top1_accuracy` (share of lists
        whose highest score is a best response's; equal scores are no win in either), `scores/best` and
        `scores/worst` (means over the best and the worst ranked responses); with lengths `length/best`, `length/worst`
        and, through `summarize`, `length/margin_correlation` (Pearson, of the margin with the difference in length,
        over strict comparisons). All add up over micro-batches and processes.
    Raises:
        ValueError: shapes, devices or dtypes that do not fit, cu_lists that do not rise from 0 to C, an unknown
            reduction.
    """
    return _listwise_loss("pro", scores, ranks, cu_lists, rewards, lengths, reduction, num_items)


def infonce_loss(
    scores: Tensor,
    ranks: Tensor,
    *,
    cu_lists: Tensor,
    rewards: Tensor | None = None,
    lengths: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> LossOutput:
    """The best response of a list against all others, whose order among themselves does not matter.

        −log [ exp f_1 / Σ_i exp f_i ]        for each list

    Where several are best, the mean over them of each against those ranked behind it. Arguments, metrics and errors are
    those of `pro_loss`, temperatures included.
    """
    return _listwise_loss("infonce", scores, ranks, cu_lists, rewards, lengths, reduction, num_items)


def _listwise_loss(
    loss_type: str, scores: Tensor, ranks: Tensor, cu_lists: Tensor, rewards: Tensor | None, lengths: Tensor | None,
    reduction: str, num_items: int | Tensor | None,
) -> LossOutput:  # fmt: skip
    check_reduction(reduction, num_items)
    losses = list_losses(scores, ranks, cu_lists=cu_lists, rewards=rewards, loss_type=loss_type)
    metrics = list_metrics(scores, ranks, cu_lists=cu_lists, lengths=lengths)
    return LossOutput(reduce_losses(losses, reduction, num_items), metrics)


def list_losses(
    scores: Tensor, ranks: Tensor, *, cu_lists: Tensor, rewards: Tensor | None = None, loss_type: str = "pro"
) -> Tensor:
    """The losses of `pro_loss` or `infonce_loss`, (L,), without metrics: each list by itself."""
    variant = check_loss_type(loss_type)
    scores = _checked(scores, {"ranks": ranks, "rewards": rewards})
    lists = Lists.of(ranks, cu_lists)
    f = scores[lists.members]
    own, others = f[:, :, None], f[:, None, :]
    if rewards is not None:
        r = rewards.to(scores.dtype)[lists.members]
        inverse = torch.where(lists.worse, (r[:, :, None] - r[:, None, :]).clamp(min=0), 0)  # 1 / T_k^i
        own, others = own * _largest(inverse)[:, :, None], others * inverse
    compared = lists.worse.any(dim=2)
    # log Σ_i exp(f_i − f_k): rows that compare nothing are left finite, because a softmax of −∞ alone has no gradient
    exponents = torch.where(lists.worse, others - own, -torch.inf)
    against = torch.where(compared[:, :, None], exponents, 0).logsumexp(dim=2)
    return variant.fn(torch.where(compared, -F.logsigmoid(-against), 0), lists)


@torch.no_grad()
def list_metrics(
    scores: Tensor, ranks: Tensor, *, cu_lists: Tensor, lengths: Tensor | None = None
) -> dict[str, Metric]:
    """The metrics of `pro_loss`, detached; arguments as there."""
    scores = _checked(scores, {"ranks": ranks, "lengths": lengths})
    lists = Lists.of(ranks, cu_lists)
    f, strict = scores[lists.members], lists.worse.to(scores.dtype)
    margins = f[:, :, None] - f[:, None, :]
    comparable = lists.worse.flatten(1).any(dim=1)
    best, worst = lists.best & comparable[:, None], lists.worst & comparable[:, None]
    highest = _largest(f.masked_fill(~best, -torch.inf))
    rest = _largest(f.masked_fill(~lists.real | best, -torch.inf))
    metrics = {
        **ratio_metrics("accuracy", ((margins > 0) * strict).sum(dim=(1, 2)), strict.sum(dim=(1, 2))),
        **ratio_metrics("margin", (margins * strict).sum(dim=(1, 2)), strict.sum(dim=(1, 2))),
        "top1_accuracy": Metric(((highest > rest) & comparable).sum().to(f.dtype), comparable.sum().to(f.dtype)),
        "scores/best": _mean_where(f, best),
        "scores/worst": _mean_where(f, worst),
    }
    if lengths is not None:
        n = lengths.to(scores.dtype)[lists.members]
        metrics |= {"length/best": _mean_where(n, best), "length/worst": _mean_where(n, worst)}
        differences = n[:, :, None] - n[:, None, :]
        metrics |= correlation_metrics("length/margin_correlation", margins, differences, lists.worse)
    return metrics


def _largest(values: Tensor) -> Tensor:
    """Maximum over the last dimension; 0 where that is empty."""
    return values.amax(dim=-1) if values.shape[-1] else values.sum(dim=-1)


def _mean_where(values: Tensor, mask: Tensor) -> Metric:
    return Metric(torch.where(mask, values, 0).sum(), mask.sum().to(values.dtype))


def _checked(scores: Tensor, others: dict[str, Tensor | None]) -> Tensor:
    """The scores in float32 at least, once everything has their shape and device."""
    if not scores.is_floating_point():
        raise ValueError(f"scores: dtype {scores.dtype}, accepted are floating-point scores")
    if scores.dim() != 1:
        raise ValueError(f"scores: shape {tuple(scores.shape)}, accepted is (C,), one score per response")
    for name, values in others.items():
        if values is not None and values.requires_grad:
            raise ValueError(f"{name} requires grad, but no gradient flows there: detach it")
        if values is not None and values.is_complex():
            raise ValueError(f"{name}: dtype {values.dtype}, accepted are real numbers")
        if values is not None and (values.shape != scores.shape or values.device != scores.device):
            raise ValueError(
                f"{name}: shape {tuple(values.shape)} on {values.device}, accepted is that of scores, "
                f"{tuple(scores.shape)} on {scores.device}"
            )
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
