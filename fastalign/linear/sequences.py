"""What the fused losses over sequences share: counting them, summing over them, checking what belongs to each."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.ops.arguments import check_boundaries
from fastalign.ops.sequences import sums_between
from fastalign.ops.uploads import on_device


def count_sequences(hidden: Tensor, targets: Tensor, cu_seqlens: Tensor | None) -> int:
    """Sequences of a padded batch, or of a packed one. Raises ValueError where it is neither."""
    if cu_seqlens is not None:
        check_boundaries(cu_seqlens, hidden.device)
        return cu_seqlens.shape[0] - 1
    if targets.dim() != 2:
        raise ValueError(
            f"give padded hidden (S, T, H), or packed hidden (N, H) with cu_seqlens; got hidden {tuple(hidden.shape)}"
        )
    return targets.shape[0]


def check_per_sequence(name: str, values: Tensor, sequences: int) -> None:
    """Raise ValueError unless there is one of `values` per sequence, without a gradient."""
    if tuple(values.shape) != (sequences,):
        raise ValueError(f"{name} must be ({sequences},), one per sequence, got {tuple(values.shape)}")
    check_detached(name, values)


def check_detached(name: str, values: Tensor) -> None:
    if values.requires_grad:
        raise ValueError(f"{name} requires grad, but no gradient flows there: detach it")


def lengths_on(cu: Tensor, like: Tensor) -> Tensor:
    """Completion lengths (S',) on the device of `like`, from the boundaries on the host."""
    return on_device(cu.diff(), like.device)


def halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """(chosen, rejected), (P',) each, of (2P',); of an empty tensor twice that."""
    first, second = values.chunk(2) if len(values) else (values, values)
    return first, second


def sums(per_token: Tensor, cu: Tensor, reduction: str = "sum") -> Tensor:
    """`sequence_logps` between boundaries on the host, which `linear_loss` has made."""
    return sums_between(per_token, None, on_device(cu, per_token.device).to(torch.int64), reduction)


def halved_sums(per_token: Tensor, cu: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over each response, (chosen, rejected)."""
    return halves(sums(per_token, cu))
