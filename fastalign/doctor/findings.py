"""What an examination found: one line a check."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

OK, FAILED, SKIPPED = "ok", "failed", "left out"


class Finding(NamedTuple):
    """A check, what became of it ("ok", "failed", "left out"), and figures or the reason."""

    check: str
    status: str
    detail: str


def compare(check: str, difference: float, tolerance: float, what: str) -> Finding:
    """Whether a difference is within its tolerance; nan is not."""
    status = OK if difference <= tolerance else FAILED
    return Finding(check, status, f"{what}: {difference:.2e}, accepted are {tolerance:.2e}")


def guarded(check: str, run: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a check that may break: what it raises is a finding as well."""
    try:
        yield from run()
    except Exception as error:
        yield Finding(check, FAILED, f"{type(error).__name__}: {' '.join(str(error).split())}")


def render(findings: Sequence[Finding]) -> str:
    """Text for a terminal: a line a finding, then how many failed."""
    width = max((len(finding.check) for finding in findings), default=0)
    lines = [f"{finding.status:8}  {finding.check:{width}}  {finding.detail}" for finding in findings]
    failed = sum(finding.status == FAILED for finding in findings)
    skipped = sum(finding.status == SKIPPED for finding in findings)
    lines.append(f"{len(findings)} checks, {failed} failed, {skipped} left out")
    return "\n".join(lines) + "\n"


def as_dicts(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    return [finding._asdict() for finding in findings]
