"""GAE and sums over sequences on a GPU, at real sizes against float64 and where 32 bits do not reach.

pytest -m gpu tests/kernels/test_gpu_scans.py
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

from fastalign.kernels import gae, segments

from fastalign.ops import sequence_logps
from fastalign.ops.scans import gae_torch, segment_sums_torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET is set: nothing is compiled"
    ),
]


def need_memory(gigabytes: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of free device memory, {free:.0f} GB are free")


def rollouts(device, batch, length, seed=0):
    g = torch.Generator(device).manual_seed(seed)
    rewards, values = (torch.randn(batch, length, generator=g, device=device) for _ in range(2))
    return rewards, values, torch.rand(batch, length, generator=g, device=device) < 0.9


@pytest.mark.parametrize(("batch", "length"), [(512, 2048), (300, 777), (5, 20_001), (70_000, 33), (1, 1)])
def test_gae(batch, length, device):
    rewards, values, mask = rollouts(device, batch, length)
    ours = gae.gae_scan(rewards, values, mask, 0.99, 0.95)
    exact = gae_torch(rewards.double(), values.double(), mask, 0.99, 0.95)
    for mine, true in zip(ours, exact, strict=True):
        assert torch.allclose(mine.double(), true, rtol=1e-4, atol=1e-4)
    again = gae.gae_scan(rewards, values, mask, 0.99, 0.95)
    alone = gae.gae_scan(rewards[-1:], values[-1:], mask[-1:], 0.99, 0.95)
    for mine, second, last in zip(ours, again, alone, strict=True):
        assert torch.equal(mine, second)
        assert torch.equal(mine[-1:], last)


def test_gae_beyond_32_bits(device):
    need_memory(50)
    batch, length = 1_100_000, 2048
    rewards, values = torch.zeros(batch, length, device=device), torch.zeros(batch, length, device=device)
    mask = torch.zeros(batch, length, dtype=torch.bool, device=device)
    rewards[-2:], values[-2:], mask[-2:] = rollouts(device, 2, length)
    expected = gae.gae_scan(rewards[-2:].clone(), values[-2:].clone(), mask[-2:].clone(), 0.99, 0.95)
    for mine, true in zip(gae.gae_scan(rewards, values, mask, 0.99, 0.95), expected, strict=True):
        assert torch.equal(mine[-2:], true)
        assert not mine[:-2].any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", [[2048] * 512, [1, 0, 100_000, 7, 16_384, 16_385], [300_000] * 3, [1] * 70_000])
def test_segment_sums(lengths, masked, device):
    g = torch.Generator(device).manual_seed(0)
    total = sum(lengths)
    values = torch.randn(total, generator=g, device=device) * 10
    mask = torch.rand(total, generator=g, device=device) < 0.8 if masked else None
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    sums, counts = segments.segment_sums(values, mask, offsets)
    exact, exact_counts = segment_sums_torch(values.double(), mask, offsets)
    assert torch.allclose(sums.double(), exact, rtol=1e-6, atol=1e-6)
    assert torch.equal(counts, exact_counts)
    first, _ = segments.segment_sums(
        values[: lengths[0]].clone(), None if mask is None else mask[: lengths[0]], offsets[:2]
    )
    assert torch.equal(first[0], sums[0])
    spread = segments.spread_segments(sums, mask, offsets, total)
    expected = sums.repeat_interleave(torch.tensor(lengths, device=device))
    assert torch.equal(spread, expected if mask is None else torch.where(mask, expected, 0))


def test_segments_beyond_32_bits(device):
    need_memory(24)
    total = 2**31 + 1000
    values = torch.zeros(total, device=device)
    values[-700:] = 1.0
    offsets = torch.tensor([0, 2**31 - 5, total - 700, total], device=device)
    sums, counts = segments.segment_sums(values, None, offsets)
    assert sums.tolist() == [0, 0, 700]
    assert torch.equal(counts, offsets.diff())
    spread = segments.spread_segments(torch.tensor([1.0, 2.0, 3.0], device=device), None, offsets, total)
    assert spread[offsets[:-1]].tolist() == [1, 2, 3]
    assert spread[offsets[1:] - 1].tolist() == [1, 2, 3]


def test_sequence_logps_by_either_backend(device):
    values = torch.randn(1000, device=device, requires_grad=True)
    cu = torch.tensor([0, 300, 300, 999, 1000], dtype=torch.int32)  # on the host, as collators give it
    results = []
    for backend in ("triton", "torch"):
        out = sequence_logps(values, cu_seqlens=cu, reduction="mean", backend=backend)
        (grad,) = torch.autograd.grad(out.square().sum(), values)
        results.append((out.detach(), grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)
    assert torch.equal(sequence_logps(values, cu_seqlens=cu), sequence_logps(values, cu_seqlens=cu, backend="triton"))
    compiled = torch.compile(lambda x: sequence_logps(x, cu_seqlens=cu), fullgraph=True)
    torch.testing.assert_close(compiled(values), sequence_logps(values, cu_seqlens=cu))
