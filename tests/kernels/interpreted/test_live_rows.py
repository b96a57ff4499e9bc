"""Live rows found and gathered on the device: against what the host would have done."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from fastalign.kernels import live_rows as L


def rounded_up(count):
    return max(L.PAD, -(-count // L.PAD) * L.PAD)


def expected(base, target, entropy):
    live = (base != 0) | (target != 0)
    if entropy is not None:
        live |= entropy != 0
    return torch.cat([live.nonzero()[:, 0], (~live).nonzero()[:, 0]]), int(live.sum())


def check(base, target, entropy=None):
    index, count = L.live_rows(base, target, entropy)
    order, live = expected(base, target, entropy)
    assert index.dtype == torch.int64
    assert count.dtype == torch.int32
    assert torch.equal(index, order)
    assert count.tolist() == [live]


@pytest.mark.parametrize("n", [0, 1, 1024, 1025, 5000])
@pytest.mark.parametrize("pattern", ["none", "all", "alternating", "last", "half"])
def test_a_stable_partition(n, pattern, device):
    base = torch.zeros(n, device=device)
    if n:
        places = {"none": [], "all": slice(None), "alternating": slice(1, None, 2), "last": -1}
        base[places.get(pattern, slice(n // 2, None))] = 0.5
    check(base, torch.zeros(n, device=device))


def test_what_is_not_zero(device):
    """Any one coefficient makes a row live; a NaN is not 0, minus 0 is."""
    nan, inf = torch.nan, torch.inf
    base = torch.tensor([0, 1, 0, 0, nan, -0.0, 0, -inf, 1e-45], device=device)
    target = torch.tensor([0, 0, 1, 0, 0, -0.0, nan, 0, 0], device=device)
    entropy = torch.tensor([0, 0, 0, 1, 0, -0.0, 0, 0, 0], device=device)
    index, count = L.live_rows(base, target, entropy)
    assert index.tolist() == [1, 2, 3, 4, 6, 7, 8, 0, 5]
    assert count.tolist() == [7]
    assert L.live_rows(base, target, None)[0].tolist() == [1, 2, 4, 6, 7, 8, 0, 3, 5]


@settings(max_examples=12)
@given(n=st.integers(1, 3000), live=st.floats(0, 1), with_entropy=st.booleans(), seed=st.integers(0, 2**20))
def test_any_rows(n, live, with_entropy, seed, device):
    g = torch.Generator().manual_seed(seed)
    base, target, entropy = (torch.rand(3, n, generator=g) < live / 3).float().to(device)
    check(base, target[torch.arange(n)] if with_entropy else target, entropy if with_entropy else None)


def test_strided_coefficients(device):
    together = torch.zeros(70, 3, device=device)
    together[::7, 0], together[::5, 1], together[69, 2] = 1, 1, 1
    check(*together.unbind(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "width", "live"), [(5, 200, 0), (5, 7, 5), (66, 3, 64), (66, 3, 65)])
def test_gathered_rows_are_padded_with_zeros(n, width, live, dtype, device):
    source = torch.randn(n, width, device=device).to(dtype)
    index = torch.randperm(n, device=device)
    count = torch.tensor([live], dtype=torch.int32, device=device)
    memory = torch.full((rounded_up(n) + 1, width + 1), torch.nan, device=device, dtype=dtype)
    L.gather_rows(source, index, count, memory[:-1, :width])
    padded = rounded_up(live)
    assert torch.equal(memory[:live, :width], source[index[:live]])
    assert (memory[live:padded, :width] == 0).all()
    assert memory[padded:].isnan().all(), "rows behind the padding were written"
    assert memory[:, width].isnan().all(), "columns of others were written"


def test_gathering_from_any_strides(device):
    source = torch.randn(9, 5, device=device).t()
    count = torch.tensor([4], dtype=torch.int32, device=device)
    out = torch.empty(L.PAD, 9, device=device)
    L.gather_rows(source, torch.arange(5, device=device).flip(0), count, out)
    assert torch.equal(out[:4], source.flip(0)[:4])
