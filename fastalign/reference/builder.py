"""One build: find out which sequences are missing, compute them batch by batch, write them as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastalign.models.batches import plan_scoring
from fastalign.reference.batches import PromptNotes
from fastalign.reference.errors import DamagedFileError, UnscorableError
from fastalign.reference.index import KeyIndex, first_occurrences
from fastalign.reference.progress import track
from fastalign.reference.sequences import Scorer, TokenSequence, sequence_keys
from fastalign.reference.store import DAMAGED, Store
from fastalign.reference.writer import ShardWriter


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """See `ReferenceCache.build`. Raises ValueError for numbers that are not positive."""

    batch_tokens: int
    shard_tokens: int
    shard_seconds: float
    progress: bool

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "shard_tokens", "shard_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What a build did.

    rows: sequences asked for; distinct: without duplicates; cached: distinct ones found; computed: the others, with
    `tokens` log-probs. Seconds: in all, in the scorer, in writing and syncing files.
    """

    rows: int
    distinct: int
    cached: int
    computed: int
    tokens: int
    seconds: float
    scoring_seconds: float
    writing_seconds: float


def fill_store(
    store: Store, index: KeyIndex, digest: str, sequences: Sequence[TokenSequence],
    open_scorer: Callable[[], AbstractContextManager[Scorer]], options: BuildOptions,
) -> BuildReport:  # fmt: skip
    """Repair `store`, then add the rows of the sequences that it lacks. The scorer is opened only if there are any."""
    start = time.perf_counter()
    build = _Build(store, index, digest, sequences)
    writer = ShardWriter(store.root, digest, shard_tokens=options.shard_tokens, shard_seconds=options.shard_seconds)
    writer.repair(store, build.damaged)
    if build.missing.size:
        with open_scorer() as score, writer:
            build.run(score, writer, options)
    return BuildReport(
        rows=len(build.keys), distinct=build.distinct, cached=build.distinct - len(build.missing),
        computed=build.computed,
        tokens=build.tokens, seconds=time.perf_counter() - start, scoring_seconds=build.scoring_seconds,
        writing_seconds=writer.seconds,
    )  # fmt: skip


class _Build:
    """missing (m,) int64: the first positions of the distinct sequences to compute. damaged: shards to rebuild."""

    def __init__(self, store: Store, index: KeyIndex, digest: str, sequences: Sequence[TokenSequence]) -> None:
        self._digest, self._sequences = digest, sequences
        notes = PromptNotes(sequences)
        self.keys, self._lengths, self._completions = sequence_keys(digest, notes)
        self._prompts = notes.prompts
        self.damaged = store.damaged()
        self.scoring_seconds, self.computed, self.tokens = 0.0, 0, 0
        first = first_occurrences(self.keys)
        self.distinct = len(first)
        self.missing = self._unusable(index, first)

    def _key(self, position: int) -> bytes:
        return self.keys[position].tobytes()

    def _unusable(self, index: KeyIndex, positions: np.ndarray) -> np.ndarray:
        """Those that are not cached, or damaged. Rows are read here, so that no training finds out later."""
        missing = []
        for position, place in zip(positions.tolist(), index.find(self.keys[positions]).tolist(), strict=True):
            try:
                if place >= 0:
                    index.read(place, self._key(position))
                    continue
            except DamagedFileError as error:
                self.damaged[Path(error.path).name] = DAMAGED
            missing.append(position)
        return np.array(missing, np.int64)

    def run(self, score: Scorer, writer: ShardWriter, options: BuildOptions) -> None:
        lengths, completions, prompts = (
            of_all[self.missing] for of_all in (self._lengths, self._completions, self._prompts)
        )
        layout = getattr(score, "token_layout", "padded")
        batches = plan_scoring(lengths, completions, prompts, options.batch_tokens, layout)
        with track(int(lengths.sum()), "reference log-probs", options.progress) as advance:
            for batch in batches:
                self._run_batch(score, writer, self.missing[batch].tolist())
                advance(int(lengths[batch].sum()), len(batch))

    def _run_batch(self, score: Scorer, writer: ShardWriter, positions: list[int]) -> None:
        batch = [TokenSequence(*self._sequences[position]) for position in positions]
        keys, _, _ = sequence_keys(self._digest, batch)
        if changed := np.flatnonzero((keys != self.keys[positions]).any(axis=1)).tolist():
            raise ValueError(
                f"sequence {positions[changed[0]]} is not the same at every reading; a cache needs fixed sequences"
            )
        start = time.perf_counter()
        results = score(batch)
        self.scoring_seconds += time.perf_counter() - start
        if len(results) != len(positions):
            raise ValueError(f"score returned {len(results)} results for {len(positions)} sequences")
        for position, logps in zip(positions, results, strict=True):
            writer.add(self._key(position), self._checked(logps, position))

    def _checked(self, logps: np.ndarray, position: int) -> np.ndarray:
        logps = np.asarray(logps)
        expected = (int(self._completions[position]),)
        if logps.shape != expected or logps.dtype != np.float32:
            raise ValueError(
                f"sequence {position}: score returned {logps.dtype} {logps.shape}, expected float32 {expected}, one "
                "log-prob per token of the completion"
            )
        if not np.isfinite(logps).all():
            token = int(np.flatnonzero(~np.isfinite(logps))[0])
            raise UnscorableError(
                position,
                f"the reference's log-prob of completion token {token} is {logps[token]}: the model overflows, "
                "or gives that token no probability at all",
            )
        self.computed += 1
        self.tokens += len(logps)
        return logps
