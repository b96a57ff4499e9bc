from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastalign.reference.sequences import PreferenceSequences, TokenSequence, sequence_keys


def key_by_definition(digest: str, ids: list[int], start: int) -> bytes:
    message = bytes.fromhex(digest) + struct.pack("<Q", start) + b"".join(struct.pack("<I", i) for i in ids)
    return hashlib.blake2b(message, digest_size=16, person=b"fastalign.seq.1").digest()


def test_keys_are_the_documented_digest(digest):
    """The key is part of the format on disk: a change of it must not go unnoticed."""
    sequences = [TokenSequence([5, 2**32 - 1, 0], 1), TokenSequence([7, 8], 1), TokenSequence(list(range(300)), 299)]
    keys, lengths, completions = sequence_keys(digest, sequences)
    assert [key.tobytes() for key in keys] == [key_by_definition(digest, *sequence) for sequence in sequences]
    assert lengths.tolist() == [3, 2, 300]
    assert completions.tolist() == [2, 1, 1]


def test_no_sequences(digest):
    keys, lengths, completions = sequence_keys(digest, [])
    assert keys.shape == (0, 16)
    assert lengths.shape == completions.shape == (0,)


@pytest.mark.parametrize(
    "convert",
    [tuple, np.array, lambda ids: np.array(ids, np.uint16), lambda ids: np.array(ids, np.int64)[::1], torch.tensor],
    ids=["tuple", "int64", "uint16", "slice", "tensor"],
)
def test_the_container_of_the_ids_does_not_matter(digest, convert):
    ids = [3, 1, 4, 1, 5]
    expected, _, _ = sequence_keys(digest, [TokenSequence(ids, 2)])
    got, _, _ = sequence_keys(digest, [(convert(ids), np.int64(2))])
    assert np.array_equal(got, expected)


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 3), min_size=2, max_size=5), st.integers(1, 4)).filter(
            lambda s: s[1] < len(s[0])
        ),
        min_size=2,
        max_size=30,
    )
)
def test_keys_differ_exactly_where_sequences_do(digest, sequences):
    keys, _, _ = sequence_keys(digest, [TokenSequence(*sequence) for sequence in sequences])
    distinct = {(tuple(ids), start) for ids, start in sequences}
    assert len({key.tobytes() for key in keys}) == len(distinct)


def test_the_reference_is_in_the_key(digest):
    sequence = TokenSequence([1, 2, 3], 1)
    mine, _, _ = sequence_keys(digest, [sequence])
    other, _, _ = sequence_keys(digest[::-1], [sequence])
    assert not np.array_equal(mine, other)


@pytest.mark.parametrize("start", [0, -1, 3, 4])
def test_completion_start_out_of_range(digest, start):
    with pytest.raises(ValueError, match=rf"sequence 1: completion_start must lie in 1 … 2 for 3 tokens, got {start}"):
        sequence_keys(digest, [TokenSequence([1, 2], 1), TokenSequence([1, 2, 3], start)])


@pytest.mark.parametrize(
    "ids",
    [[1, -1], [1, 2**32], [1.0, 2.0], ["a", "b"], np.array([1.0, 2.0]), np.array([-1, 2]), np.array([[1, 2], [3, 4]])],
    ids=["negative", "large", "float", "string", "float array", "negative array", "matrix"],
)
def test_ids_that_are_none(digest, ids):
    with pytest.raises(ValueError, match="sequence 0: token ids must be one row of integers"):
        sequence_keys(digest, [(ids, 1)])


@pytest.mark.parametrize("convert", [list, np.array], ids=["lists", "arrays"])
def test_preference_sequences(convert):
    examples = [
        {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5], "row": 7},
        {"prompt_ids": [6], "chosen_ids": [7, 8], "rejected_ids": [9], "row": 9},
    ]
    examples = [{name: convert(ids) if name != "row" else ids for name, ids in one.items()} for one in examples]
    sequences = PreferenceSequences(examples)
    expected = [([1, 2, 3], 2), ([1, 2, 4, 5], 2), ([6, 7, 8], 1), ([6, 9], 1)]
    assert len(sequences) == 4
    for got in (list(sequences), [sequences[i] for i in range(4)], sequences[:], [sequences[i - 4] for i in range(4)]):
        assert [(list(ids), start) for ids, start in got] == expected
    with pytest.raises(IndexError):
        sequences[4]
