"""`fastalign cache inspect` and `verify`: what a cache holds and what is wrong with it, as data and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastalign.reference.errors import DamagedFileError
from fastalign.reference.index import KeyIndex
from fastalign.reference.shards import SUFFIX
from fastalign.reference.store import Problem, Store

__all__ = ["CacheSummary", "ReferenceSummary", "inspect", "render_problems", "render_summary", "summarize", "verify"]


@dataclass(frozen=True, slots=True)
class ReferenceSummary:
    """The rows of one reference.

    rows: distinct; duplicates: rows that two writers both computed; tokens: log-probs stored.
    source, created, identity: from its description; None where that is missing or damaged.
    """

    digest: str
    source: str | None
    created: str | None
    identity: dict[str, Any] | None
    rows: int
    duplicates: int
    tokens: int
    bytes: int
    shards: int


@dataclass(frozen=True, slots=True)
class CacheSummary:
    """A cache's folder. retired: shards that were damaged and have been replaced; their files can be deleted."""

    path: str
    references: list[ReferenceSummary]
    retired: list[str]
    problems: list[Problem]

    @property
    def rows(self) -> int:
        return sum(reference.rows for reference in self.references)

    @property
    def bytes(self) -> int:
        return sum(reference.bytes for reference in self.references)


def inspect(cache_dir: str | Path) -> CacheSummary:
    """What a cache holds. Indexes are read and checked, log-probs are not. Raises CacheError if there is no cache."""
    return summarize(Store(Path(cache_dir)))


def verify(cache_dir: str | Path) -> list[Problem]:
    """Read every byte of a cache; returns what is wrong, file by file. Raises CacheError if there is no cache."""
    return Store(Path(cache_dir)).verify()


def summarize(store: Store) -> CacheSummary:
    present = {path.name for path in (store.root / "shards").glob(f"*{SUFFIX}")}
    return CacheSummary(
        path=str(store.root),
        references=[_summarize_reference(store, digest) for digest in store.references()],
        retired=sorted(name for name in store.retired if name in present and name not in store.shards),
        problems=store.problems,
    )


def _summarize_reference(store: Store, digest: str) -> ReferenceSummary:
    shards = [shard for shard in store.shards.values() if shard.reference == digest]
    index = KeyIndex(shards)
    try:
        about = store.description(digest)
    except (OSError, DamagedFileError):
        about = {}
    rows = index.distinct()
    return ReferenceSummary(
        digest=digest, source=about.get("source"), created=about.get("created"), identity=about.get("identity"),
        rows=rows, duplicates=len(index) - rows, tokens=sum(shard.tokens for shard in shards),
        bytes=sum(shard.path.stat().st_size for shard in shards), shards=len(shards),
    )  # fmt: skip


def render_summary(summary: CacheSummary) -> str:
    """Text for a terminal or a log."""
    table = Table(title=f"reference cache {summary.path}", title_justify="left")
    table.add_column("reference", overflow="fold")
    for column in ("rows", "tokens", "size", "shards"):
        table.add_column(column, justify="right", no_wrap=True)
    for reference in summary.references:
        table.add_row(
            _reference_text(reference), f"{reference.rows:,}", f"{reference.tokens:,}", _size(reference.bytes),
            f"{reference.shards:,}",
        )  # fmt: skip
    notes: list[RenderableType] = [table]
    if not summary.references:
        notes = [Text(f"reference cache {summary.path}: empty")]
    if summary.retired:
        notes.append(Text(f"replaced, can be deleted: {', '.join(f'shards/{name}' for name in summary.retired)}"))
    if summary.problems:
        notes.append(Text(render_problems(summary.problems).rstrip("\n")))
    return _to_text(Group(*notes))


def render_problems(problems: Sequence[Problem]) -> str:
    """Text for a terminal or a log: one line a problem, or that there is none."""
    if not problems:
        return "no problems found\n"
    lines = [
        f"{len(problems)} problem{'s' if len(problems) > 1 else ''} found",
        *(f"  {problem}" for problem in problems),
    ]
    return "\n".join(lines) + "\n"


def _reference_text(reference: ReferenceSummary) -> str:
    identity = reference.identity or {}
    head = identity.get("head", {})
    facts = [identity.get("dtype"), identity.get("attention")]
    facts += [f"autocast {identity['autocast']}"] if identity.get("autocast") else []
    facts += ["with adapter"] if identity.get("adapter") else []
    facts += [f"temperature {head['temperature']}"] if head.get("temperature", 1.0) != 1.0 else []
    lines = [
        reference.digest[:16],
        reference.source or "no description",
        ", ".join(str(fact) for fact in facts if fact),
    ]
    return "\n".join(line for line in lines if line)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def _to_text(renderable: RenderableType) -> str:
    console = Console(width=None if Console().is_terminal else 120, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()
