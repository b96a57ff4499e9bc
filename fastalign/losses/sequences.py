"""Sums over the sequences that tokens belong to, padded or packed."""

from __future__ import annotations

import torch
from torch import Tensor


def host_bounds(bounds: Tensor, count: int, name: str, what: str) -> Tensor:
    """Boundaries (n + 1,) as int64, once they are known to be on the host and to rise from 0 to `count`, or ValueError
    that says of `what`."""
    if bounds.device.type != "cpu":
        raise ValueError(f"{name} must be on the host, it is on {bounds.device}")
    if bounds.is_floating_point() or bounds.is_complex():
        raise ValueError(f"{name} must be integers, got {bounds.dtype}")
    rising = bounds.to(torch.int64)
    if rising.dim() != 1 or len(rising) < 1 or rising[0] != 0 or rising[-1] != count or (rising.diff() < 0).any():
        raise ValueError(
            f"{name} must rise from 0 to {count}, the number of {what}; got {rising.flatten()[:8].tolist()}"
        )
    return rising


class Sequences:
    """Which sequence each token belongs to, and how many tokens of it count.

    mask: bool, True where a token counts: padded (B, T), a row a sequence, or packed (N,) with cu_seqlens (S + 1,) on
    the host. dtype: of lengths and shares. Nothing waits for the device.
    """

    def __init__(self, mask: Tensor, cu_seqlens: Tensor | None = None, *, dtype: torch.dtype = torch.float32) -> None:
        self.mask, self._offsets = mask, None
        if cu_seqlens is not None:
            bounds = host_bounds(cu_seqlens, mask.shape[0] if mask.dim() == 1 else -1, "cu_seqlens", "tokens")
            lengths = bounds.diff()
            index = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
            self._index = index.to(mask.device, non_blocking=True)
            self._offsets = bounds.to(device=mask.device, non_blocking=True)
        self.lengths = self.sums(mask.to(dtype))

    @property
    def count(self) -> Tensor:
        """How many sequences have a token that counts, 0-dim int64."""
        return (self.lengths > 0).sum()

    def sums(self, values: Tensor) -> Tensor:
        """(S,) of per-token values that are 0 outside the mask; added up in float64, in a fixed order."""
        if self._offsets is None:
            return values.sum(-1, dtype=torch.float64).to(values.dtype)
        wide = values.double()
        return torch.segment_reduce(wide, "sum", offsets=self._offsets, axis=0, initial=0.0, unsafe=True).to(
            values.dtype
        )

    def spread(self, each: Tensor) -> Tensor:
        """(S,) to the tokens of each sequence."""
        if self._offsets is None:
            if self.mask.dim() != 2:
                raise ValueError(
                    f"shape {tuple(self.mask.shape)} of the tokens, accepted is (B, T), or (N,) with cu_seqlens"
                )
            return each[:, None].expand(self.mask.shape)
        return each.index_select(0, self._index)

    def mean(self, values: Tensor) -> Tensor:
        """At each token the mean over those of its sequence; values are 0 outside the mask."""
        return self.spread(self.sums(values) / self.lengths.clamp(min=1))

    def shares(self) -> Tensor:
        """1/|y| at each token of y that counts, 0 elsewhere."""
        return self.mask / self.spread(self.lengths.clamp(min=1))
