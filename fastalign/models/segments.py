"""Where the sequences of a packed batch lie, known on the host."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


class VarlenIndex(NamedTuple):
    """What variable-length kernels take, on one device.

    positions        (N,) int64, flat: the tokens that are no padding; None where there is no padding
    key_positions    (M,) int64, flat: the keys of each segment, its prefix's before its own; `positions` without any
                     prefix
    cu_seqlens, cu_seqlens_k     (S + 1,) int32, of queries and of keys
    longest, longest_k           on the host
    """

    positions: Tensor | None
    key_positions: Tensor | None
    cu_seqlens: Tensor
    cu_seqlens_k: Tensor
    longest: int
    longest_k: int


class Segments:
    """The sequences that lie one after the other in the rows of a padded batch (B, T).

    lengths: (B, K) integers, on the host: the sequences of each row in order, 0 where there are fewer; what they leave
    of a row is padding. A flat batch (1, N) of sequences is the case B = 1.

    prefixes: (S,) integers or None, the segment that each of the S segments continues (its tokens attend to all of that
    one's and to its own, up to themselves), −1 for one that continues none. What is continued continues none.

    needed: (R,) integers or None, ascending flat indices of the tokens whose last hidden states will be read; those of
    other tokens may then be anything.

    Raises ValueError: lengths that are negative, all 0 or together longer than a row, or prefixes that are not so.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        width: int,
        *,
        prefixes: np.ndarray | None = None,
        needed: np.ndarray | None = None,
    ) -> None:
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
        self.prefixes = _checked(prefixes, len(self.lengths))
        self.needed = None if needed is None else np.asarray(needed, np.int64)
        self._cache: dict[Any, Any] = {}

    @cached_property
    def lengths(self) -> np.ndarray:
        """(S,) int64, tokens of each segment."""
        return np.array(self.block_sizes)[np.array(self.is_segment)]

    @cached_property
    def starts(self) -> np.ndarray:
        """(S,) int64, flat index of each segment's first token."""
        ends = np.cumsum(self.block_sizes)
        return (ends - self.block_sizes)[np.array(self.is_segment)]

    @cached_property
    def prefix_lengths(self) -> np.ndarray:
        """(S,) int64, tokens of each segment's prefix, 0 for none."""
        return np.where(self.prefixes < 0, 0, self.lengths[self.prefixes])

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the N tokens that are no padding, (N,) int64 each: the segment, the one that it continues (−1: none), and
        the place behind that one's tokens."""
        numbers = np.repeat(np.arange(len(self.lengths)), self.lengths)
        ends = np.cumsum(self.lengths)
        within = np.arange(int(ends[-1])) - (ends - self.lengths)[numbers]
        return numbers, self.prefixes[numbers], self.prefix_lengths[numbers] + within

    @cached_property
    def longest_keys(self) -> int:
        """Tokens that the last one of some segment sees, itself included."""
        return int((self.lengths + self.prefix_lengths).max())

    def cached(self, name: Hashable, make: Callable[[], T]) -> T:
        """What `make` makes, kept under `name`: every layer of a model, and a recomputing backward, need it again."""
        if name not in self._cache:
            self._cache[name] = make()
        return self._cache[name]

    def needed_on(self, device: torch.device) -> Tensor | None:
        """`needed` on a device; moved there once."""
        needed = self.needed
        if needed is None:
            return None
        return self.cached(("needed", device), lambda: torch.from_numpy(needed).to(device, non_blocking=True))

    def varlen(self, device: torch.device) -> VarlenIndex:
        """The index for kernels on `device`; moved there once."""
        return self.cached(("varlen", device), lambda: self._varlen(device))

    def _varlen(self, device: torch.device) -> VarlenIndex:
        tokens = _spans(self.starts, self.lengths)
        positions = None if len(tokens) == self.shape[0] * self.shape[1] else torch.from_numpy(tokens).to(device)
        key_positions, key_lengths = positions, self.lengths + self.prefix_lengths
        if self.prefix_lengths.any():
            starts = np.stack([np.where(self.prefixes < 0, 0, self.starts[self.prefixes]), self.starts], axis=1)
            parts = np.stack([self.prefix_lengths, self.lengths], axis=1)
            key_positions = torch.from_numpy(_spans(starts.ravel(), parts.ravel())).to(device)
        return VarlenIndex(
            positions, key_positions, _boundaries(self.lengths, device), _boundaries(key_lengths, device),
            int(self.lengths.max()), int(key_lengths.max()),
        )  # fmt: skip


def _checked(prefixes: np.ndarray | None, count: int) -> np.ndarray:
    if prefixes is None:
        return np.full(count, -1, np.int64)
    prefixes = np.asarray(prefixes, np.int64)
    if prefixes.shape != (count,) or prefixes.min(initial=0) < -1 or prefixes.max(initial=-1) >= count:
        raise ValueError(f"prefixes must be ({count},), each a segment or -1, got shape {prefixes.shape}")
    continued = prefixes[prefixes >= 0]
    if len(wrong := continued[prefixes[continued] >= 0]):
        raise ValueError(f"segment {wrong[0]} is a prefix and continues another one itself")
    return prefixes


def _spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The indices start, …, start + length − 1 of one span after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)


def _boundaries(lengths: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device)
