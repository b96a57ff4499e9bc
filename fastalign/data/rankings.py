"""Rankings written as text: "D > C > A = B"."""

from __future__ import annotations

import string

import numpy as np

from fastalign.data.report import Reason, RowError


def parse_ranking(ranking: str, count: int) -> list[float]:
    """Ranks 1, 2, … (1 is best, equal ones are ties) of `count` completions from text, best first.

    Completions are named A, B, C, … (in either case) or 1, 2, 3, … in their order, all in the same way; `>` stands
    between a better and a worse one, `=` between two that are as good as each other. Every completion appears once.

    RowError: an unknown, repeated or missing name, or two names that are not apart.
    """
    if not isinstance(ranking, str):
        raise RowError(Reason.WRONG_TYPE, f"ranking is a {type(ranking).__name__}, not text such as 'B > A = C'")
    groups = [[name.strip().upper() for name in group.split("=")] for group in ranking.split(">")]
    names = _names(groups, count)
    ranks: dict[str, float] = {}
    for rank, group in enumerate(groups, 1):
        for name in group:
            if not name:
                raise RowError(Reason.WRONG_TYPE, "ranking: a name is missing beside > or =")
            if name not in names:
                raise RowError(
                    Reason.WRONG_TYPE, f"ranking names {_shown(name)}, and the completions are {_all(names)}"
                )
            if name in ranks:
                raise RowError(Reason.WRONG_TYPE, f"ranking names {name} twice")
            ranks[name] = float(rank)
    if missing := [name for name in names if name not in ranks]:
        raise RowError(Reason.MISSING_KEY, f"ranking leaves out {', '.join(missing)}")
    return [ranks[name] for name in names]


def dense_ranks(values: list[float], *, higher_is_better: bool) -> list[float]:
    """Ranks 1, 2, … without gaps, 1 for the best of the values."""
    keys = -np.array(values) if higher_is_better else np.array(values)
    _, order = np.unique(keys, return_inverse=True)
    return (order + 1.0).tolist()


def _names(groups: list[list[str]], count: int) -> list[str]:
    """What the completions are called in this ranking: numbers if it has any, else letters."""
    numbers = any(name.isdecimal() for group in groups for name in group)
    if numbers or count > len(string.ascii_uppercase):
        return [str(i + 1) for i in range(count)]
    return list(string.ascii_uppercase[:count])


def _shown(name: str) -> str:
    """A name as an error may show it: rows' text is never quoted at length."""
    return repr(name if len(name) <= 8 else f"{name[:8]}…")


def _all(names: list[str]) -> str:
    return f"{names[0]} … {names[-1]}" if len(names) > 1 else " ".join(names) or "none"
