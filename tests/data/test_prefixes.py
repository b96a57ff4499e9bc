"""The longest common prefix of the sequences of each group."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastalign.data import ListCollator, PreferenceCollator, RewardCollator
from fastalign.data.prefixes import prefix_lengths

SEQUENCE = st.lists(st.integers(0, 1), min_size=1, max_size=6)


def padded(sequences: list[list[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(own) for own in sequences])
    ids = np.full((len(sequences), lengths.max()), pad)
    for row, own in zip(ids, sequences, strict=True):
        row[: len(own)] = own
    return ids, lengths


def common(group: list[list[int]]) -> int:
    return next(n for n in range(7, -1, -1) if all(own[:n] == group[0][:n] and len(own) >= n for own in group))


@given(groups=st.lists(st.lists(SEQUENCE, min_size=1, max_size=4), min_size=1, max_size=4), pad=st.integers(0, 1),
       seed=st.integers(0, 99))  # fmt: skip
def test_it_is_the_common_prefix(groups, pad, seed):
    """Padding is a token that sequences hold too; members of a group lie anywhere in the batch."""
    numbered = [(number, own) for number, group in enumerate(groups) for own in group]
    order = np.random.default_rng(seed).permutation(len(numbered))
    ids, lengths = padded([numbered[i][1] for i in order], pad)
    found = prefix_lengths(ids, lengths, np.array([numbered[i][0] for i in order]))
    assert found.dtype == np.int64
    assert found.tolist() == [0 if len(group) == 1 else common(group) for group in groups]


def test_known_groups():
    ids, lengths = padded([[5, 6, 7], [5, 6, 8, 9], [1, 2], [1, 2], [3], [4, 4], [9, 4]], 0)
    assert prefix_lengths(ids, lengths, np.array([0, 0, 1, 1, 2, 3, 3])).tolist() == [2, 2, 0, 0]


PAIRS = [
    {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 1], "rejected_ids": [7, 9, 9, 1]},  # begin alike
    {"prompt_ids": [5], "chosen_ids": [2], "rejected_ids": [2]},  # are one
    {"prompt_ids": [3, 3, 3], "chosen_ids": [4], "rejected_ids": [1, 4]},
]
LISTS = [
    {"prompt_ids": [5], "response_ids": [[1, 2], [1, 3], [1]], "ranks": [1, 2, 3]},
    {"prompt_ids": [5, 5], "response_ids": [[1]], "ranks": [1]},
]
LABELS = [{"prompt_ids": [5, 5], "completion_ids": [1], "label": True}] * 2


@pytest.mark.parametrize(
    ("collator", "examples", "expected"),
    [
        (PreferenceCollator, PAIRS, [3, 2, 3]),
        (RewardCollator, PAIRS, [3, 2, 3]),
        (ListCollator, LISTS, [2, 0]),
        (RewardCollator, LISTS, [2, 0]),
        (RewardCollator, LABELS, [0, 0]),
    ],
)
def test_collators_tell_them(collator, examples, expected):
    batch = collator(0)(examples)
    assert batch["prefix_lengths"].tolist() == expected
    assert isinstance(batch["prefix_lengths"], np.ndarray)
