"""Log-probs of a head whose vocabulary is spread over processes: each scores its slice, and the slices are combined.

Process s holds rows [v_s, v_s + V_s) of the weight. With the statistics of its slice alone, as `linear_logps` gives
them, and w_s = lse_s − lse, the log of the slice's share of the probability:

    lse = logsumexp_s lse_s
    logps = logps_s + w_s, s the slice of the target
    entropy = Σ_s exp(w_s)·(H_s − w_s)

One exchange of four numbers a token in the forward, one of grad_hidden in the backward; the weight's gradient is the
slice's own. Everything is summed in the order of the processes, so that all have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastalign.ops.rows import RowSpec, tile_logits
from fastalign.types import LinearLogps

_TOP1_TILE = 4096  # tokens, and entries of the vocabulary, whose logits the search for the largest holds at a time

Score = Callable[..., LinearLogps]
"""(hidden, targets=those within the slice) → what `linear_logps` gives of the slice."""


def over_slices(
    group: dist.ProcessGroup, score: Score, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *,
    spec: RowSpec, rows: Tensor | None, ignore_index: int,
) -> LinearLogps:  # fmt: skip
    """Combine the slices of all processes of `group`; see the module. Every process of it must call this.

    hidden, targets, rows: the same in every process; targets count in the whole vocabulary. weight: this process's
    slice (V_s, H), in the order of the ranks, of any sizes; bias (V_s,) or None, its part of the bias. spec: with top1
    a second pass over the slice looks for the largest logit.

    Raises ValueError, CPU tensors only, for a target that no slice has.
    """
    sizes = _gathered(torch.tensor(weight.shape[0], device=hidden.device), group)
    start = sizes[: dist.get_rank(group)].sum()
    if rows is None:
        counts = targets != ignore_index
    else:
        counts = torch.zeros_like(targets, dtype=torch.bool).view(-1)
        counts = counts.index_fill_(0, rows.to(targets.device), True).view(targets.shape)
    if targets.device.type == "cpu" and bool((bad := counts & ((targets < 0) | (targets >= sizes.sum()))).any()):
        raise ValueError(
            f"target {int(targets[bad][0])} is out of range: the slices of the vocabulary have {int(sizes.sum())} "
            f"entries together (ignored tokens are {ignore_index}, and must not be listed in rows)"
        )
    held = counts & (targets >= start) & (targets < start + weight.shape[0])
    # a token whose target is elsewhere is scored too, for its lse: with any target, of which nothing is used
    local = torch.where(counts, torch.where(held, targets - start, 0), ignore_index)
    own = score(_SumOfGradients.apply(hidden, group), targets=local)
    logps, lse, entropy, shares = _Combine.apply(own.logps, own.lse, own.entropy, held, counts, group)
    is_top1 = None
    if spec.top1:
        flat = hidden.reshape(-1, hidden.shape[-1])
        is_top1 = counts & (_first_argmax(flat, weight, bias, spec, start, group).view(targets.shape) == targets)
    log_sum_sq = mean = None
    if own.log_sum_sq_probs is not None:
        of_slices = _gathered(own.log_sum_sq_probs + 2 * shares, group)
        log_sum_sq = torch.where(counts, of_slices.logsumexp(0), 0)
    if own.mean_logits is not None:
        mean = _gathered(own.mean_logits * weight.shape[0], group).sum(0) / sizes.sum()
    return LinearLogps(logps, lse, None if own.entropy is None else entropy, is_top1, log_sum_sq, mean)


def _gathered(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(processes, *tensor.shape), in the order of the ranks."""
    out = tensor.new_empty((dist.get_world_size(group), *tensor.shape))
    dist.all_gather_into_tensor(out.view(-1), tensor.detach().contiguous().view(-1), group=group)
    return out


class _SumOfGradients(torch.autograd.Function):
    """The same tensor in every process, whose gradient is the sum of what each contributes, added up in float32."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        wide = torch.promote_types(grad.dtype, torch.float32)
        return _gathered(grad.to(wide), ctx.group).sum(0).to(grad.dtype), None


class _Combine(torch.autograd.Function):
    """(logps, lse, entropy, w of this slice) of the whole vocabulary, from those of this process's slice."""

    @staticmethod
    def forward(
        ctx: Any, logps: Tensor, lse: Tensor, entropy: Tensor | None, held: Tensor, counts: Tensor,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        own_entropy = torch.zeros_like(lse) if entropy is None else entropy
        slices = _gathered(torch.stack([lse, torch.where(held, logps, 0), held.to(lse.dtype), own_entropy]), group)
        of_lse, of_logps, of_held, of_entropy = slices.unbind(1)
        largest = of_lse.amax(0)
        log_sum = (of_lse - largest).exp().sum(0).log()
        w = of_lse - largest - log_sum
        p = w.exp()
        whole_logps = torch.where(of_held > 0, of_logps + w, 0).sum(0)
        # a slice of probability 0 has no entropy to add: 0·(H + ∞)
        whole_entropy = torch.where(p > 0, p * (of_entropy - w), 0).sum(0)
        w = w[dist.get_rank(group)]
        ctx.save_for_backward(w, own_entropy, whole_entropy, held, counts)
        ctx.has_entropy = entropy is not None
        ctx.mark_non_differentiable(w)
        ctx.set_materialize_grads(False)
        outputs = (whole_logps, largest + log_sum, whole_entropy)
        return *(torch.where(counts, values, 0) for values in outputs), w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        w, own_entropy, entropy, held, counts = ctx.saved_tensors
        p = w.exp()
        zero = torch.zeros_like(w)
        a, c, e = (zero if grad is None else torch.where(counts, grad, 0) for grad in grads[:3])
        # ∂logps/∂lse_s = [s holds the target] − p_s; of the holder without the cancellation in 1 − p_s
        to_lse = a * torch.where(held, -torch.expm1(w), -p) + c * p
        to_entropy = None
        if ctx.has_entropy:
            to_lse = to_lse + torch.where(p > 0, e * p * (own_entropy - w - entropy), 0)
            to_entropy = e * p
        return torch.where(held, a, 0), to_lse, to_entropy, None, None, None


@torch.no_grad()
def _first_argmax(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, spec: RowSpec, start: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """(n,) int64: the first index in the whole vocabulary at which the logits of a token (n, H) are largest."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    best = torch.full((len(hidden),), -torch.inf, dtype=wide, device=hidden.device)
    index = start.repeat(len(hidden))
    for first in range(0, len(hidden), _TOP1_TILE):
        h, part = hidden[first : first + _TOP1_TILE].to(wide), slice(first, first + _TOP1_TILE)
        for v0 in range(0, len(weight), _TOP1_TILE):
            slab = slice(v0, v0 + _TOP1_TILE)
            z = tile_logits(h @ weight[slab].to(wide).T, None if bias is None else bias[slab], spec)
            largest = z.amax(1)
            at = (z == largest[:, None]).int().argmax(1) + start + v0  # the first one: max() promises no order
            index[part] = torch.where(largest > best[part], at, index[part])
            best[part] = torch.maximum(largest, best[part])
    slices = _gathered(best, group)
    first_slice = (slices == slices.amax(0)).int().argmax(0)
    return _gathered(index, group).gather(0, first_slice[None])[0]
