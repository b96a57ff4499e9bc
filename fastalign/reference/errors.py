"""What can be wrong with a cache. All are ValueErrors: the message says which file or sequence, and what to do."""

from __future__ import annotations

from os import PathLike


class CacheError(ValueError):
    """A folder that is no reference cache, or one of another format."""


class DamagedFileError(CacheError):
    """A file of the cache is not what was written. `path`: the file; `what`: what is wrong with it."""

    def __init__(self, path: str | PathLike[str], what: str) -> None:
        super().__init__(f"{path}: {what}")
        self.path = str(path)
        self.what = what


class MissingLogpsError(CacheError):
    """Sequences without cached log-probs. `indices`: their positions in the call, ascending."""

    def __init__(self, message: str, indices: list[int]) -> None:
        super().__init__(message)
        self.indices = indices


class UnscorableError(ValueError):
    """A sequence whose log-probs are no numbers. `index`: its position in the call."""

    def __init__(self, index: int, what: str) -> None:
        super().__init__(f"sequence {index}: {what}")
        self.index, self.what = index, what
