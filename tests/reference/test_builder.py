"""Builds that are killed. The processes come from a fork server, which imports the package once."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time

import pytest

from fastalign.reference import ReferenceCache
from fastalign.reference.builder import BuildOptions

# Runs in the process that is killed: builds the cache and writes down what was handed to it, one line a batch.
BUILD = """
import os
import numpy as np
from fastalign.reference import ReferenceCache
os.fsync = lambda descriptor: None  # a kill is no power cut
journal = os.open(journal_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def score(batch):
    os.write(journal, f"{sum(len(ids) - start for ids, start in batch)}\\n".encode())
    return [row(np.asarray(ids, np.int64), start) for ids, start in batch]

def row(ids, start):
    return (-(ids.cumsum() % 997) / 8 - start)[start:].astype(np.float32)

options = {"shard_tokens": shard_tokens, "batch_tokens": batch_tokens, "progress": False}
ReferenceCache.build(cache_path, digest, sequences, score=score, **options)
"""
SHARD_TOKENS = 150
BATCH_TOKENS = 40


class Killer:
    """Starts builds of `sequences` and kills them after a random time."""

    def __init__(self, forks, root, digest, sequences, seed: int = 0) -> None:
        self.forks, self.root, self.digest, self.sequences = forks, root, digest, sequences
        self.rng = random.Random(seed)

    def start(self, journal: str = "journal"):
        values = {
            "cache_path": str(self.root / "cache"),
            "journal_path": str(self.root / journal),
            "digest": self.digest,
        }
        values |= {"sequences": [tuple(sequence) for sequence in self.sequences]}
        values |= {"shard_tokens": SHARD_TOKENS, "batch_tokens": BATCH_TOKENS}
        process = self.forks.Process(target=exec, args=(BUILD, values))
        process.start()
        return process

    def kill(self, process, most_batches: int) -> bool:
        """Kill it at a random moment after a random number of batches; True if it was still at work."""
        batches, deadline = self.rng.randint(1, most_batches), time.monotonic() + 60
        while process.is_alive() and self.batches_started() < batches:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(self.rng.uniform(0, 0.02))  # into the middle of a write, now and then
        kill(process)
        process.join()
        return process.exitcode == -signal.SIGKILL

    def batches_started(self) -> int:
        journal = self.root / "journal"
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    def tokens_started(self) -> int:
        """Log-probs that were being computed or finished when the process died."""
        journal = self.root / "journal"
        tokens = sum(int(line) for line in journal.read_text().splitlines()) if journal.exists() else 0
        journal.unlink(missing_ok=True)
        return tokens


def kill(process) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has finished
        os.kill(process.pid, signal.SIGKILL)


def tokens_cached(cache: ReferenceCache) -> int:
    return sum(reference.tokens for reference in cache.inspect().references)


def kill_until_done(killer: Killer, kills: int, most_batches: int, scorer) -> int:
    """Kill builds, checking the cache after each; then let one finish. Returns how many died at work."""
    before = died = 0
    for _ in range(kills):
        died += killer.kill(killer.start(), most_batches)
        started = killer.tokens_started()
        if not (killer.root / "cache" / "format.json").exists():
            continue  # killed before anything was written
        cache = ReferenceCache(killer.root / "cache", killer.digest)
        # a kill between the two renames leaves a shard that no manifest lists: still sound, still used
        assert cache.verify() == []
        missing = set(cache.missing(killer.sequences))
        scorer.assert_right(cache, [sequence for i, sequence in enumerate(killer.sequences) if i not in missing])
        after = tokens_cached(cache)
        # what is lost: the shard being written, and the batch being scored
        assert after - before >= started - SHARD_TOKENS - 2 * BATCH_TOKENS
        before = after
    last = killer.start()
    last.join(120)
    assert last.exitcode == 0
    cache = ReferenceCache.open(killer.root / "cache")
    assert cache.verify() == []
    scorer.assert_right(cache, killer.sequences)
    assert cache.inspect().references[0].duplicates == 0  # nothing finished was computed again
    return died


def test_kill_9_loses_at_most_the_shard_being_written(tmp_path, forks, digest, scorer, make_sequences):
    killer = Killer(forks, tmp_path, digest, make_sequences(1200))
    assert kill_until_done(killer, kills=6, most_batches=40, scorer=scorer) >= 3


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_many_kills(tmp_path, forks, digest, scorer, make_sequences, seed):
    killer = Killer(forks, tmp_path, digest, make_sequences(20_000, seed=seed), seed)
    assert kill_until_done(killer, kills=50, most_batches=40, scorer=scorer) >= 40


def test_several_processes_build_at_once(tmp_path, forks, digest, scorer, make_sequences):
    """Three builds of overlapping sequences into one new folder, one of them killed."""
    sequences = make_sequences(300)
    builders = [Killer(forks, tmp_path, digest, part) for part in (sequences[:200], sequences[100:], sequences)]
    running = [builder.start(f"journal-{i}") for i, builder in enumerate(builders)]
    while running[2].is_alive() and not (tmp_path / "journal-2").exists():
        time.sleep(0.001)
    kill(running[2])
    for process in running:
        process.join(120)
    assert [process.exitcode for process in running[:2]] == [0, 0]
    cache = ReferenceCache.open(tmp_path / "cache", digest)
    assert cache.verify() == []
    scorer.assert_right(cache, sequences)
    assert len(cache) == 300


def test_options_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"shard_seconds must be positive, got -1\.0"):
        BuildOptions(batch_tokens=1, shard_tokens=1, shard_seconds=-1.0, progress=False)
