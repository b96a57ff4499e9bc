"""What every entry point of the fused head checks and works out of its arguments."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastalign.ops import backends
from fastalign.ops import rows as R

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def workspace_bytes(workspace_mb: float | None) -> int | None:
    """Bytes of an explicit budget; None stays None, the planner's default."""
    if workspace_mb is None:
        return None
    if not 0 < workspace_mb < 2**43:  # 2^63 bytes, an int64 of an operator
        raise ValueError(f"workspace_mb must be a positive number of MiB below 2^43, got {workspace_mb!r}")
    return int(workspace_mb * 2**20)


def needed_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[bool, bool, bool]:
    if not torch.is_grad_enabled():
        return False, False, False
    return hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad


def check_head(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Validate what a caller can get wrong; returns the tensors in autocast's dtype where it is on."""
    if weight.dim() != 2 or not weight.shape[1]:
        raise ValueError(f"weight must be (V, H) with H ≥ 1, got shape {tuple(weight.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be (..., {weight.shape[1]}) to fit weight {tuple(weight.shape)}, got {tuple(hidden.shape)}"
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets must have hidden's leading shape {tuple(hidden.shape[:-1])}, got {tuple(targets.shape)}"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must be ({weight.shape[0]},) to fit weight {tuple(weight.shape)}, got {tuple(bias.shape)}"
        )
    if bias is not None and not bias.is_floating_point():
        raise ValueError(f"bias must be floating-point, got {bias.dtype}")
    if rows is not None and (rows.dim() != 1 or rows.dtype != torch.int64):
        raise ValueError(f"rows must be (n,) int64, got shape {tuple(rows.shape)} {rows.dtype}")
    if rows is not None and rows.device.type not in ("cpu", hidden.device.type):
        raise ValueError(f"rows must be on the host or on {hidden.device}, where hidden is, they are on {rows.device}")
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}; they must share a device")
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden = hidden.to(dtype)
        if weight.dtype not in (dtype, torch.float32):
            weight = weight.to(dtype)
    elif weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}: give both in one dtype, or use torch.autocast"
        )
    if hidden.dtype not in DTYPES:
        raise ValueError(f"hidden must be float32, bfloat16 or float16, got {hidden.dtype}")
    return hidden, weight, bias


def check_boundaries(cu_seqlens: Tensor, device: torch.device) -> None:
    """Raise ValueError unless cu_seqlens is (n + 1,) integers, on the host or on a device like `device`."""
    if cu_seqlens.dim() != 1 or not len(cu_seqlens) or cu_seqlens.is_floating_point() or cu_seqlens.is_complex():
        raise ValueError(f"cu_seqlens must be (B + 1,) integers, got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device.type not in ("cpu", device.type):
        raise ValueError(f"cu_seqlens must be on the host or on {device}, it is on {cu_seqlens.device}")


def check_accumulator(into: Tensor, weight: Tensor, needed: bool, schedule: str) -> None:
    """Raise ValueError unless the backward can add the weight's gradient to `into`."""
    if torch.compiler.is_compiling():
        raise ValueError("accumulate_into is for eager calls: a compiled graph returns its gradients")
    if not needed:
        raise ValueError("accumulate_into is for the weight's gradient, but weight needs none here")
    if schedule in ("overlaid", "streamed"):
        raise ValueError(
            f"schedule={schedule!r} computes the weight's gradient in memory of its own, before the backward knows its "
            "scale; with accumulate_into take 'auto', 'deferred' or 'cached'"
        )
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if into.shape != weight.shape or into.dtype != wide or into.device != weight.device or not into.is_contiguous():
        raise ValueError(
            f"accumulate_into must be contiguous {wide}, {tuple(weight.shape)} on {weight.device} like weight, got "
            f"{into.dtype} {tuple(into.shape)} on {into.device}"
        )
    if into.requires_grad:
        raise ValueError("accumulate_into is a gradient: it must not require one")
    memory = into.untyped_storage().data_ptr()
    if memory and memory == weight.untyped_storage().data_ptr():
        raise ValueError("accumulate_into is the weight's own memory; give it another tensor, such as weight.grad")
    hooks = getattr(weight, "_backward_hooks", None) or getattr(weight, "_post_accumulate_grad_hooks", None)
    if hooks:
        raise ValueError("weight has gradient hooks, which accumulate_into would go past; remove them, or the option")


def row_spec(
    temperature: float, logit_scale: float, softcap: float | None, entropy: bool, top1: bool, sum_sq: bool, mean: bool
) -> R.RowSpec:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"logit_scale must be finite, got {logit_scale}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")
    return R.RowSpec.make(
        temperature=float(temperature), logit_scale=float(logit_scale),
        softcap=None if softcap is None else float(softcap), entropy=entropy, top1=top1, sum_sq=sum_sq,
        sum_z=mean and softcap is not None,
    )  # fmt: skip


def scored_rows(targets: Tensor, rows: Tensor | None, ignore_index: int, V: int) -> tuple[Tensor | None, int]:
    """(indices of the rows that count or None for all of them, their count). Synchronises when `rows` is None.

    A target or row out of range is a ValueError that names it, on the CPU and under FASTALIGN_CHECK_TARGETS=1; else its
    log-prob is NaN.
    """
    if rows is not None:
        if rows.device != targets.device:
            rows = rows.to(targets.device, non_blocking=True)
        n = rows.shape[0]
    else:
        rows = (targets != ignore_index).nonzero()[:, 0]
        n = rows.shape[0]
        if n == targets.shape[0]:
            rows = None
    if n and (targets.device.type == "cpu" or backends.checks_targets()):
        if rows is not None and not (int(rows.min()) >= 0 and int(rows.max()) < targets.shape[0]):
            raise ValueError(f"rows must lie in [0, {targets.shape[0]}), got {int(rows.min())} to {int(rows.max())}")
        picked = targets if rows is None else targets[rows]
        bad = (picked < 0) | (picked >= V)
        if bool(bad.any()):
            at = int(bad.nonzero()[0, 0])
            row = at if rows is None else int(rows[at])
            raise ValueError(
                f"targets[{row}] = {int(targets[row])} is out of range: the vocabulary has {V} entries "
                f"(ignored tokens are {ignore_index}, and must not be listed in rows)"
            )
    return rows, n
