"""Bins that are full and the same every time; sequences that stay what they were."""

from __future__ import annotations

import numpy as np
import pyarrow
import pytest
from datasets import Dataset, concatenate_datasets
from hypothesis import given
from hypothesis import strategies as st

from fastalign.data.packing import PACKING_STRATEGIES, _Lists, _pieces, best_fit_decreasing, pack

lengths = st.lists(st.integers(1, 20), max_size=60)


def naive(lengths: list[int], capacity: int) -> int:
    """How many bins best fit needs, by looking at every bin."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(capacity - length)
    return len(rooms)


@given(lengths, st.integers(20, 50))
def test_bins_hold_every_sequence_once_within_capacity(lengths, capacity):
    bins = best_fit_decreasing(lengths, capacity)
    assert sorted(member for members in bins for member in members) == list(range(len(lengths)))
    assert all(sum(lengths[member] for member in members) <= capacity for members in bins)
    assert all(members == sorted(members) for members in bins)
    assert [members[0] for members in bins] == sorted(members[0] for members in bins)
    assert len(bins) == naive(lengths, capacity)
    assert bins == best_fit_decreasing(np.array(lengths, dtype=np.int64), capacity)


def test_best_fit_by_hand():
    assert best_fit_decreasing([3, 7, 5, 2, 4, 1], 10) == [[0, 1], [2, 4, 5], [3]]


def test_long_sequences_are_named():
    with pytest.raises(ValueError, match="sequence 1 has 9 tokens, max_length=8 is accepted"):
        best_fit_decreasing([3, 9], 8)


def sequences(lengths: list[int], seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    rows = []
    for row, n in enumerate(lengths):
        mask = rng.random(n) < 0.5
        rows.append({
            "input_ids": rng.integers(0, 100, n).tolist(), "completion_mask": [False, *mask[1:-1].tolist(), True][:n],
            "row": 10 * row,
        })  # fmt: skip
    return Dataset.from_list(rows)


def unpacked(packed: Dataset) -> list[tuple[int, list[int], list[bool]]]:
    found = []
    for example in packed:
        ends = np.cumsum(example["seq_lengths"])
        assert ends[-1] == len(example["input_ids"]) == len(example["completion_mask"])
        for row, start, end in zip(example["rows"], ends - example["seq_lengths"], ends, strict=True):
            found.append((row, example["input_ids"][start:end], example["completion_mask"][start:end]))
    return found


@given(st.lists(st.integers(2, 20), min_size=1, max_size=30), st.sampled_from(PACKING_STRATEGIES))
def test_packing_changes_no_sequence(lengths, strategy):
    dataset = sequences(lengths)
    packed = pack(dataset, 20, strategy)
    expected = [(e["row"], e["input_ids"], e["completion_mask"]) for e in dataset]
    assert sorted(unpacked(packed)) == sorted(expected)
    assert pack(dataset, 20, strategy)._fingerprint == packed._fingerprint


def test_long_sequences_are_cut_into_pieces_that_begin_anew():
    dataset = sequences([25, 3, 8])
    pieces = [piece for piece in unpacked(pack(dataset, 8, "bfd_split")) if piece[0] == 0]
    whole = dataset[0]
    assert len(pieces) == 3
    assert {len(ids) for _, ids, _ in pieces} <= {8}  # the last token is alone and teaches nothing
    for n in range(3):
        expected = whole["completion_mask"][8 * n : 8 * n + 8]
        assert (0, whole["input_ids"][8 * n : 8 * n + 8], [False, *expected[1:]]) in pieces
    with pytest.raises(ValueError, match="sequence 0 has 25 tokens"):
        pack(dataset, 8)


def test_a_selection_is_packed_and_not_what_it_was_selected_from():
    dataset = sequences([4, 5, 6, 7])
    chosen = dataset.select([3, 1])
    assert sorted(unpacked(pack(chosen, 20))) == sorted(
        (e["row"], e["input_ids"], e["completion_mask"]) for e in chosen
    )
    assert sorted(unpacked(pack(dataset.select(range(1, 3)), 20)))[0][0] == 10


def test_refusals():
    with pytest.raises(ValueError, match="packing strategy 'wrapped' is unknown; accepted are bfd, bfd_split"):
        pack(sequences([3]), 8, "wrapped")
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        pack(sequences([3]), 1)


def test_more_tokens_than_32_bits_count():
    """Chunks that together have more than 2^31 tokens: their memory is never written, so there is none."""
    values = pyarrow.array(np.zeros(2**29, np.int32))
    chunk = pyarrow.ListArray.from_arrays(pyarrow.array([0, 2**29 - 3, 2**29], pyarrow.int32()), values)
    lists = _Lists(pyarrow.chunked_array([chunk] * 5))
    assert lists.lengths.sum() == 5 * 2**29 > 2**31
    assert lists.lengths.tolist() == [2**29 - 3, 3] * 5
    assert lists.part(9, 1, 2).tolist() == [0, 0]
    sequences, firsts, lengths = _pieces(lists.lengths, 2**28)
    assert lengths.sum() == 5 * 2**29
    assert sequences.tolist() == [n for n in range(10) for _ in range(2 - n % 2)]
    assert (firsts + lengths <= lists.lengths[sequences]).all()


def test_chunks_are_packed_as_one():
    """However the rows lie in memory, slices of larger chunks included."""
    whole = sequences([5, 3, 9, 2, 7, 4, 8])
    apart = concatenate_datasets([whole.select(range(a, b)) for a, b in ((0, 2), (2, 3), (3, 7))])
    assert len(apart.data.column("input_ids").chunks) > 1
    assert pack(apart, 10)[:] == pack(whole, 10)[:]
    assert pack(apart, 4, "bfd_split")[:] == pack(whole, 4, "bfd_split")[:]
