"""Comparisons that are put together into rankings, and those that are not."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastalign.data.merging import merge_comparisons


def merged(text):
    """From "ab ac | cd" (prompts apart) to [(ranking, ...)], responses by name."""
    comparisons = [(p, pair[0], pair[1]) for p, part in enumerate(text.split("|")) for pair in part.split()]
    names = [c[1] for c in comparisons] + [c[2] for c in comparisons]
    found = []
    for _, members, ranks in merge_comparisons(comparisons):
        levels = ["".join(sorted(names[m] for m, r in zip(members, ranks, strict=True) if r == level))
                  for level in range(1, max(ranks) + 1)]  # fmt: skip
        found.append(">".join(levels))
    return found


@pytest.mark.parametrize(
    ("comparisons", "lists"),
    [
        ("ab", ["a>b"]),
        ("ab ac ad", ["a>bcd"]),
        ("ab bc cd", ["a>b>c>d"]),
        ("bc ab", ["a>b>c"]),
        ("ab ac bc", ["a>b>c"]),
        ("ac bc", ["ab>c"]),
        ("ac ad bc bd", ["ab>cd"]),
        ("ab ab", ["a>b"]),
        ("ab cd", ["a>b", "c>d"]),  # nothing is said of a and c
        ("ab ac bd", ["a>b", "a>c", "b>d"]),  # c is neither before nor behind nor level with b and d
        ("ab cb cd", ["a>b", "c>b", "c>d"]),
        ("ab ba", ["a>b", "b>a"]),  # contradictory
        ("ab bc ca", ["a>b", "b>c", "c>a"]),
        ("ab | ac", ["a>b", "a>c"]),  # of different prompts
        ("ab | cd | ef", ["a>b", "c>d", "e>f"]),
    ],
)
def test_what_is_merged(comparisons, lists):
    assert merged(comparisons) == lists


def test_lists_stand_where_their_first_comparison_stood():
    rows = [(0, "a", "b"), (1, "c", "d"), (0, "b", "e"), (1, "f", "g")]
    assert [first for first, _, _ in merge_comparisons(rows)] == [0, 1, 3]
    assert next(iter(merge_comparisons(rows)))[1:] == ([0, 4, 6], [1, 2, 3])  # a, b of row 0, e of row 2


@given(st.lists(st.integers(1, 3), min_size=2, max_size=6), st.randoms())
def test_all_comparisons_of_a_ranking_give_it_back(ranks, random):
    pairs = [(a, b) for a, b in combinations(range(len(ranks)), 2) if ranks[a] != ranks[b]]
    rows = [("p", a, b) if ranks[a] < ranks[b] else ("p", b, a) for a, b in pairs]
    random.shuffle(rows)
    found = list(merge_comparisons(rows))
    if not rows:
        assert not found
        return
    ((_, members, given),) = found
    names = [r[1] for r in rows] + [r[2] for r in rows]
    order = sorted(set(ranks))
    assert {names[m]: r for m, r in zip(members, given, strict=True)} == {
        i: order.index(rank) + 1 for i, rank in enumerate(ranks)
    }


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(lambda p: p[0] != p[1]), max_size=8))
def test_nothing_is_compared_that_does_not_follow(pairs):
    """Each strict comparison of a list follows from the rows by transitivity, and each row is in some list."""
    rows = [("p", a, b) for a, b in pairs]
    names = [a for a, _ in pairs] + [b for _, b in pairs]
    follows = set(pairs)
    for middle in range(6):
        follows |= {(a, c) for a in range(6) for c in range(6) if (a, middle) in follows and (middle, c) in follows}
    said = set()
    for _, members, ranks in merge_comparisons(rows):
        own = list(zip(members, ranks, strict=True))
        said |= {(names[a], names[b]) for a, r in own for b, s in own if r < s}
    assert set(pairs) <= said <= follows
