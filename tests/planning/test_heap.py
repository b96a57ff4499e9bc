"""The model of malloc: its own rules, and that nothing is lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastalign.planning.heap import Heap
from fastalign.planning.recorder import END_OF_PASS, Event

KIB, MIB = 1024, 2**20


@given(st.lists(st.tuples(st.integers(1, 4 * MIB), st.integers(0, 5)), max_size=60))
def test_resident_memory_holds_what_is_alive_and_comes_back(steps):
    heap, alive = Heap(), {}
    for number, (size, action) in enumerate(steps):
        heap.allocate(number, size)
        alive[number] = size
        if action == 0:
            heap.end_pass()
        elif action < 4 and len(alive) > 1:
            heap.free(oldest := next(iter(alive)))
            del alive[oldest]
        assert heap.peak >= heap.resident >= sum(alive.values())
    for number in alive:
        heap.free(number)
    heap.end_pass()
    assert not heap._used
    assert heap._top == 0, "all chunks are joined again"
    assert heap._free == []


def test_large_requests_are_mapped_and_given_back():
    heap = Heap()
    heap.allocate(0, MIB)
    assert MIB < heap.resident < MIB + 8 * KIB
    heap.free(0)
    assert heap.resident == 0


def test_the_threshold_rises_to_what_was_freed():
    heap = Heap()
    heap.allocate(0, MIB)
    heap.free(0)
    heap.allocate(1, MIB // 2)  # on the heap now
    heap.free(1)
    assert heap.resident > 0
    for size in (40 * MIB, 40 * MIB):  # above the most that the threshold becomes: mapped each time
        heap.allocate(2, size)
        heap.free(2)
    assert heap.resident < 2 * MIB


def test_a_hole_does_not_take_what_left_it_before_the_pass_is_over():
    heap = Heap()
    heap.allocate(9, 64 * MIB)
    heap.allocate(0, 100 * KIB)
    heap.allocate(1, 100 * KIB)
    before = heap._top
    heap.free(0)
    heap.allocate(2, 100 * KIB)
    assert heap._top > before
    heap.free(2)
    heap.free(1)
    heap.end_pass()
    assert heap._top == 0


def test_replay_knows_only_what_it_has_seen():
    heap = Heap()
    heap.replay([Event(7, -10), Event(0, 10), END_OF_PASS, Event(0, -10)])
    assert not heap._used
    assert heap.peak > 0
