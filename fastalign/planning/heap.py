"""What a record of allocations makes resident under glibc's malloc, on which PyTorch's CPU tensors lie.

A process is larger than its tensors, by a tenth to a half: freed memory is not given back at once, and holes are reused
only by what fits them. The model is malloc's own rule. A request takes the smallest free chunk that holds it, else the
heap's free end; else it is mapped on its own and given back when freed, from the mmap threshold on, which rises to the
largest mapped chunk that was freed, up to 32 MiB; else the heap grows. Free neighbours are joined, and a free end of
more than twice the threshold is given back.

PyTorch asks for addresses that are multiples of 64. malloc has multiples of 16, so it searches for 96 bytes more and
cuts off what lies before the aligned address and behind the tensor: chunks of 32 to 96 bytes, which small objects take
at once. Those of a tensor itself die with it; the nodes that a forward leaves stay until its graph is dropped, after
the backward. So a tensor's place, once it is free, lies between small objects and is too small for the next tensor of
its size. Without them the holes of a step would add some percent to the peak; with them it is a tenth, and a third
where checkpointing computes layers again.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Sequence

from fastalign.planning.recorder import END_OF_PASS, FORWARD, Event

Chunk = tuple[int, int]  # address, size

_PAGE, _TOP_PAD = 4096, 128 * 1024
_ALIGN, _SMALLEST = 64, 32  # of PyTorch's requests; of chunks
_FAST = 128  # bytes of a chunk that waits, once freed, for a request of its size, until a large one comes
_CONSOLIDATES = 64 * 1024  # bytes of a freed chunk that let the waiting ones go
_THRESHOLD, _MAX_THRESHOLD = 128 * 1024, 32 * 2**20
# Small chunks by size, a tensor: of the tensor, and of the graph that a forward leaves. benchmarks/small_objects.py
# counts them, in passes of a Llama model of six layers, full and LoRA, with and without checkpointing.
_OF_TENSOR = {112: 0.35, 192: 1.0, 320: 0.33}
_OF_GRAPH = {32: 2.0, 48: 0.75, 64: 0.1, 496: 0.8, 528: 0.25, 656: 0.2, 752: 0.17}
_OFFSETS = (0.0, 0.5)
_KEPT = (1, 2)  # freed chunks of a size that a thread keeps for itself: up to seven, most of the time few


def mean_peak(events: Sequence[Event]) -> int:
    """The most bytes resident over a record, as the mean of replays that differ in where small objects fall and stay.

    That little can move a peak by several percent, here as in a process.
    """
    peaks = []
    for offset, kept in itertools.product(_OFFSETS, _KEPT):
        heap = Heap(offset, kept=kept)
        heap.replay(events)
        peaks.append(heap.peak)
    return sum(peaks) // len(peaks)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


class Heap:
    """A process's heap and mappings. resident: bytes now; peak: the most there were.

    offset: in [0, 1), of an object, that the first tensor has more of. small: whether there are small objects. kept:
    freed chunks of a size that a thread keeps for itself.
    """

    def __init__(self, offset: float = 0.0, *, small: bool = True, kept: int = 1) -> None:
        self.peak = 0
        self._threshold, self._mapped = _THRESHOLD, 0
        self._end = self._top = 0  # of the heap, and where its free end begins
        self._free: list[tuple[int, int]] = []  # (size, address), ascending
        self._starts: dict[int, int] = {}  # of free chunks: address -> size
        self._ends: dict[int, int] = {}  # and address behind -> address
        self._waiting: defaultdict[int, list[int]] = defaultdict(list)  # small freed chunks, by size
        self._most_kept = kept
        self._kept: defaultdict[int, list[int]] = defaultdict(list)
        self._used: dict[int, Chunk] = {}  # storage -> chunk, whose address is -1 where it is mapped
        self._objects: dict[int, list[Chunk]] = {}  # storage -> its small objects
        self._graph: list[Chunk] = []
        kinds = (_OF_TENSOR, _OF_GRAPH) if small else ({}, {})
        self._owed = [dict.fromkeys(kind, offset) for kind in kinds]  # parts of objects that are still to come
        self._phase = END_OF_PASS

    @property
    def resident(self) -> int:
        return self._end + self._mapped

    def replay(self, events: Iterable[Event]) -> None:
        """Allocate and free as recorded; storages that are not known here are freed without effect."""
        for event in events:
            if event.storage < 0:
                self.begin(event)
            elif event.size > 0:
                self.allocate(*event)
            elif event.storage in self._used:
                self.free(event.storage)

    def begin(self, phase: Event) -> None:
        """FORWARD, BACKWARD or END_OF_PASS, which drops the graph."""
        self._phase = phase
        if phase == END_OF_PASS:
            self._drop(self._graph)

    def allocate(self, storage: int, size: int) -> None:
        self._join_waiting()
        wanted = max(_up(size + 8, 16), _SMALLEST)
        searched = wanted + _ALIGN + _SMALLEST
        fits = self._free and self._free[-1][0] >= searched
        if not fits and searched > self._end - self._top and searched >= self._threshold:
            whole = _up(searched + 16, _PAGE)
            self._mapped += whole
            self._used[storage] = -1, whole
        else:
            self._used[storage] = self._aligned(*self._take(searched), wanted)
        of_tensor, of_graph = self._owed
        if self._phase == FORWARD:
            self._graph += self._made(of_graph, _OF_GRAPH)
        self._objects[storage] = self._made(of_tensor, _OF_TENSOR)
        self.peak = max(self.peak, self.resident)

    def free(self, storage: int) -> None:
        address, size = self._used.pop(storage)
        if address < 0:
            self._mapped -= size
            if self._threshold < size <= _MAX_THRESHOLD:
                self._threshold = size
        else:
            if size >= _CONSOLIDATES:
                self._join_waiting()
            self._give(address, size)
        self._drop(self._objects.pop(storage))

    def _take(self, size: int) -> Chunk:
        """(address, size) of the smallest free chunk that is large enough, cut to it, or of the heap's end."""
        place = bisect_left(self._free, (size, -1))
        if place < len(self._free):
            found, address = self._free[place]
            self._remove(address)
            if found - size < _SMALLEST:
                return address, found
            self._insert(address + size, found - size)
            return address, size
        address = self._top
        self._top += size
        if self._top > self._end:
            self._end = _up(self._top + _TOP_PAD, _PAGE)
        return address, size

    def _aligned(self, address: int, size: int, wanted: int) -> Chunk:
        """What of a chunk an aligned tensor keeps."""
        lead = -(address + 16) % _ALIGN
        if 0 < lead < _SMALLEST:
            lead += _ALIGN
        if lead:
            self._give_small(address, lead)
        address, size = address + lead, size - lead
        if size - wanted >= _SMALLEST:
            self._give_small(address + wanted, size - wanted)
            size = wanted
        return address, size

    # ---- small objects

    def _made(self, owed: dict[int, float], shares: dict[int, float]) -> list[Chunk]:
        """The objects that come with one more tensor."""
        made = []
        for size in owed:
            owed[size] += shares[size]
            while owed[size] >= 1:
                owed[size] -= 1
                own = self._kept[size] or self._waiting[size]
                made.append((own.pop(), size) if own else self._take(size))
        return made

    def _drop(self, objects: list[Chunk]) -> None:
        """Last ones first."""
        while objects:
            self._give_small(*objects.pop())

    def _give_small(self, address: int, size: int) -> None:
        if len(self._kept[size]) < self._most_kept:
            self._kept[size].append(address)
        elif size <= _FAST:
            self._waiting[size].append(address)
        else:
            self._give(address, size)

    def _join_waiting(self) -> None:
        for size, addresses in self._waiting.items():
            for address in addresses:
                self._give(address, size)
            addresses.clear()

    # ---- free chunks

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
