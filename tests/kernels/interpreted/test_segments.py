"""Sums over sequences: against Python's exact sum, piece by piece or sequence by sequence with the same bits."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from fastalign.kernels import segments


@pytest.fixture(params=[False, True], ids=["walking", "by the piece"])
def pieces(request, monkeypatch):
    """Sequences of many pieces: summed by one program each, or by one for each piece."""
    monkeypatch.setattr(segments, "PIECE", 32)
    monkeypatch.setattr(segments, "BLOCK", 8)
    monkeypatch.setattr(segments, "NUM_WARPS", 1)
    monkeypatch.setattr(segments, "MAX_PROGRAMS", 4096 if request.param else 1)


def problem(device, lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths), generator=g) * 10
    mask = torch.rand(sum(lengths), generator=g) < 0.7
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return values.to(device), mask.to(device), offsets.to(device)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("lengths", [[0], [1], [8, 0, 33, 32, 100, 1, 7], [64, 96]])
@pytest.mark.parametrize("masked", [False, True])
def test_against_an_exact_sum(lengths, masked, device):
    values, mask, offsets = problem(device, lengths)
    sums, counts = segments.segment_sums(values, mask if masked else None, offsets)
    for b, (part, kept) in enumerate(zip(values.split(lengths), mask.split(lengths), strict=True)):
        part = part[kept] if masked else part
        assert sums[b].item() == torch.tensor(math.fsum(part.tolist())).item()
        assert counts[b].item() == len(part)
    spread = segments.spread_segments(sums, mask if masked else None, offsets, len(values))
    expected = sums.repeat_interleave(torch.tensor(lengths, device=device))
    assert torch.equal(spread, torch.where(mask, expected, 0) if masked else expected)


def test_the_same_bits_in_any_company(device, monkeypatch):
    """Alone or not, at whatever offset, by one program or by many."""
    monkeypatch.setattr(segments, "PIECE", 32)
    monkeypatch.setattr(segments, "BLOCK", 8)
    lengths = [50, 3, 131, 77]
    values, _, offsets = problem(device, lengths)
    values[::7] *= 1e8
    wide = values.double()  # stored in float64, a difference of order would show
    results = []
    for programs in (1, 4096):
        monkeypatch.setattr(segments, "MAX_PROGRAMS", programs)
        together, _ = segments.segment_sums(wide, None, offsets)
        alone = [
            segments.segment_sums(part, None, torch.tensor([0, len(part)], device=device))[0]
            for part in wide.split(lengths)
        ]
        assert torch.equal(torch.cat(alone), together)
        results.append(together)
    assert torch.equal(*results)


def test_masked_values_do_not_leak(device):
    values, mask, offsets = problem(device, [5, 9])
    expected, _ = segments.segment_sums(values, mask, offsets)
    for bad in (math.nan, math.inf):
        sums, _ = segments.segment_sums(torch.where(mask, values, bad), mask, offsets)
        assert torch.equal(sums, expected)


def test_nothing_to_do(device):
    empty = torch.zeros(0, device=device)
    offsets = torch.zeros(1, dtype=torch.int64, device=device)
    assert segments.segment_sums(empty, None, offsets)[0].shape == (0,)
    assert segments.spread_segments(empty, None, offsets, 0).shape == (0,)
    assert segments.spread_segments(empty, None, offsets, 3).tolist() == [0, 0, 0]
