"""Choosing tile sizes: what counts, what is kept, what is written; at tiny sizes with real, interpreted kernels."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

from fastalign.kernels import _tiles

from fastalign.ops import backends, tuning


@dataclass(frozen=True)
class Sizes:
    block: int
    warps: int = 4


def subject(candidates, launch=None, current=Sizes(64)):
    return tuning.Subject("some_kernel", "16-bit", current, candidates, launch or (lambda tiles: torch.ones(3)))


def timer_of(subject, seconds):
    """The subject, and a timer that gives each block size its seconds."""
    running = []

    def launch(tiles):
        running.append(tiles)
        return subject.launch(tiles)

    def timer(call):
        call()
        return seconds[running[-1].block]

    return tuning.Subject(subject.kernel, subject.case, subject.current, subject.candidates, launch), timer


def test_the_fastest_is_chosen():
    chosen, timer = timer_of(subject((Sizes(128), Sizes(256), Sizes(32))), {64: 1.0, 128: 0.7, 256: 0.5, 32: 2.0})
    outcome = tuning.tune(chosen, timer)
    assert outcome.chosen == Sizes(256)
    assert (outcome.seconds, outcome.chosen_seconds) == (1.0, 0.5)
    assert outcome.changes == {"block": (64, 256)}


def test_a_gain_within_the_noise_changes_nothing():
    chosen, timer = timer_of(subject((Sizes(128),)), {64: 1.0, 128: 0.99})
    outcome = tuning.tune(chosen, timer)
    assert outcome.chosen == Sizes(64)
    assert outcome.chosen_seconds == 1.0
    assert not outcome.changes


def test_what_is_wrong_or_impossible_does_not_count():
    def launch(tiles):
        if tiles.block == 128:
            raise RuntimeError("out of resource: shared memory\nand more")
        return torch.full((3,), 1.0 if tiles.block == 64 else 1.1)

    chosen, timer = timer_of(subject((Sizes(128), Sizes(256)), launch), {64: 1.0, 128: 0.1, 256: 0.1})
    outcome = tuning.tune(chosen, timer)
    assert outcome.chosen == Sizes(64)
    assert outcome.refused == {
        Sizes(128): "RuntimeError: out of resource: shared memory",
        Sizes(256): "its result is wrong",
    }


def test_a_table_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "sm_90.json"
    outcome = tuning.Outcome(subject(()), 1.0, Sizes(128), 0.5)
    tuning.write_table(path, "first", [outcome])
    other = tuning.Outcome(tuning.Subject("other", "all", Sizes(1), (), outcome.subject.launch), 1.0, Sizes(2), 0.5)
    tuning.write_table(path, "second", [other])
    assert json.loads(path.read_text()) == {
        "about": "second",
        "some_kernel": {"16-bit": {"block": 128, "warps": 4}},
        "other": {"all": {"block": 2, "warps": 4}},
    }
    before = path.read_text()
    monkeypatch.setattr(tuning.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tuning.write_table(path, "third", [outcome])
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_candidates_are_possible(dtype, monkeypatch):
    """No kernel runs: what would be timed on a GPU whose architecture is known."""
    monkeypatch.setattr(_tiles, "USER_TABLES", _tiles.TABLES)
    found = list(tuning.subjects(torch.device("cpu"), tuning.Shape(4, 16, 300), dtype))
    assert {subject.kernel for subject in found} == set(tuning.KERNELS)
    for each in found:
        assert each.current not in each.candidates
        assert 1 <= len(set(each.candidates)) == len(each.candidates) <= 300, (each.kernel, len(each.candidates))
    fused = found[0]
    limit = _tiles.SHARED_MEMORY_LIMIT["sm_90"]
    for tiles in fused.candidates:
        stage = (tiles.block_n + tiles.block_v) * tiles.block_h * dtype.itemsize
        assert stage * tiles.num_stages <= limit


@pytest.mark.skipif(not backends.interpreting(), reason="runs interpreted kernels: set TRITON_INTERPRET=1")
@pytest.mark.parametrize("kernel", tuning.KERNELS)
def test_triton_kernels_agree_whatever_their_tiles(kernel, monkeypatch):
    """Every kernel with the sizes in use and with two others, each twice as fast as the one before."""
    monkeypatch.setattr(_tiles, "USER_TABLES", _tiles.TABLES)
    for each in tuning.subjects(torch.device("cpu"), tuning.Shape(4, 16, 300), torch.float32, (kernel,)):
        few = tuning.Subject(each.kernel, each.case, each.current, each.candidates[:2], each.launch)
        seconds = iter([4.0, 2.0, 1.0])
        outcome = tuning.tune(few, lambda launch, seconds=seconds: next(seconds))
        assert not outcome.refused
        assert (outcome.chosen, outcome.chosen_seconds) == (few.candidates[-1], 1.0)
