"""Per-token tensors under a mask: what lies outside it, NaN included, never enters a loss or its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def masked(
    first: Tensor, others: dict[str, Tensor | None], mask: Tensor | None, name: str = "logps"
) -> tuple[dict[str, Any], Tensor]:
    """All tensors in one dtype, float32 at least, 0 outside the mask; and the mask, bool."""
    given = {name: first} | {key: value for key, value in others.items() if value is not None}
    for key, value in given.items():
        if value.shape != first.shape or value.device != first.device:
            raise ValueError(
                f"{key}: shape {tuple(value.shape)} on {value.device}, accepted is that of {name}, "
                f"{tuple(first.shape)} on {first.device}"
            )
        if value.is_complex():
            raise ValueError(f"{key}: dtype {value.dtype}, accepted are real numbers")
        if key not in (name, "entropy") and value.requires_grad:
            raise ValueError(f"{key} requires grad, but no gradient flows there: detach it")
    mask = torch.ones_like(first, dtype=torch.bool) if mask is None else mask
    if mask.shape != first.shape or mask.dtype != torch.bool or mask.device != first.device:
        raise ValueError(
            f"mask: {mask.dtype} {tuple(mask.shape)} on {mask.device}, accepted is bool {tuple(first.shape)} on "
            f"{first.device}"
        )
    dtype = torch.promote_types(first.dtype, torch.float32)
    return {key: torch.where(mask, value.to(dtype), 0) for key, value in given.items()}, mask
