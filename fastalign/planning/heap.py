"""What a record of allocations makes resident under glibc's malloc, on which PyTorch's CPU tensors lie.

A process is larger than its tensors, by a tenth to a half: freed memory is not given back at once, and holes are reused
only by what fits them. The model is malloc's own rule for large requests. They take the smallest free chunk that holds
them; else the heap's free end; else they are mapped on their own and given back when freed, from the mmap threshold on,
which rises to the largest mapped chunk that was freed, up to 32 MiB; else the heap grows. Free neighbours are joined,
and a free end of more than twice the threshold is given back.

PyTorch asks for addresses that are multiples of 64 and malloc has multiples of 16, so it searches for 96 bytes more,
and in three of four cases what lies before the aligned address goes back as a chunk of its own, for small objects:
those of Python and autograd. That is why a hole does not take the very tensor that left it. Here each such fragment is
taken for the next 280 requests, or until the pass is over. The number is the one that is calibrated: it was chosen on
steps of one small model, with and without checkpointing, and is some layers of a forward pass.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable

from fastalign.planning.recorder import Event

_PAGE, _TOP_PAD = 4096, 128 * 1024
_ALIGN, _SLACK = 64, 96  # of PyTorch's requests, and what malloc searches for beyond them
_LIFETIME = 280  # of small objects, in requests
_THRESHOLD, _MAX_THRESHOLD = 128 * 1024, 32 * 2**20


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


class Heap:
    """A process's heap and mappings. resident: bytes now; peak: the most there were."""

    def __init__(self) -> None:
        self.peak = 0
        self._threshold, self._mapped = _THRESHOLD, 0
        self._end = self._top = 0  # of the heap, and where its free end begins
        self._free: list[tuple[int, int]] = []  # (size, address), ascending
        self._starts: dict[int, int] = {}  # of free chunks: address -> size
        self._ends: dict[int, int] = {}  # and address behind -> address
        self._used: dict[int, tuple[int, int]] = {}  # storage -> (address, -1 where mapped; size)
        self._fragments: deque[int] = deque()
        self._requests = 0

    @property
    def resident(self) -> int:
        return self._end + self._mapped

    def replay(self, events: Iterable[Event]) -> None:
        """Allocate and free as recorded; storages that are not known here are freed without effect."""
        for storage, size in events:
            if storage < 0:
                self.end_pass()
            elif size > 0:
                self.allocate(storage, size)
            elif storage in self._used:
                self.free(storage)

    def allocate(self, storage: int, size: int) -> None:
        size = _up(size + 16, _ALIGN)
        wanted = size + _SLACK
        place = bisect_left(self._free, (wanted, -1))
        if place < len(self._free):
            chunk, address = self._free[place]
            self._remove(address)
            lead = self._lead(address)
            self._insert(address + lead + size, chunk - lead - size)
        elif wanted <= self._end - self._top or wanted < self._threshold:
            address = self._top
            lead = self._lead(address)
            self._top += lead + size
            if self._top > self._end:
                self._end = _up(self._top + _TOP_PAD, _PAGE)
        else:
            address, lead, size = -1, 0, _up(wanted, _PAGE)
            self._mapped += size
        self._used[storage] = address + lead, size
        if len(self._fragments) > _LIFETIME:
            self._give(self._fragments.popleft(), _ALIGN)
        self.peak = max(self.peak, self.resident)

    def free(self, storage: int) -> None:
        address, size = self._used.pop(storage)
        if address < 0:
            self._mapped -= size
            if self._threshold < size <= _MAX_THRESHOLD:
                self._threshold = size
        else:
            self._give(address, size)

    def end_pass(self) -> None:
        """Small objects of a pass are gone."""
        while self._fragments:
            self._give(self._fragments.popleft(), _ALIGN)

    def _lead(self, address: int) -> int:
        """Bytes before an aligned address that a small object takes."""
        self._requests += 1
        if self._requests % 4 == 0:
            return 0
        self._fragments.append(address)
        return _ALIGN

    def _give(self, address: int, size: int) -> None:
        if (before := self._ends.get(address)) is not None:
            size += self._remove(before)
            address = before
        if address + size in self._starts:
            size += self._remove(address + size)
        if address + size < self._top:
            self._insert(address, size)
            return
        self._top = address
        if self._end - self._top >= 2 * self._threshold:
            self._end = _up(self._top + _TOP_PAD, _PAGE)

    def _insert(self, address: int, size: int) -> None:
        insort(self._free, (size, address))
        self._starts[address] = size
        self._ends[address + size] = address

    def _remove(self, address: int) -> int:
        size = self._starts.pop(address)
        del self._ends[address + size]
        del self._free[bisect_left(self._free, (size, address))]
        return size
