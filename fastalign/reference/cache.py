"""Reference log-probs on disk, by content: computed once for every loss, beta, adapter, data mixture and run."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastalign.reference.builder import BuildOptions, BuildReport, fill_store
from fastalign.reference.errors import CacheError, DamagedFileError, MissingLogpsError
from fastalign.reference.files import write_json
from fastalign.reference.identity import differences, identity_digest
from fastalign.reference.index import KeyIndex
from fastalign.reference.memo import IdentityMemo
from fastalign.reference.model import ReferenceModel
from fastalign.reference.report import CacheSummary, summarize
from fastalign.reference.scoring import DEFAULT_BATCH_TOKENS
from fastalign.reference.sequences import KEY_BYTES, Scorer, TokenSequence, sequence_keys
from fastalign.reference.store import Problem, Store, check_format, create_store

logger = logging.getLogger(__name__)

DEFAULT_SHARD_TOKENS = 4_194_304  # 16 MiB of log-probs
DEFAULT_SHARD_SECONDS = 120.0


class ReferenceCache:
    """Log-probs of one reference in a cache's folder, which may hold those of several. Make one with `build` or `open`.

    A row's key is the digest of (reference, token ids, completion start); its value the float32 log-probs of the
    completion's tokens, so that sums, means and per-token losses share it. A look-up checks every row it returns
    against the checksum it was written with: the answer is the number that was computed, or an error.

    Several processes may build into one folder at once; `reload` shows what others finished. Pickled, as for the
    workers of a DataLoader, it is opened again. Shards must not be changed by other means while they are mapped: a
    file that is truncated under its mapping kills the process that reads it (SIGBUS), as with any memory map.

    Attributes: path; reference: the digest; report: a BuildReport after `build`, else None.
    """

    def __init__(self, path: str | Path, reference: str) -> None:
        self.path = Path(path)
        self.reference = reference
        self.report: BuildReport | None = None
        self.reload()

    def reload(self) -> None:
        """Read the folder afresh: rows that other processes finished since appear."""
        self._store = Store(self.path, self.reference)
        self._index = KeyIndex(list(self._store.shards.values()))
        for problem in self._store.problems:
            logger.warning("%s/%s; it is left out", self.path, problem)

    def __len__(self) -> int:
        """Distinct rows of this reference."""
        return self._index.distinct()

    def __repr__(self) -> str:
        return f"ReferenceCache({str(self.path)!r}, reference={self.reference[:12]}…, rows={len(self)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return ReferenceCache, (self.path, self.reference)

    @classmethod
    def open(cls, cache_dir: str | Path, reference: ReferenceModel | str | None = None) -> ReferenceCache:
        """Open a cache for reading; a read-only folder will do.

        reference: the model (from a checkpoint whose digest is remembered it is not loaded), its digest, or None if the
        folder holds one reference. Raises CacheError (a ValueError) if there is no cache, or not that reference in it:
        then it says in what the nearest one differs.
        """
        path = Path(cache_dir)
        check_format(path)
        if isinstance(reference, ReferenceModel):
            identity = reference.identity(IdentityMemo(path))
            cache = cls(path, identity_digest(identity))
            if not len(cache):
                reason = _nearest(cache._store, identity) + _left_out(cache._store)
                raise CacheError(f"{path} holds nothing of {reference.source}{reason}")
            return cache
        store = Store(path)
        known = store.references()
        if reference is None and len(known) == 1:
            reference = known[0]
        if reference is None or reference not in known:
            asked = "name one of them" if reference is None else f"{reference!r} is not among them"
            raise CacheError(f"{path} holds {len(known)} references: {', '.join(known) or 'none'}; {asked}")
        return cls(path, reference)

    @classmethod
    def build(
        cls, cache_dir: str | Path, reference: ReferenceModel | str, sequences: Iterable[TokenSequence], *,
        score: Scorer | None = None, batch_tokens: int = DEFAULT_BATCH_TOKENS, shard_tokens: int = DEFAULT_SHARD_TOKENS,
        shard_seconds: float = DEFAULT_SHARD_SECONDS, progress: bool = True,
    ) -> ReferenceCache:  # fmt: skip
        """Make sure that every sequence is cached: compute the missing ones, each once, and return the open cache.

        cache_dir: a cache, or a new or empty folder.
        reference: the model; loaded only if rows are missing, and let go afterwards. Or the digest (64 hexadecimal
            digits) of whatever `score` computes: a function from a list of sequences to their log-probs.
        sequences: (input_ids, completion_start) each. A sequence type with len() and [i] is read as needed and never
            copied; another iterable is held in memory.
        batch_tokens: computed tokens of a batch. shard_tokens, shard_seconds: a shard is written when it holds that
            many log-probs or its first row is that old; a killed build loses no more than that.
        Damaged shards are rebuilt: their sound rows are kept, the others computed again if they are asked for.

        Raises ValueError for invalid sequences and for log-probs that are not finite or not one per completion token
        (what was finished before is kept); CacheError if the folder is something else; OSError if it cannot be
        written.
        """
        options = BuildOptions(batch_tokens, shard_tokens, shard_seconds, progress)
        path = Path(cache_dir)
        create_store(path)
        identity, digest, source = _identify(reference, score, path)
        cache = cls(path, digest)
        cache._describe(identity, source)
        if identity is not None and not len(cache):
            logger.info("%s holds nothing of %s%s", path, source, _nearest(cache._store, identity))
        rows = sequences if isinstance(sequences, Sequence) else list(sequences)
        report = fill_store(cache._store, cache._index, digest, rows, lambda: _scorer(reference, score), options)
        if report.computed or cache._store.problems or cache._store.unlisted:
            cache.reload()
        cache.report = report
        return cache

    def lookup(self, sequences: Iterable[TokenSequence]) -> list[np.ndarray]:
        """Log-probs of each sequence's completion: float32 (len(input_ids) − completion_start,), in order, as copies.

        Raises MissingLogpsError (a ValueError; `.indices`) naming how many sequences are not cached and the first of
        them, DamagedFileError naming the shard when a row is not what was written.
        """
        keys, lengths, completions = sequence_keys(self.reference, sequences)
        positions = self._index.find(keys)
        if (positions < 0).any():
            raise self._missing_error(np.flatnonzero(positions < 0), lengths, completions)
        data = keys.tobytes()
        return [
            self._index.read(position, data[index * KEY_BYTES : (index + 1) * KEY_BYTES])
            for index, position in enumerate(positions.tolist())
        ]

    def missing(self, sequences: Iterable[TokenSequence]) -> list[int]:
        """Positions of the sequences that are not cached."""
        keys, _, _ = sequence_keys(self.reference, sequences)
        return np.flatnonzero(self._index.find(keys) < 0).tolist()

    def verify(self) -> list[Problem]:
        """Read every byte in the folder, other references' too; returns what is wrong. An empty list: all is well."""
        return Store(self.path).verify()

    def inspect(self) -> CacheSummary:
        """What the folder holds, other references too."""
        return summarize(Store(self.path))

    def _missing_error(self, indices: np.ndarray, lengths: np.ndarray, completions: np.ndarray) -> MissingLogpsError:
        first = int(indices[0])
        message = (
            f"{len(indices)} of {len(lengths)} sequences have no reference log-probs in {self.path}; the first is "
            f"sequence {first} ({lengths[first]} tokens, the last {completions[first]} of them the completion): "
            "build the cache with these sequences"
        )
        return MissingLogpsError(message + _left_out(self._store), indices.tolist())

    def _describe(self, identity: dict[str, Any] | None, source: str) -> None:
        """Write references/<digest>.json, unless it is there and sound."""
        try:
            self._store.description(self.reference)
        except (FileNotFoundError, DamagedFileError):
            created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            content = {"identity": identity, "source": source, "created": created}
            write_json(self.path / "references" / f"{self.reference}.json", content)


