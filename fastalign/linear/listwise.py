"""Listwise preference losses from hidden states, streamed list by list."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastalign.linear.metrics import accuracy_and_entropy
from fastalign.linear.sequences import count_sequences, lengths_on, sums
from fastalign.losses import check_reduction, list_losses, list_metrics, mean_metric
from fastalign.losses.listwise import Lists, check_loss_type
from fastalign.losses.rewards import list_bounds
from fastalign.ops import linear_loss
from fastalign.types import IGNORE_INDEX, LinearLogps, LossOutput, Metric

DEFAULT_BETA = 0.1
"""β of scores that are measured from a reference."""


def linear_pro_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ranks: Tensor, cu_lists: Tensor,
    cu_seqlens: Tensor | None = None, rewards: Tensor | None = None, ref_logps: Tensor | None = None,
    beta: float | None = None, length_normalize: bool | None = None, loss_type: str = "pro",
    sft_coef: float | str = 0.0, reduction: str = "mean", num_items: int | Tensor | None = None,
    rows: Tensor | None = None, bias: Tensor | None = None, temperature: float = 1.0, logit_scale: float = 1.0,
    softcap: float | None = None, ignore_index: int = IGNORE_INDEX, token_metrics: bool = False, backend: str = "auto",
    schedule: str = "auto", workspace_mb: float | None = None,
    accumulate_into: Tensor | None = None,
) -> LossOutput:  # fmt: skip
    """PRO and its listwise relatives from hidden states, streamed list by list: three GEMMs, no logits.

        loss of a list = L(f, ranks, rewards) + sft_coef · NLL(y_1),      f_k = logps(y_k) / |y_k|,  or with a reference
                                                                          f_k = β·(logps(y_k) − ref_logps_k)

    Equal to `losses.pro_loss` (or `infonce_loss`) of those scores, in loss, gradients and metrics. A list is the unit
    that is streamed; one too large for the workspace runs deferred inside itself.

    Args:
        hidden: padded (S, T, H), or packed (N, H) with cu_seqlens (S + 1,) on the host: one sequence a response, list
            after list.
        weight: (V, H) the head. bias: (V,) or None.
        targets: (S, T) or (N,) int64, aligned with hidden; `ignore_index` on prompt and padding, whose rows cost
            nothing.
        ranks: (S,), 1 is best, equal ranks are ties. cu_lists: (L + 1,) int on the host, where each list starts among
            the sequences; no list is empty. rewards: (S,) or None, for PRO's temperatures. As in `losses.pro_loss`.
        ref_logps: (S,), the reference's log-prob of each response, summed, in nats; None scores without a reference.
        beta: what the scores are multiplied by; None: 1 without a reference, as in the paper, and 0.1 with one.
        length_normalize: divide each log-prob (or log-ratio) by |y|, its number of scored tokens; None: without a
            reference only.
        loss_type: one of `losses.LISTWISE_LOSSES`.
        sft_coef: weight of the mean negative log-prob per token of the best response (the mean of it over several that
            are tied); "auto" is the paper's 0.05·(K − 1)² in a list of K.
        reduction: "mean" (over lists), "sum", or "none": (L,), which scores everything first. num_items: denominator
            of "mean", the lists of the whole step.
        token_metrics: also `entropy` (nats, mean over completion tokens) and `mean_token_accuracy` (of the best
            responses).
        rows, temperature, logit_scale, softcap, backend, schedule, workspace_mb, accumulate_into: as in `linear_logps`.
    Returns:
        LossOutput with the metrics of `losses.pro_loss`, `nll_loss` (NLL(y_1), mean over lists), `logps/best` and
        `logps/worst` (sums, means over the best and the worst ranked responses).
    Raises:
        ValueError: as those two, and for values that are out of range, an empty list, or anything that is not one per
            sequence.
    """
    check_reduction(reduction, num_items)
    check_list_options(loss_type=loss_type, beta=beta, sft_coef=sft_coef)
    bounds = _checked_bounds(hidden, targets, cu_seqlens, cu_lists)
    sizes = bounds.diff()
    lists = torch.arange(len(sizes)).repeat_interleave(sizes)
    given = {"ranks": ranks} | {
        name: tensor for name, tensor in (("rewards", rewards), ("ref_logps", ref_logps)) if tensor is not None
    }
    for name, tensor in given.items():
        if tuple(tensor.shape) != (len(lists),) or tensor.device != hidden.device:
            raise ValueError(
                f"{name} must be ({len(lists)},) on {hidden.device}, one per sequence, got {tuple(tensor.shape)} on "
                f"{tensor.device}"
            )
        if tensor.requires_grad:
            raise ValueError(f"{name} requires grad, but no gradient flows there: detach it")
    relative = ref_logps is not None
    scoring = _Scoring(
        (DEFAULT_BETA if relative else 1.0) if beta is None else beta,
        not relative if length_normalize is None else length_normalize,
    )

    def losses(scored: LinearLogps, cu: Tensor, lists: Tensor, ranks: Tensor, **given: Tensor) -> Tensor:
        cu_lists = _bounds_of(lists)
        scores, logps, lengths = scoring(scored, cu, given.get("ref_logps"))
        found = list_losses(scores, ranks, cu_lists=cu_lists, rewards=given.get("rewards"), loss_type=loss_type)
        if sft_coef == 0:
            return found
        return found + _sft_weights(sft_coef, cu_lists, found) * _nll_of_best(logps, lengths, ranks, cu_lists)

    def metrics(scored: LinearLogps, cu: Tensor, lists: Tensor, ranks: Tensor, **given: Tensor) -> dict[str, Metric]:
        cu_lists = _bounds_of(lists)
        scores, logps, lengths = scoring(scored, cu, given.get("ref_logps"))
        found = list_metrics(scores, ranks, cu_lists=cu_lists, lengths=lengths)
        found["nll_loss"] = mean_metric(_nll_of_best(logps, lengths, ranks, cu_lists))
        summed = list_metrics(logps, ranks, cu_lists=cu_lists)
        found |= {f"logps/{name}": summed[f"scores/{name}"] for name in ("best", "worst")}
        return found | (_token_metrics(scored, lengths, ranks, cu_lists) if token_metrics else {})

    denominator: float | Tensor = 1.0
    if reduction == "mean":
        denominator = max(len(sizes), 1) if num_items is None else num_items
    return linear_loss(
        losses, hidden, weight, targets, cu_seqlens=cu_seqlens, groups=lists, inputs={"lists": lists, **given},
        denominator=denominator, metrics_fn=metrics, entropy=token_metrics, entropy_grad=False, top1=token_metrics,
        reduce=reduction != "none", rows=rows, bias=bias, temperature=temperature, logit_scale=logit_scale,
        softcap=softcap, ignore_index=ignore_index, backend=backend, schedule=schedule, workspace_mb=workspace_mb,
        accumulate_into=accumulate_into,
    )  # fmt: skip


def check_list_options(
    *, loss_type: str = "pro", beta: float | None = None, sft_coef: float | str = 0.0
) -> None:  # fmt: skip
    """ValueError naming the option of `linear_pro_loss` that cannot be honoured."""
    check_loss_type(loss_type)
    if beta is not None and not 0 < beta < math.inf:
        raise ValueError(f"beta={beta}: it must be positive and finite")
    if sft_coef != "auto" and (isinstance(sft_coef, str) or not 0 <= sft_coef < math.inf):
        raise ValueError(f"sft_coef={sft_coef!r}: accepted are 'auto' and numbers from 0 on")


class _Scoring:
    """From log-probs of tokens to (scores, summed log-probs, lengths), (S',) each."""

    def __init__(self, beta: float, length_normalize: bool) -> None:
        self._beta, self._normalize = beta, length_normalize

    def __call__(self, scored: LinearLogps, cu: Tensor, ref_logps: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        logps = sums(scored.logps, cu)
        lengths = lengths_on(cu, logps)
        ratios = logps if ref_logps is None else logps - ref_logps.to(logps.dtype)
        scores = ratios / lengths.clamp(min=1) if self._normalize else ratios
        return self._beta * scores, logps, lengths


def _checked_bounds(hidden: Tensor, targets: Tensor, cu_seqlens: Tensor | None, cu_lists: Tensor) -> Tensor:
    """cu_lists as int64, once they are known to cut the sequences into lists that are not empty."""
    bounds = list_bounds(cu_lists, count_sequences(hidden, targets, cu_seqlens))
    if (bounds.diff() == 0).any():
        raise ValueError(f"list {int((bounds.diff() == 0).int().argmax())} of cu_lists is empty")
    return bounds


def _bounds_of(lists: Tensor) -> Tensor:
    """cu_lists of the sequences of a chunk, from the list of each, ascending, on the host."""
    sizes = torch.unique_consecutive(lists, return_counts=True)[1]
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


def _nll_of_best(logps: Tensor, lengths: Tensor, ranks: Tensor, cu_lists: Tensor) -> Tensor:
    """(L',): −logps/|y| of the best response of each list, the mean over several that are tied."""
    return Lists.of(ranks, cu_lists).mean_of_best(-logps / lengths.clamp(min=1))


def _sft_weights(sft_coef: float | str, cu_lists: Tensor, like: Tensor) -> float | Tensor:
    if not isinstance(sft_coef, str):
        return sft_coef
    weights = 0.05 * (cu_lists.diff() - 1).to(torch.float64).square()
    return weights.to(device=like.device, dtype=like.dtype, non_blocking=True)


def _token_metrics(scored: LinearLogps, lengths: Tensor, ranks: Tensor, cu_lists: Tensor) -> dict[str, Metric]:
    assert scored.is_top1 is not None
    lists = Lists.of(ranks, cu_lists)
    best = lists.of_responses(lists.best).repeat_interleave(lengths, output_size=len(scored.logps))
    right = (scored.is_top1 & best).sum().to(scored.logps.dtype)
    accuracy = Metric(right, best.sum().to(scored.logps.dtype))
    return accuracy_and_entropy(scored) | {"mean_token_accuracy": accuracy}
