"""Weights of tokens and of pairs: LD-DPO's tails, WPO's on-policy weights."""

from __future__ import annotations

import torch
from torch import Tensor


def tail_mask(cu_seqlens: Tensor) -> Tensor:
    """Which completion tokens lie beyond min(|y_w|, |y_l|): what `ld_alpha` weighs (LD-DPO, arXiv 2409.06411).

    cu_seqlens: (2P + 1,) int32 or int64 on the host, over the completion tokens of P chosen and then P rejected
    responses. Returns (N,) bool on the host: the tokens of a pair's longer response that have no counterpart.
    """
    lengths = cu_seqlens.diff()
    pairs = len(lengths) // 2
    shared = torch.minimum(lengths[:pairs], lengths[pairs:]).repeat(2)
    first_of_tail = torch.repeat_interleave(cu_seqlens[:-1] + shared, lengths)
    return torch.arange(len(first_of_tail)) >= first_of_tail


def wpo_weights(chosen: Tensor, rejected: Tensor) -> Tensor:
    """exp(a_w + a_l), a(y) = mean_n(logps_n − log_sum_sq_probs_n): how likely the policy is to have written the pair.

    WPO (arXiv 2406.11827 eq. 2, weights aligned by sampling). chosen, rejected: (P,), a of each response, 0 for an
    empty one. Returns (P,), detached.
    """
    return torch.exp(chosen.detach() + rejected.detach())
