"""The model of malloc: its own rules, that nothing is lost, and this machine's malloc beside it."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastalign.planning import HeadSettings, ModelSettings, OptimizerSettings, record_step
from fastalign.planning.heap import Heap, mean_peak
from fastalign.planning.recorder import BACKWARD, END_OF_PASS, FORWARD, Event

KIB, MIB = 1024, 2**20


def accounted(heap: Heap) -> int:
    """Bytes of all chunks of the heap below its free end."""
    small = sum(size * len(places) for own in (heap._waiting, heap._kept) for size, places in own.items())
    used = sum(size for address, size in heap._used.values() if address >= 0)
    objects = sum(size for own in (heap._graph, *heap._objects.values()) for _, size in own)
    return used + small + sum(size for size, _ in heap._free) + objects


@given(st.lists(st.tuples(st.integers(1, 4 * MIB), st.integers(0, 5)), max_size=60))
def test_resident_memory_holds_what_is_alive_and_nothing_is_lost(steps):
    heap, alive = Heap(), {}
    for number, (size, action) in enumerate(steps):
        heap.allocate(number, size)
        alive[number] = size
        if action < 3:
            heap.begin((END_OF_PASS, FORWARD, BACKWARD)[action])
        elif action < 5 and len(alive) > 1:
            heap.free(oldest := next(iter(alive)))
            del alive[oldest]
        assert heap.peak >= heap.resident >= sum(alive.values())
        assert accounted(heap) == heap._top
    for number in alive:
        heap.free(number)
    heap.begin(END_OF_PASS)
    assert not heap._used
    assert not heap._objects
    assert not heap._graph
    assert heap._mapped == 0
    assert accounted(heap) == heap._top


def test_large_requests_are_mapped_and_given_back():
    heap = Heap(small=False)
    heap.allocate(0, MIB)
    assert MIB < heap.resident < MIB + 8 * KIB
    heap.free(0)
    assert heap.resident == 0


def test_the_threshold_rises_to_what_was_freed():
    heap = Heap(small=False)
    heap.allocate(0, MIB)
    heap.free(0)
    heap.allocate(1, MIB // 2)  # on the heap now
    heap.free(1)
    assert heap.resident > 0
    for size in (40 * MIB, 40 * MIB):  # above the most that the threshold becomes: mapped each time
        heap.allocate(2, size)
        heap.free(2)
    assert heap.resident < 2 * MIB


@pytest.mark.parametrize(("phase", "fits"), [(END_OF_PASS, True), (FORWARD, False)])
def test_small_objects_of_a_forward_keep_a_hole_from_what_left_it(phase, fits):
    heap = Heap()
    heap.begin(phase)
    heap.allocate(9, MIB)
    heap.free(9)  # the threshold is above what follows
    for number in range(3):
        heap.allocate(number, 100 * KIB)
    heap.free(1)
    before = heap._top
    heap.allocate(4, 100 * KIB)
    assert (heap._top == before) == fits


def test_small_objects_of_a_tensor_die_with_it_and_those_of_a_graph_with_the_pass():
    heap = Heap()
    heap.begin(FORWARD)
    for number in range(8):
        heap.allocate(number, 100 * KIB)
    graph = len(heap._graph)
    assert graph >= 16  # two and more with a tensor
    heap.begin(BACKWARD)
    for number in range(8):
        assert any(heap._objects.values())
        heap.free(number)
    heap.allocate(8, 100 * KIB)  # what a backward makes has no graph
    assert len(heap._graph) == graph
    heap.begin(END_OF_PASS)
    assert not heap._graph
    assert list(heap._objects) == [8]


MALLOC = """
import ctypes, json, random, sys
libc = ctypes.CDLL(None)
class Info(ctypes.Structure):
    _fields_ = [(n, ctypes.c_size_t) for n in "arena _1 _2 _3 mapped _4 _5 _6 _7 _8".split()]
libc.mallinfo2.restype = Info
libc.free.argtypes = [ctypes.c_void_p]
def resident():
    info = libc.mallinfo2()
    return info.arena + info.mapped
events, places, place = json.loads(sys.stdin.read()), {}, ctypes.c_void_p()
small = random.Random(int(sys.argv[1]))
start = [bytearray(small.randrange(600, 3000)) for _ in range(small.randrange(200))]
before, peak = resident(), 0
for storage, size in events:
    if size > 0:
        assert libc.posix_memalign(ctypes.byref(place), 64, ctypes.c_size_t(size)) == 0
        places[storage] = place.value
        peak = max(peak, resident() - before)
    elif storage in places:
        libc.free(places.pop(storage))
print(peak)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33, whose malloc this is")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_small_objects_it_is_this_machines_malloc(checkpointing, llama, make_piece):
    """A step's tensors in a process that has nothing else: no more memory is touched than malloc's own.

    What lay on the heap before moves that by up to a tenth, so some starts are tried.
    """
    llama.hidden_size, llama.intermediate_size, llama.vocab_size, llama.head_dim = 256, 704, 4096, 64
    record = record_step(
        llama, [make_piece(8, 24, 40)] * 2, model=ModelSettings(checkpointing=checkpointing),
        head=HeadSettings(device_type="cpu"), optimizer=OptimizerSettings(cls=torch.optim.AdamW),
    )  # fmt: skip
    events = [event for event in record.events(3) if event.storage >= 0]
    pipes = {"input": json.dumps(events), "capture_output": True, "text": True}
    found = [subprocess.run([sys.executable, "-c", MALLOC, str(seed)], **pipes, check=True).stdout for seed in range(5)]
    heap = Heap(small=False)
    heap.replay(events)
    assert heap.peak == pytest.approx(min(map(int, found)), rel=0.06)


def test_the_mean_is_over_where_small_objects_fall():
    events = [FORWARD, *(Event(number, (50 + number) * KIB) for number in range(40)), BACKWARD]
    events += [Event(number, -(50 + number) * KIB) for number in reversed(range(40))] + [END_OF_PASS]
    peaks = []
    for offset, kept in ((0.0, 1), (0.0, 2), (0.5, 1), (0.5, 2)):
        heap = Heap(offset, kept=kept)
        heap.replay(events * 3)
        peaks.append(heap.peak)
    assert mean_peak(events * 3) == sum(peaks) // 4


def test_replay_knows_only_what_it_has_seen():
    heap = Heap()
    heap.replay([Event(7, -10), Event(0, 10), END_OF_PASS, Event(0, -10)])
    assert not heap._used
    assert heap.peak > 0
