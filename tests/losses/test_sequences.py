"""Sums over sequences, padded and packed."""

from __future__ import annotations

import torch

from fastalign.losses.sequences import Sequences


def test_padded_and_packed_are_one():
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(4, 5, generator=g) < 0.6
    mask[1] = False
    values = torch.where(mask, torch.randn(4, 5, generator=g, dtype=torch.float64), 0).requires_grad_()
    padded = Sequences(mask)
    packed = Sequences(mask.flatten(), torch.arange(0, 21, 5, dtype=torch.int32))
    rows = [values[i][mask[i]] for i in range(4)]
    lengths = torch.tensor([float(len(row)) for row in rows])
    sums = torch.stack([row.sum() for row in rows])
    for sequences, given in ((padded, values), (packed, values.flatten())):
        assert torch.equal(sequences.lengths, lengths)
        assert int(sequences.count) == 3
        torch.testing.assert_close(sequences.sums(given), sums)
        expected = (sums / lengths.clamp(min=1))[:, None].expand(4, 5)
        torch.testing.assert_close(sequences.mean(given).reshape(4, 5), expected)
        shares = sequences.shares().reshape(4, 5)
        torch.testing.assert_close(shares.sum(1), (lengths > 0).float())
        assert not shares[~mask].any()
        (grad,) = torch.autograd.grad((sequences.mean(given).reshape(4, 5) * mask).sum(), values, retain_graph=True)
        torch.testing.assert_close(grad, (lengths > 0).double()[:, None].expand(4, 5))


def test_empty_sequences_and_no_tokens():
    packed = Sequences(torch.ones(3, dtype=torch.bool), torch.tensor([0, 0, 2, 2, 3]))
    assert packed.lengths.tolist() == [0, 2, 0, 1]
    assert packed.mean(torch.tensor([1.0, 3.0, 5.0])).tolist() == [2, 2, 5]
    nothing = Sequences(torch.zeros(0, dtype=torch.bool), torch.tensor([0, 0]))
    assert nothing.sums(torch.zeros(0)).tolist() == [0]
    assert int(nothing.count) == 0
