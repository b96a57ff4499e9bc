"""Appending finished rows to a cache: shards under the writer's own name, its manifest after each of them."""

from __future__ import annotations

import logging
import os
import secrets
import time
from pathlib import Path

import numpy as np

from fastalign.reference.errors import DamagedFileError
from fastalign.reference.files import file_sha256, remove_stale_temporaries
from fastalign.reference.shards import SUFFIX, Shard, ShardRecord, write_shard
from fastalign.reference.store import DAMAGED, FOLDERS, Store, write_manifest

logger = logging.getLogger(__name__)


class ShardWriter:
    """Collects rows and writes a shard whenever it is full.

    Leaving it as a context manager, also by an exception or Ctrl-C, writes what is finished; a killed process loses the
    rows of the shard it was filling and no others.

    shard_tokens: a shard is written once it holds this many log-probs; shard_seconds: or once its first row is so old.
    """

    def __init__(self, root: Path, reference: str, *, shard_tokens: int, shard_seconds: float) -> None:
        # the time makes names sort by age, the random part keeps writers of one second apart on any machine
        self.name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(6)}"
        self.root, self.reference = root, reference
        self.shard_tokens, self.shard_seconds = shard_tokens, shard_seconds
        self.records: list[ShardRecord] = []
        self.retired: dict[str, str] = {}
        self.seconds = 0.0  # spent writing
        self._count = 0
        self._clear()

    def _clear(self) -> None:
        self._keys: list[bytes] = []
        self._rows: list[np.ndarray] = []
        self._tokens = 0
        self._since = 0.0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.flush()

    def add(self, key: bytes, logps: np.ndarray) -> None:
        """One finished row: its key (16 bytes) and log-probs (n,) float32."""
        if not self._keys:
            self._since = time.monotonic()
        self._keys.append(key)
        self._rows.append(logps)
        self._tokens += len(logps)
        if self._tokens >= self.shard_tokens or time.monotonic() - self._since >= self.shard_seconds:
            self.flush()

    def flush(self) -> None:
        """Write the rows collected so far, durably. Raises OSError, naming the folder, when they cannot be written."""
        if not self._keys:
            return
        keys, rows = self._keys, self._rows
        self._clear()  # a failed write is not tried again on the way out
        start = time.perf_counter()
        self._write(self.reference, keys, rows)
        self._commit()
        self.seconds += time.perf_counter() - start

    def _write(self, reference: str, keys: list[bytes], rows: list[np.ndarray]) -> None:
        path = self.root / "shards" / f"{self.name}-{self._count:06d}{SUFFIX}"
        self._count += 1
        try:
            self.records.append(write_shard(path, reference, keys, rows))
        except OSError as error:
            raise _cannot_write(error, self.root, f"{len(keys)} finished rows") from error

    def _commit(self) -> None:
        try:
            write_manifest(self.root, self.name, self.records, self.retired)
        except OSError as error:
            raise _cannot_write(error, self.root, "the manifest") from error

    def repair(self, store: Store, damaged: dict[str, str]) -> None:
        """Put the folder in order; rows that were lost are simply missing afterwards.

        Lists unlisted shards, copies the sound rows of `damaged` shards (name → kind) and retires them, drops manifests
        that cannot be read.
        """
        for folder in ("", *FOLDERS):
            remove_stale_temporaries(self.root / folder)
        unreadable_manifests = [p.file for p in store.problems if p.file.startswith("manifests/") and p.kind == DAMAGED]
        if not (store.unlisted or damaged or unreadable_manifests):
            return
        for name, shard in store.unlisted.items():
            if name not in damaged:
                self._adopt(shard)
        for name, kind in damaged.items():
            saved = self._salvage(store.shards[name]) if name in store.shards else 0
            self.retired[name] = kind
            logger.warning(
                "%s/shards/%s is %s: %d of its rows saved, the others are computed again where they are asked for",
                self.root, name, kind, saved,
            )  # fmt: skip
        self._commit()
        for file in unreadable_manifests:  # only now: every shard it listed is listed again
            logger.warning("%s/%s could not be read; it was made again from its shards", self.root, file)
            (self.root / file).unlink(missing_ok=True)

    def _adopt(self, shard: Shard) -> None:
        path = shard.path
        size, digest = path.stat().st_size, file_sha256(path)
        self.records.append(ShardRecord(path.name, shard.reference, len(shard), shard.tokens, size, digest))

    def _salvage(self, shard: Shard) -> int:
        """Write the rows whose checksum fits to a new shard; returns how many there were."""
        keys, rows = [], []
        for index, key in enumerate(key.tobytes() for key in shard.read_keys()):
            try:
                rows.append(shard.row(index, key))
            except DamagedFileError:
                continue
            keys.append(key)
        if keys:
            self._write(shard.reference, keys, rows)
        return len(keys)


def _cannot_write(error: OSError, root: Path, what: str) -> OSError:
    number = error.errno or 0
    reason = error.strerror or os.strerror(number)
    return type(error)(
        number, f"{what} could not be written ({reason}); everything finished before is still valid", str(root)
    )
