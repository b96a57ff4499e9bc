"""Sums and means of per-token values over sequences, padded or packed."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_logps(
    per_token_logps: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, reduction: str = "sum"
) -> Tensor:
    """Per-sequence log-probs, differentiable, summed in float64 in a fixed order.

        logps(y) = Σ_{n ∈ y} logps_n          reduction="mean": divided by |y|, the number of tokens summed

    Args:
        per_token_logps: padded (B, T), or packed (N,) with cu_seqlens. float32.
        mask: bool, per_token_logps' shape, True = completion token. None counts every token. Values under the mask, NaN
            included, do not leak.
        cu_seqlens: (B + 1,) int32 or int64, from 0 to N: sequence b is tokens cu_seqlens[b]:cu_seqlens[b+1].
        reduction: "sum" or "mean"; the mean of an empty sequence is 0.
    Returns:
        (B,) in per_token_logps' dtype.
    Raises:
        ValueError: shapes that do not fit, an unknown reduction.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    if mask is not None:
        if mask.shape != per_token_logps.shape:
            raise ValueError(
                f"mask must be {tuple(per_token_logps.shape)} like per_token_logps, got {tuple(mask.shape)}"
            )
        per_token_logps = torch.where(mask.bool(), per_token_logps, 0.0)
    if cu_seqlens is None:
        if per_token_logps.dim() != 2:
            raise ValueError(
                f"per_token_logps must be (B, T), or (N,) with cu_seqlens; got shape {tuple(per_token_logps.shape)}"
            )
        sums = per_token_logps.sum(dim=1, dtype=torch.float64).to(per_token_logps.dtype)
        counts = per_token_logps.new_full((1,), per_token_logps.shape[1]) if mask is None else mask.sum(dim=1)
    else:
        if per_token_logps.dim() != 1:
            raise ValueError(f"per_token_logps must be (N,) with cu_seqlens, got shape {tuple(per_token_logps.shape)}")
        offsets = cu_seqlens.to(device=per_token_logps.device, dtype=torch.int64, non_blocking=True)
        sums = segment_sum(per_token_logps, offsets)
        counts = offsets.diff() if mask is None else segment_sum(mask.to(per_token_logps.dtype), offsets)
    return sums if reduction == "sum" else sums / counts.clamp(min=1)


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Σ of values (N,) between consecutive offsets (B + 1,) int64 on the same device; 0 for an empty segment.

    Summed in float64, which costs nothing on a vector: a margin is the small difference of two large sums.
    """
    sums = torch.segment_reduce(values.double(), "sum", offsets=offsets, axis=0, initial=0.0, unsafe=True)
    return sums.to(values.dtype)
