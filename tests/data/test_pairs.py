"""Common beginnings."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastalign.data.pairs import common_length


@given(st.text("ab", max_size=8), st.text("ab", max_size=8))
def test_common_length_is_the_longest_common_beginning(left: str, right: str):
    n = common_length(left, right)
    assert left[:n] == right[:n]
    assert n == min(len(left), len(right)) or left[n] != right[n]


def test_any_elements_compare():
    assert common_length([{"a": 1}, {"b": 2}], [{"a": 1}, {"b": 3}]) == 1
