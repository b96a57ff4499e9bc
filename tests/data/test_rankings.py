"""Rankings as text: what they mean, and every way in which they are refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastalign.data.rankings import dense_ranks, parse_ranking
from fastalign.data.report import Reason, RowError


@pytest.mark.parametrize(
    ("ranking", "ranks"),
    [
        ("D > C > A = B", [3, 3, 2, 1]),
        ("d>c>a=b", [3, 3, 2, 1]),
        ("4 > 3 > 1 = 2", [3, 3, 2, 1]),
        (" A = D\n> B > C ", [1, 2, 3, 1]),
        ("A=B=C=D", [1, 1, 1, 1]),
    ],
)
def test_what_rankings_mean(ranking, ranks):
    assert parse_ranking(ranking, 4) == ranks


@given(st.lists(st.integers(1, 5), min_size=2, max_size=30), st.booleans())
def test_every_ranking_can_be_written(values, numbers):
    ranks = dense_ranks([float(v) for v in values], higher_is_better=False)
    numbers = numbers or len(values) > 26
    names = [str(i + 1) if numbers else chr(ord("A") + i) for i in range(len(values))]
    groups = [[n for n, r in zip(names, ranks, strict=True) if r == rank] for rank in range(1, int(max(ranks)) + 1)]
    text = " > ".join(" = ".join(reversed(group)) for group in groups)
    assert parse_ranking(text, len(values)) == ranks


def test_dense_ranks():
    assert dense_ranks([0.5, 7.0, 0.5, -1.0], higher_is_better=True) == [2, 1, 2, 3]
    assert dense_ranks([4, 9, 4], higher_is_better=False) == [1, 2, 1]


@pytest.mark.parametrize(
    ("ranking", "reason", "detail"),
    [
        ("D > C > A", Reason.MISSING_KEY, "ranking leaves out B"),
        ("1 > 2", Reason.MISSING_KEY, "ranking leaves out 3, 4"),
        ("D > C > A = B = E", Reason.WRONG_TYPE, "ranking names 'E', and the completions are A … D"),
        ("0 > 1 > 2 > 3", Reason.WRONG_TYPE, "ranking names '0', and the completions are 1 … 4"),
        ("A > 2 > 3 > 4", Reason.WRONG_TYPE, "ranking names 'A', and the completions are 1 … 4"),
        ("D > C > A = B > D", Reason.WRONG_TYPE, "ranking names D twice"),
        ("A > > B", Reason.WRONG_TYPE, "a name is missing"),
        ("", Reason.WRONG_TYPE, "a name is missing"),
        ("A > B < C > D", Reason.WRONG_TYPE, "ranking names 'B < C', and the completions"),
        ("A is by far the best", Reason.WRONG_TYPE, "ranking names 'A IS BY …'"),
        (["A", "B"], Reason.WRONG_TYPE, "ranking is a list, not text"),
    ],
)
def test_bad_rankings(ranking, reason, detail):
    with pytest.raises(RowError) as error:
        parse_ranking(ranking, 4)
    assert error.value.reason == reason
    assert detail in error.value.detail
