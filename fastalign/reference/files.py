"""Files that are either the old one or the whole new one, and say so: atomic, durable, checksummed."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from pathlib import Path
from typing import Any

from fastalign.reference.errors import DamagedFileError

TEMPORARY = ".tmp"
_STALE_SECONDS = 3600.0  # writing one file takes seconds; a temporary this old has lost its writer


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` through a temporary beside it: fsync, rename, fsync of the folder.

    A crash at any point leaves the former `path` (or none) and at most one temporary file. Raises OSError (a full disk,
    a read-only folder) with the temporary removed.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # of a write that failed; opening names its file
            error.filename = str(path)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable (POSIX; elsewhere folders cannot be synced)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_stale_temporaries(folder: Path) -> None:
    """Delete temporaries that killed writers left, sparing those that a living one may be writing."""
    for path in folder.glob(f".*{TEMPORARY}"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()
        except FileNotFoundError:
            continue  # another writer was faster


def canonical_json(content: Any) -> bytes:
    """One byte string for one value: sorted keys, no spaces, ASCII. NaN is refused (ValueError)."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomic(path, _envelope(content))


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file made by `write_json`.

    Raises:
        FileNotFoundError, or another OSError of reading.
        DamagedFileError: one byte of it is not as written.
    """
    data = path.read_bytes()
    try:
        envelope = json.loads(data)
        intact = isinstance(envelope["content"], dict) and data == _envelope(envelope["content"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DamagedFileError(path, "not readable as JSON with a checksum") from None
    if not intact:
        raise DamagedFileError(path, "its checksum does not fit its content")
    return envelope["content"]


def _envelope(content: dict[str, Any]) -> bytes:
    # indented for human readers; deterministic, so that reading can compare every byte
    envelope = {"content": content, "sha256": sha256(canonical_json(content))}
    return json.dumps(envelope, sort_keys=True, indent=1, allow_nan=False).encode("ascii") + b"\n"
