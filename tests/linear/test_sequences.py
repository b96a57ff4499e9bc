"""Helpers of the fused losses over sequences."""

import pytest
import torch

from fastalign.linear.sequences import (
    check_detached,
    check_per_sequence,
    count_sequences,
    halved_sums,
    halves,
    lengths_on,
)


def test_count_sequences():
    assert count_sequences(torch.zeros(3, 4, 5), torch.zeros(3, 4), None) == 3
    assert count_sequences(torch.zeros(12, 5), torch.zeros(12), torch.tensor([0, 4, 12])) == 2
    with pytest.raises(ValueError, match=r"got hidden \(12, 5\)"):
        count_sequences(torch.zeros(12, 5), torch.zeros(12), None)


def test_halves_and_sums():
    cu = torch.tensor([0, 2, 2, 3, 6], dtype=torch.int32)
    chosen, rejected = halved_sums(torch.arange(6.0), cu)
    assert chosen.tolist() == [1.0, 0.0]
    assert rejected.tolist() == [2.0, 12.0]
    assert [len(half) for half in halves(torch.zeros(0))] == [0, 0]
    assert lengths_on(cu, chosen).tolist() == [2, 0, 1, 3]


def test_checks_name_the_tensor():
    check_per_sequence("labels", torch.zeros(2), 2)
    with pytest.raises(ValueError, match=r"labels must be \(2,\), one per sequence, got \(3,\)"):
        check_per_sequence("labels", torch.zeros(3), 2)
    with pytest.raises(ValueError, match="ref requires grad"):
        check_detached("ref", torch.zeros(1, requires_grad=True))
