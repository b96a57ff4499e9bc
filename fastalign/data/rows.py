"""The rows of a data set, read by position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Unreadable(NamedTuple):
    """Stands for a row whose record is broken; `detail` names the line and the fault."""

    detail: str


@dataclass(frozen=True)
class RowSource:
    """Rows `start` to `stop` (exclusive) of the data set `name`; `read(i, j)` returns rows i to j of the whole.

    A row is a plain Python object as it was stored, not checked in any way, or `Unreadable`.
    """

    name: str
    read: Callable[[int, int], list[Any]]
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def batches(self, size: int) -> Iterator[tuple[int, list[Any]]]:
        """Yields (number of the first row, rows), at most `size` rows at a time."""
        for first in range(self.start, self.stop, size):
            yield first, self.read(first, min(first + size, self.stop))

    @classmethod
    def of(cls, rows: Sequence[Any], name: str) -> RowSource:
        return cls(name, lambda i, j: list(rows[i:j]), 0, len(rows))
