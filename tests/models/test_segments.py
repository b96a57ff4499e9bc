"""Where sequences lie in a packed batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastalign.models.segments import Segments

CPU = torch.device("cpu")


def test_blocks_are_the_flat_batch_in_order():
    segments = Segments(np.array([[3, 2], [4, 0]]), 6)
    assert segments.shape == (2, 6)
    assert segments.block_sizes == [3, 2, 1, 4, 2]
    assert segments.is_segment == [True, True, False, True, False]
    assert segments.lengths.tolist() == [3, 2, 4]
    index = segments.varlen(CPU)
    assert index.positions.tolist() == index.key_positions.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert index.cu_seqlens.tolist() == index.cu_seqlens_k.tolist() == [0, 3, 5, 9]
    assert (index.cu_seqlens.dtype, index.longest, index.longest_k) == (torch.int32, 4, 4)
    assert segments.varlen(CPU) is segments.varlen(CPU)


def test_a_flat_batch_has_no_padding():
    segments = Segments(np.array([[1, 5, 2]]), 8)
    assert segments.block_sizes == [1, 5, 2]
    assert segments.varlen(CPU).positions is None


def test_keys_of_a_segment_are_its_prefixs_and_its_own():
    segments = Segments(np.array([[3, 2], [1, 0]]), 6, prefixes=np.array([-1, 0, 0]))
    assert segments.prefix_lengths.tolist() == [0, 3, 3]
    assert segments.starts.tolist() == [0, 3, 6]
    index = segments.varlen(CPU)
    assert index.positions.tolist() == [0, 1, 2, 3, 4, 6]
    assert index.key_positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 6]
    assert (index.cu_seqlens.tolist(), index.cu_seqlens_k.tolist()) == ([0, 3, 5, 6], [0, 3, 8, 12])
    assert (index.longest, index.longest_k) == (3, 5)


def test_a_prefix_that_is_a_whole_row_and_comes_later():
    segments = Segments(np.array([[2, 3]]), 5, prefixes=np.array([1, -1]))
    assert segments.varlen(CPU).key_positions.tolist() == [2, 3, 4, 0, 1, 2, 3, 4]
    assert segments.varlen(CPU).positions is None


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [
        ([-1, 0, 1], "segment 1 is a prefix and continues another one itself"),
        ([0, -1, -1], "segment 0 is a prefix and continues another one itself"),
        ([-1, 0], r"prefixes must be \(3,\)"),
        ([-1, 3, -1], "each a segment or -1"),
        ([-1, -2, -1], "each a segment or -1"),
    ],
)
def test_prefixes_that_cannot_be(prefixes, message):
    with pytest.raises(ValueError, match=message):
        Segments(np.array([[2, 2, 2]]), 6, prefixes=np.array(prefixes))


def test_needed_tokens_are_moved_once():
    assert Segments(np.array([[3]]), 3).needed_on(CPU) is None
    segments = Segments(np.array([[3]]), 3, needed=np.array([0, 2]))
    assert segments.needed_on(CPU).tolist() == [0, 2]
    assert segments.needed_on(CPU) is segments.needed_on(CPU)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([[3, 4]], "the segments of row 0 have 7 tokens, the batch is 6 wide"),
        ([[0, 0]], "not all 0"),
        ([[-1, 2]], "none negative"),
        ([1, 2], r"must be \(B, K\)"),
    ],
)
def test_lengths_that_cannot_be(lengths, message):
    with pytest.raises(ValueError, match=message):
        Segments(np.array(lengths), 6)
