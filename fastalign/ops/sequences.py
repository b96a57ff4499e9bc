"""Sums and means of per-token values over sequences, padded or packed."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.ops import backends
from fastalign.ops.arguments import check_boundaries
from fastalign.ops.scans import segment_sums_torch
from fastalign.ops.sequence_ops import segment_sums


def sequence_logps(
    per_token_logps: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, reduction: str = "sum",
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Per-sequence log-probs, differentiable, summed in float64 in a fixed order.

        logps(y) = Σ_{n ∈ y} logps_n          reduction="mean": divided by |y|, the number of tokens summed

    Args:
        per_token_logps: padded (B, T), or packed (N,) with cu_seqlens. float32.
        mask: bool, per_token_logps' shape, True = completion token. None counts every token. Values under the mask, NaN
            included, do not leak.
        cu_seqlens: (B + 1,) int32 or int64, from 0 to N: sequence b is tokens cu_seqlens[b]:cu_seqlens[b+1].
        reduction: "sum" or "mean"; the mean of an empty sequence is 0.
        backend: "auto", "torch" or "triton", a kernel that reads every token once and serves CUDA tensors.
    Returns:
        (B,) in per_token_logps' dtype.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown reduction, a backend that cannot run, or
            boundaries that do not rise from 0 to N. Those of an accelerator are looked at under
            FASTALIGN_CHECK_TARGETS=1; else no token outside is read, and the sums are wrong.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend must be 'auto', 'torch' or 'triton', got {backend!r}")
    values, device = per_token_logps, per_token_logps.device
    if not values.is_floating_point():
        raise ValueError(f"per_token_logps must be floating-point, got {values.dtype}")
    if mask is not None and (mask.shape != values.shape or mask.device != device or mask.is_complex()):
        raise ValueError(
            f"mask must be {tuple(values.shape)} on {device} like per_token_logps, got {mask.dtype} "
            f"{tuple(mask.shape)} on {mask.device}"
        )
    if values.dim() != (2 if cu_seqlens is None else 1):
        accepted = "(B, T), or (N,) with cu_seqlens" if cu_seqlens is None else "(N,) with cu_seqlens"
        raise ValueError(f"per_token_logps must be {accepted}; got shape {tuple(values.shape)}")
    if cu_seqlens is None:
        offsets = torch.arange(values.shape[0] + 1, device=device) * values.shape[1]
    else:
        offsets = _boundaries(cu_seqlens, values)
    flat = None if mask is None else mask.reshape(-1).bool()
    return sums_between(values.reshape(-1), flat, offsets, reduction, backend)


def sums_between(
    values: Tensor, mask: Tensor | None, offsets: Tensor, reduction: str = "sum", backend: str = "auto"
) -> Tensor:
    """`sequence_logps` of packed values (N,) between offsets (B + 1,) int64 beside them, which are known to rise from 0
    to N: nothing is checked."""
    if backend == "triton" or (backend == "auto" and values.is_cuda):
        sums, counts = segment_sums(values, mask, offsets, backend)
    else:
        sums, counts = segment_sums_torch(values, mask, offsets)
    return sums if reduction == "sum" else sums / counts.clamp(min=1)


def _boundaries(cu_seqlens: Tensor, values: Tensor) -> Tensor:
    """cu_seqlens as int64 beside values (N,), rising, and nowhere outside of them."""
    count, home = values.shape[0], cu_seqlens.device
    check_boundaries(cu_seqlens, values.device)
    bounds = cu_seqlens.to(torch.int64)
    if (home.type == "cpu" or backends.checks_targets()) and not torch.compiler.is_compiling():
        if bounds[0] != 0 or bounds[-1] != count or (bounds.diff() < 0).any():
            raise ValueError(f"cu_seqlens must rise from 0 to N = {count}, got {bounds[:8].tolist()}")
        return bounds.to(values.device, non_blocking=True)
    return bounds.to(values.device, non_blocking=True).clamp(0, count).cummax(0).values
