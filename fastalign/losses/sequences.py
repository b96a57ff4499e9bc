"""Sums over the sequences that tokens belong to, padded or packed."""

from __future__ import annotations

import torch
from torch import Tensor


class Sequences:
    """Which sequence each token belongs to, and how many tokens of it count.

    mask: bool, True where a token counts: padded (B, T), a row a sequence, or packed (N,) with cu_seqlens (S + 1,) on
    the host. dtype: of lengths and shares. Nothing waits for the device.
    """

    def __init__(self, mask: Tensor, cu_seqlens: Tensor | None = None, *, dtype: torch.dtype = torch.float32) -> None:
        self.mask, self._offsets = mask, None
        if cu_seqlens is not None:
            lengths = cu_seqlens.diff()
            index = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
            self._index = index.to(mask.device, non_blocking=True)
            self._offsets = cu_seqlens.to(device=mask.device, dtype=torch.int64, non_blocking=True)
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
            return each[:, None].expand(self.mask.shape)
        return each.index_select(0, self._index)

    def mean(self, values: Tensor) -> Tensor:
        """At each token the mean over those of its sequence; values are 0 outside the mask."""
        return self.spread(self.sums(values) / self.lengths.clamp(min=1))

    def shares(self) -> Tensor:
        """1/|y| at each token of y that counts, 0 elsewhere."""
        return self.mask / self.spread(self.lengths.clamp(min=1))
