"""kill -9 among several writers, with a reader looking on: whatever is found is the number that was computed."""

from __future__ import annotations

import os
import random
import runpy
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from fastalign.reference import ReferenceCache

WRITER = Path(__file__).with_name("cache_writer.py")
WRITERS = 3
DIGEST = "0123456789abcdef" * 4


def known(ids, start) -> np.ndarray:
    """As in cache_writer.py."""
    return (-(np.asarray(ids, np.int64).cumsum() % 997) / 8 - start)[start:].astype(np.float32)


def make_sequences(count: int, seed: int) -> list[tuple[list[int], int]]:
    rng = random.Random(seed)
    found = {tuple(rng.randrange(50) for _ in range(rng.randint(6, 24))): rng.randrange(1, 6) for _ in range(count)}
    return [(list(ids), start) for ids, start in found.items()]


class Fire:
    """WRITERS processes build one cache, each from another place on; they are killed and started again."""

    def __init__(self, forks, root: Path, sequences, tally, seed: int) -> None:
        self.forks, self.root, self.sequences, self.tally = forks, root, sequences, tally
        self.rng, self.started = random.Random(seed), 0
        self.running = [self.start() for _ in range(WRITERS)]
        self.most = 0  # rows that were seen: none of them may ever be gone

    def start(self):
        self.started += 1
        names = {
            "cache_path": str(self.root / "cache"),
            "digest": DIGEST,
            "sequences": self.sequences,
            "journal_path": str(self.journal(self.started)),
            "offset": self.rng.randrange(len(self.sequences)),
        }
        process = self.forks.Process(
            target=runpy.run_path, args=(str(WRITER),), kwargs={"init_globals": names}, name=str(self.started)
        )
        process.start()
        return process

    def journal(self, number: int | str) -> Path:
        return self.root / f"journal-{number}"

    def kill_one(self) -> bool:
        """At a random moment after it has begun to score; False if it was ready before."""
        which = self.rng.randrange(WRITERS)
        process, deadline = self.running[which], time.monotonic() + 300
        while process.is_alive() and not self.journal(process.name).exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(self.rng.uniform(0, 0.06))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        died = process.exitcode == -signal.SIGKILL
        self.tally["kills survived"] += died
        if died:
            self.running[which] = self.start()
        return died

    def read(self, *, everything: bool) -> None:
        """While the others write."""
        if not (self.root / "cache" / "format.json").exists():
            return
        cache = ReferenceCache(self.root / "cache", DIGEST)
        if everything:
            assert cache.verify() == []
        asked = self.sequences if everything else self.rng.sample(self.sequences, 100)
        missing = set(cache.missing(asked))
        there = [sequence for i, sequence in enumerate(asked) if i not in missing]
        wrong = sum(
            not np.array_equal(row, known(*sequence)) for sequence, row in zip(there, cache.lookup(there), strict=True)
        )
        self.tally["numbers lost"] += wrong + max(self.most - len(cache), 0)
        assert wrong == 0
        assert len(cache) >= self.most
        self.most = len(cache)

    def finish(self) -> None:
        for process in self.running:
            process.join(300)
            assert process.exitcode == 0
        self.read(everything=True)
        assert self.most == len(self.sequences)


def under_fire(forks, root: Path, tally, *, kills: int, count: int, seed: int) -> None:
    """A cache after another, until so many writers have died at work."""
    died, rounds = 0, 0
    while died < kills:
        assert rounds <= kills
        folder = root / f"round-{rounds}"
        folder.mkdir()
        fire = Fire(forks, folder, make_sequences(count, seed + rounds), tally, seed + rounds)
        while died < kills and fire.kill_one():
            died += 1
            fire.read(everything=died % 25 == 0)
        fire.finish()
        rounds += 1


def test_several_writers_are_killed(forks, tmp_path, tally):
    under_fire(forks, tmp_path, tally, kills=10, count=3_000, seed=0)


@pytest.mark.long
@pytest.mark.parametrize("seed", [100, 200, 300, 400])
def test_several_writers_are_killed_a_hundred_times(forks, tmp_path, tally, seed):
    under_fire(forks, tmp_path, tally, kills=100, count=15_000, seed=seed)
