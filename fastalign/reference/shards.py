"""One shard: an immutable safetensors file of finished rows.

    tensor    shape, dtype         content
    keys      (R, 16) uint8        sequence keys, in the order the rows were finished
    offsets   (R+1,) int64         row r holds logps[offsets[r]:offsets[r+1]]
    crc       (R,) uint32          CRC-32 of the row's key and bytes
    logps     (T,) float32         per-token log-probs, row after row

Metadata: format, version, reference (digest), logps_sha256, and index_sha256, which covers everything else. Opening a
shard checks its index; reading a row checks its CRC; `check` checks all. The manifest keeps the digest of the file.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fastalign.reference.errors import DamagedFileError
from fastalign.reference.files import canonical_json, sha256, write_atomic
from fastalign.reference.sequences import KEY_BYTES

SUFFIX = ".safetensors"
_FORMAT = "fastalign-reference-shard"
_VERSION = "1"
_DTYPES = {"keys": np.uint8, "offsets": np.int64, "crc": np.uint32, "logps": np.float32}


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A shard as its writer's manifest remembers it. sha256: of the whole file; bytes: its size."""

    file: str
    reference: str
    rows: int
    tokens: int
    bytes: int
    sha256: str


def is_plain_name(name: object) -> bool:
    """Whether a name that a file gave stays inside its folder: caches may come from anywhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0", ":"}


def row_crc(key: bytes, logps: np.ndarray) -> int:
    return zlib.crc32(logps.data, zlib.crc32(key))


def write_shard(path: Path, reference: str, keys: list[bytes], rows: list[np.ndarray]) -> ShardRecord:
    """Write finished rows, durably, under a name that must be new. keys: 16 bytes each; rows: float32 (n,), n ≥ 1."""
    rows = [np.ascontiguousarray(row, "<f4") for row in rows]
    lengths = np.array([len(row) for row in rows], np.int64)
    tensors = {
        "keys": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES),
        "offsets": np.concatenate([np.zeros(1, np.int64), lengths.cumsum()]),
        "crc": np.array([row_crc(key, row) for key, row in zip(keys, rows, strict=True)], np.uint32),
        "logps": np.concatenate(rows),
    }
    metadata = {"format": _FORMAT, "version": _VERSION, "reference": reference}
    metadata["logps_sha256"] = sha256(tensors["logps"].data.cast("B"))
    metadata["index_sha256"] = _index_sha256(metadata, tensors)
    data = save(tensors, metadata)
    write_atomic(path, data)
    return ShardRecord(path.name, reference, len(rows), int(lengths.sum()), len(data), sha256(data))


def _index_sha256(metadata: dict[str, str], tensors: dict[str, np.ndarray]) -> str:
    parts = [canonical_json({name: value for name, value in metadata.items() if name != "index_sha256"})]
    parts += [tensors[name].tobytes() for name in ("keys", "offsets", "crc")]
    return sha256(b"".join(parts))


class Shard:
    """An open shard: its index in memory (keys are read again when asked for), its log-probs memory-mapped.

    Raises DamagedFileError, naming the file, when it is not a shard as written; OSError when it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # safe_open maps the file and keeps no descriptor: thousands of shards cost none
            self._file = safe_open(path, framework="numpy")
            self.metadata: dict[str, str] = dict(self._file.metadata() or {})
            tensors = {name: self._file.get_tensor(name) for name in ("keys", "offsets", "crc")}
            self._logps: Any = self._file.get_slice("logps")
            self.tokens = self._checked_shapes(tensors)
        except OSError:
            raise
        except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedFileError(path, f"not a readable shard ({' '.join(str(error).split())})") from None
        if self.metadata.get("index_sha256") != _index_sha256(self.metadata, tensors):
            raise DamagedFileError(path, "the checksum of its index does not fit")
        if (self.metadata.get("format"), self.metadata.get("version")) != (_FORMAT, _VERSION):
            raise DamagedFileError(path, f"its format is {self.metadata.get('format')} {self.metadata.get('version')}")
        self.reference = self.metadata.get("reference", "")
        if not is_plain_name(self.reference):
            raise DamagedFileError(path, f"the reference it names is {self.reference!r}, no digest")
        self._offsets: np.ndarray = tensors["offsets"]
        self._crc: np.ndarray = tensors["crc"]

    def _checked_shapes(self, tensors: dict[str, np.ndarray]) -> int:
        rows = len(tensors["crc"])
        (tokens,) = self._logps.get_shape()
        shapes = {"keys": (rows, KEY_BYTES), "offsets": (rows + 1,), "crc": (rows,)}
        for name, tensor in tensors.items():
            if tensor.shape != shapes[name] or tensor.dtype != _DTYPES[name]:
                raise ValueError(f"{name} is {tensor.dtype} {tensor.shape}")
        if tensors["offsets"][0] != 0 or (np.diff(tensors["offsets"]) < 1).any():
            raise ValueError("its offsets do not ascend from 0")
        if self._logps.get_dtype() != "F32" or tensors["offsets"][-1] != tokens:
            raise ValueError(f"logps is {self._logps.get_dtype()} of {tokens}, offsets end at {tensors['offsets'][-1]}")
        return tokens

    def __len__(self) -> int:
        return len(self._crc)

    def read_keys(self) -> np.ndarray:
        """(R, 16) uint8."""
        return self._file.get_tensor("keys")

    def row(self, index: int | np.integer, key: bytes) -> np.ndarray:
        """Log-probs (n,) float32 of one row, a copy. Raises DamagedFileError if they are not as written for `key`."""
        values: np.ndarray = self._logps[self._offsets.item(index) : self._offsets.item(index + 1)]
        if row_crc(key, values) != self._crc[index]:
            raise DamagedFileError(self.path, f"the checksum of its row {index} does not fit")
        return values

    def check(self) -> None:
        """Read everything. Raises DamagedFileError naming the first damaged row, or the log-probs as a whole."""
        for index, key in enumerate(self.read_keys()):
            self.row(index, key.tobytes())
        if sha256(self._file.get_tensor("logps").data.cast("B")) != self.metadata.get("logps_sha256"):
            raise DamagedFileError(self.path, "the checksum of its log-probs does not fit")