def _identify(
    reference: ReferenceModel | str, score: Scorer | None, path: Path
) -> tuple[dict[str, Any] | None, str, str]:
    """(identity, digest, source in words); the identity is None for a reference given by its digest."""
    if isinstance(reference, ReferenceModel):
        if score is not None:
            raise ValueError("score goes with a reference given by its digest; a ReferenceModel scores itself")
        identity = reference.identity(IdentityMemo(path))
        return identity, identity_digest(identity), reference.source
    if score is None:
        raise ValueError("a reference given by its digest needs score=, the function that computes its log-probs")
    if len(reference) != 64 or set(reference) - set("0123456789abcdef"):
        raise ValueError(f"a reference digest is 64 lower-case hexadecimal digits, got {reference!r}")
    return None, reference, "given by its digest"


@contextmanager
def _scorer(reference: ReferenceModel | str, score: Scorer | None) -> Iterator[Scorer]:
    if isinstance(reference, ReferenceModel):
        try:
            with reference.scorer() as scorer:
                yield scorer
        finally:
            reference.release()
    else:
        assert score is not None
        yield score


def _left_out(store: Store) -> str:
    return f". Left out: {'; '.join(map(str, store.problems))}" if store.problems else ""


def _nearest(store: Store, identity: dict[str, Any]) -> str:
    """In what the most similar reference in the folder differs from `identity`, as the end of a sentence."""
    found = []
    for digest in store.references():
        try:
            content = store.description(digest)
        except (OSError, DamagedFileError):
            continue  # verify names it; here it has nothing to say
        if content.get("identity"):
            found.append((differences(content["identity"], identity), content.get("source")))
    if not found:
        return ""
    changes, source = min(found, key=lambda item: len(item[0]))
    return f"; the nearest there, {source}, differs in {', '.join(changes[:5])}" + (" …" if len(changes) > 5 else "")
