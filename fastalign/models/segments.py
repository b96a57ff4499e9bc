"""Where the sequences of a packed batch lie, known on the host."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class VarlenIndex(NamedTuple):
    """What variable-length kernels take, on one device: `positions` (N,) int64, flat, of the N tokens that are no
    padding, None where there is no padding; `cu_seqlens` (S + 1,) int32; `longest` on the host.
    """

    positions: Tensor | None
    cu_seqlens: Tensor
    longest: int


class Segments:
    """The sequences that lie one after the other in the rows of a padded batch (B, T).

    lengths: (B, K) integers, on the host: the sequences of each row in order, 0 where there are fewer; what they leave
    of a row is padding. A flat batch (1, N) of sequences is the case B = 1.

    Raises ValueError: lengths that are negative, all 0 or together longer than a row.
    """

    def __init__(self, lengths: np.ndarray, width: int) -> None:
        lengths = np.asarray(lengths, dtype=np.int64)
        if lengths.ndim != 2 or lengths.min(initial=0) < 0 or not lengths.any():
            raise ValueError(f"segment lengths must be (B, K), none negative and not all 0, got shape {lengths.shape}")
        padding = width - lengths.sum(axis=1)
        if padding.min() < 0:
            row = int(padding.argmin())
            raise ValueError(f"the segments of row {row} have {lengths[row].sum()} tokens, the batch is {width} wide")
        self.shape = (len(lengths), width)
        blocks = np.concatenate([lengths, padding[:, None]], axis=1).ravel()
        is_segment = np.tile(np.arange(lengths.shape[1] + 1) < lengths.shape[1], len(lengths))
        self.block_sizes: list[int] = blocks[
            blocks > 0
        ].tolist()  # segments and padding, in the order of the flat batch
        self.is_segment: list[bool] = is_segment[blocks > 0].tolist()
        self._varlen: dict[torch.device, VarlenIndex] = {}

    @cached_property
    def lengths(self) -> np.ndarray:
        """(S,) int64, tokens of each segment."""
        return np.array(self.block_sizes)[np.array(self.is_segment)]

    def varlen(self, device: torch.device) -> VarlenIndex:
        """The index for kernels on `device`; moved there once."""
        if device not in self._varlen:
            real = np.repeat(self.is_segment, self.block_sizes)
            positions = None if real.all() else torch.from_numpy(np.flatnonzero(real)).to(device)
            cu_seqlens = torch.from_numpy(np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)).to(device)
            self._varlen[device] = VarlenIndex(positions, cu_seqlens, int(self.lengths.max()))
        return self._varlen[device]
