"""What happened to the rows of a data set: which were refused and why, which were dropped, what was truncated.

Neither reasons nor details quote a row's text: reports end up in logs, and preference data may be private or offensive.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

LISTED_BAD_ROWS = 10


class Reason(StrEnum):
    """Why a row is bad: the one list behind the checks, the counts and the messages."""

    UNREADABLE = "unreadable record"
    MISSING_KEY = "missing key"
    WRONG_TYPE = "wrong type"
    WRONG_ROLE = "wrong role"
    UNSUPPORTED = "unsupported content"
    NO_COMMON_PROMPT = "no common prompt"
    EMPTY_PROMPT = "empty prompt"
    EMPTY_RESPONSE = "empty response"
    EXTRA_TURNS = "more than one turn after the prompt"
    IDENTICAL = "identical responses"
    TEMPLATE = "refused by the chat template"
    TEMPLATE_PREFIX = "prompt is not a prefix in the chat template"
    BOUNDARY = "no safe token boundary"


class RowError(ValueError):
    """A row that cannot be used; `detail` says where in the row, never what the text is."""

    def __init__(self, reason: Reason, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class BadRow(NamedTuple):
    """`row` is the 0-based number in the source data set, before any split slice, shuffling or skipping."""

    row: int
    reason: Reason
    detail: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.reason} ({self.detail})"


@dataclass(kw_only=True)
class DataReport:
    """The account of one prepared data set; `read == kept + len(bad) + sum(dropped.values())`.

    source                  name of the data set, as given
    read, kept              rows read; rows that became examples
    bad                     one entry per refused row, in row order
    dropped                 rows dropped by the length limit: `long_prompt` (the prompt left no room for a response),
                            `identical_after_truncation` (the responses differ only beyond the limit) and
                            `nothing_to_train_on` (no token that is trained on is within the limit)
    formats                 how the kept rows were understood, e.g. {"transcript as chat": 1595}
    truncated_prompts       kept rows whose prompt lost its beginning
    truncated_chosen, truncated_rejected    kept rows whose response lost its end
    truncated_completions   kept rows to learn from by cross-entropy that lost tokens after the prompt, if they have one
    merged_boundaries       kept responses encoded apart because tokens would have merged across the prompt's end
    without_eos             kept, untruncated responses without the end-of-sequence token: they teach no stopping
    """

    source: str
    read: int = 0
    kept: int = 0
    bad: list[BadRow] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    truncated_prompts: int = 0
    truncated_chosen: int = 0
    truncated_rejected: int = 0
    truncated_completions: int = 0
    merged_boundaries: int = 0
    without_eos: int = 0

    @property
    def bad_by_reason(self) -> dict[str, int]:
        """Number of bad rows by reason, the most frequent first."""
        return {str(reason): count for reason, count in Counter(bad.reason for bad in self.bad).most_common()}

    def as_dict(self) -> dict[str, Any]:
        """Counts only, ready for JSON."""
        names = (
            "truncated_prompts", "truncated_chosen", "truncated_rejected", "truncated_completions",
            "merged_boundaries", "without_eos",
        )  # fmt: skip
        return {
            "source": self.source,
            "read": self.read,
            "kept": self.kept,
            "bad": self.bad_by_reason,
            "dropped": dict(self.dropped),
            "formats": dict(self.formats),
            **{name: getattr(self, name) for name in names},
        }

    def __str__(self) -> str:
        parts = [f"{self.source}: {self.kept} of {self.read} rows kept ({_counts(self.formats) or 'none'})"]
        if self.bad:
            parts.append(f"{len(self.bad)} bad rows skipped: {_counts(self.bad_by_reason)}")
        if self.dropped:
            parts.append(f"dropped: {_counts(self.dropped)}")
        truncated = {"prompts": self.truncated_prompts, "chosen": self.truncated_chosen}
        truncated |= {"rejected": self.truncated_rejected, "completions": self.truncated_completions}
        if any(truncated.values()):
            parts.append(f"truncated: {_counts(truncated)}")
        if self.merged_boundaries:
            parts.append(f"{self.merged_boundaries} responses encoded apart from their prompt")
        if self.without_eos:
            parts.append(f"{self.without_eos} responses without the end-of-sequence token")
        return "; ".join(parts)


class BadRowsError(ValueError):
    """Raised up front with on_bad_row="error". `report` holds every bad row; the message lists the first ten."""

    def __init__(self, report: DataReport):
        bad = report.bad
        listed = "".join(f"\n  {row}" for row in bad[:LISTED_BAD_ROWS])
        more = f"\n  and {len(bad) - LISTED_BAD_ROWS} more" if len(bad) > LISTED_BAD_ROWS else ""
        super().__init__(
            f"{len(bad)} of {report.read} rows of {report.source} cannot be used: {_counts(report.bad_by_reason)}. "
            "Counted from 0:"
            f"{listed}{more}\nMend these rows, or set on_bad_row='skip' to train without them."
        )
        self.report = report

    def __reduce__(self) -> tuple[type[BadRowsError], tuple[DataReport]]:
        return type(self), (self.report,)  # the default would rebuild it from the message


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)
