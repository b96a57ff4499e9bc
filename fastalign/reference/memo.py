"""Model identities remembered by the files they were computed from, so that weights are hashed once."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Any

import peft
import transformers

from fastalign.reference.errors import DamagedFileError
from fastalign.reference.files import canonical_json, read_json, sha256, write_json

logger = logging.getLogger(__name__)

MEMO_FILE = "weights.json"
# what a loaded model can depend on: weights, their index, configurations, remote code
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json", ".py")

FileIdentities = dict[str, list[int]]


def file_identities(folders: list[Path]) -> FileIdentities:
    """Real path → [size, mtime_ns, inode, ctime_ns] of every file in the folders that a load may read.

    The change time is there because copying tools restore the modification time, and nothing can restore that one.
    """
    identities = {}
    for folder in folders:
        for path in folder.iterdir():
            if path.suffix in _SUFFIXES and path.is_file():
                stat = path.stat()  # follows links: the hub's snapshots are links to blobs
                identities[str(path.resolve())] = [stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns]
    return identities


def memo_key(files: FileIdentities, arguments: dict[str, Any]) -> str:
    """Digest of the files' identities and of all that decides what a load makes of them."""
    versions = {"transformers": transformers.__version__, "peft": peft.__version__}
    return sha256(canonical_json({"files": files, "arguments": arguments, "versions": versions}))


class IdentityMemo:
    """weights.json in a cache's folder. Losing it costs a hash, never a number: a damaged one is started afresh."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / MEMO_FILE

    def get(self, key: str) -> dict[str, Any] | None:
        return self._read().get(key)

    def put(self, key: str, identity: dict[str, Any]) -> None:
        try:
            # another process may write in between; the loser's entry is then computed once more
            write_json(self._path, {**self._read(), key: identity})
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOENT):
                raise
            logger.warning("%s cannot be written (%s): the weights will be hashed again", self._path, error.strerror)

    def _read(self) -> dict[str, Any]:
        try:
            return read_json(self._path)
        except FileNotFoundError:
            return {}
        except DamagedFileError as error:
            logger.warning("%s; it is started afresh", error)
            return {}
