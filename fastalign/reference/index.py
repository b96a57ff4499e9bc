"""Keys of all shards, sorted: a thousand look-ups are one binary search."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from fastalign.reference.errors import DamagedFileError
from fastalign.reference.sequences import KEY_BYTES
from fastalign.reference.shards import Shard


class KeyIndex:
    """Finds rows by key in a set of shards. 24 bytes a row in memory, beside the 12 that shards keep.

    A key may stand in several shards (two writers computed it): any sound row serves.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        keys = [shard.read_keys() for shard in shards]
        number = np.repeat(np.arange(len(shards), dtype=np.int32), [len(block) for block in keys])
        row = np.concatenate([np.arange(len(block), dtype=np.int32) for block in keys] or [np.zeros(0, np.int32)])
        high, low = _halves(np.concatenate(keys or [np.zeros((0, KEY_BYTES), np.uint8)]))
        order = np.lexsort((low, high))
        self._high, self._low = high[order], low[order]
        self._shard, self._row = number[order], row[order]

    def __len__(self) -> int:
        """Rows, duplicates included."""
        return len(self._high)

    def distinct(self) -> int:
        """Rows, duplicates counted once."""
        if not len(self):
            return 0
        return 1 + int(((self._high[1:] != self._high[:-1]) | (self._low[1:] != self._low[:-1])).sum())

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Positions (n,) int64 of the first row of each key, −1 where there is none. keys (n, 16) uint8."""
        high, low = _halves(keys)
        position = np.searchsorted(self._high, high).astype(np.int64)
        last = len(self) - 1
        if last < 0:
            return np.full(len(keys), -1, np.int64)
        while True:  # rows whose first halves agree are ordered by the second: step over those that are smaller
            at = np.minimum(position, last)
            same_high = (position <= last) & (self._high[at] == high)
            behind = same_high & (self._low[at] < low)
            if not behind.any():
                return np.where(same_high & (self._low[at] == low), position, -1)
            position += behind

    def read(self, position: int, key: bytes) -> np.ndarray:
        """Log-probs (n,) float32 of the row at `position`, or of its duplicate where that one is damaged.

        Raises DamagedFileError when every row of that key is.
        """
        try:
            return self._shards[self._shard[position]].row(self._row[position], key)
        except DamagedFileError as error:
            for duplicate in self._duplicates(position):
                with suppress(DamagedFileError):
                    return self._shards[self._shard[duplicate]].row(self._row[duplicate], key)
            raise error

    def _duplicates(self, position: int) -> range:
        """Positions of the further rows with the same key; the first one is at `position`."""
        high, low, end = self._high[position], self._low[position], position + 1
        while end < len(self) and self._high[end] == high and self._low[end] == low:
            end += 1
        return range(position + 1, end)


def first_occurrences(keys: np.ndarray) -> np.ndarray:
    """Positions (m,) int64, ascending, of each distinct key's first occurrence. keys (n, 16) uint8."""
    high, low = _halves(keys)
    order = np.lexsort((low, high))  # stable: equal keys keep their order
    high, low = high[order], low[order]
    new = np.ones(len(order), bool)
    new[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    return np.sort(order[new])


def _halves(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, 16) uint8 → the first and second eight bytes, (n,) uint64 each."""
    words = np.ascontiguousarray(keys).view("<u8")
    return words[:, 0].astype(np.uint64), words[:, 1].astype(np.uint64)
