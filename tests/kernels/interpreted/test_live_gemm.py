"""GEMMs whose number of rows lies in device memory, against float64 on the live rows alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from fastalign.kernels import live_gemm as G
from fastalign.kernels import live_rows as L

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# So small that a small problem has several tiles and pieces, but not too small for tensor cores.
TILES = G.GemmTiles(16, 32, 16, num_warps=4, num_stages=2, parts=2, group_m=2)
PROGRAMS = 3


@pytest.fixture(scope="module")
def problem(device):
    """problem(n, H, v, live, dtype) -> a tile's gradient and inputs, in full and gathered; NaN behind the padding."""

    def make(n, width, vocab, live, dtype=torch.float32, seed=0):
        g = torch.Generator().manual_seed(seed)
        grad, h, weight = (torch.randn(*shape, generator=g) for shape in ((n, vocab), (n, width), (vocab, width)))
        chosen = torch.rand(n, generator=g) < live
        p = SimpleNamespace(h=h.to(device, dtype), weight=weight.to(device, dtype))
        pitch = -(-vocab // 16) * 16  # as tiles are laid out
        p.grad = torch.full((n, pitch), torch.nan, dtype=dtype, device=device)[:, :vocab].copy_(grad)
        p.index, p.count = L.live_rows(chosen.float().to(device), torch.zeros(n, device=device), None)
        p.live = p.index[: int(chosen.sum())]
        padded = -(-n // L.PAD) * L.PAD
        p.front_grad, p.front_h = (
            torch.full((padded, -(-size // 8) * 8), torch.nan, dtype=dtype, device=device)[:, :size]
            for size in (vocab, width)
        )
        L.gather_rows(p.grad, p.index, p.count, p.front_grad)
        L.gather_rows(p.h, p.index, p.count, p.front_h)
        p.grad[p.index[len(p.live) :]] = torch.nan  # nobody has to write what nobody reads
        return p

    return make


def close(ours, exact, depth):
    """Float32 sums of `depth` products of standard normal numbers."""
    assert ours.isfinite().all()
    assert (ours.double() - exact).abs().max() <= 4e-7 * max(depth, 1) ** 0.5 * (8 + exact.abs().max())


def options(arch, tiles=TILES):
    return {"arch": arch, "programs": PROGRAMS, "tiles": tiles}


def all_three(p, arch, tiles=TILES):
    """grad_hidden, logits and grad_weight, each against float64; rows that are not live are left as they are."""
    (n, vocab), width = p.grad.shape, p.h.shape[1]
    live, device = p.live, p.h.device
    grad_hidden = torch.full((n, width), 7.0, device=device)
    G.rows_matmul(
        p.grad, p.weight, p.count, grad_hidden, index=p.index, out_index=p.index, **options(arch, tiles)
    )  # fmt: skip
    exact = torch.full((n, width), 7.0, dtype=torch.float64, device=device)
    exact[live] = p.grad[live].double() @ p.weight.double()
    close(grad_hidden, exact, vocab)

    logits = torch.full((n, vocab), 7.0, device=device)
    G.rows_matmul(p.front_h, p.weight.t(), p.count, logits, out_index=p.index, **options(arch, tiles))
    exact = torch.full((n, vocab), 7.0, dtype=torch.float64, device=device)
    exact[live] = p.h[live].double() @ p.weight.double().t()
    close(logits, exact, width)

    grad_weight = torch.full((vocab, width), torch.nan, device=device)
    G.depth_matmul(p.grad, p.front_h, p.count, grad_weight, index=p.index, **options(arch, tiles))
    close(grad_weight, p.grad[live].double().t() @ p.h[live].double(), len(live))
    return grad_hidden, logits, grad_weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "width", "vocab", "live"),
    [(1, 1, 1, 1.0), (37, 33, 71, 0.0), (37, 33, 71, 0.5), (37, 40, 71, 0.5), (70, 24, 32, 1.0)],
)
def test_against_float64(n, width, vocab, live, dtype, problem, arch):
    all_three(problem(n, width, vocab, live, dtype), arch)


@pytest.mark.parametrize(
    ("arch", "dtype"), [("sm_80", torch.float32), ("sm_80", torch.bfloat16), ("sm_90", torch.bfloat16)], ids=str
)
def test_own_tiles(arch, dtype, problem, device):
    """The tiles that are launched with, through descriptors and through pointers."""
    if device.type == "cuda":
        pytest.skip("other architectures than the device's own")
    all_three(problem(70, 72, 136, 0.5, dtype), arch, tiles=None)


def test_descriptors_and_pointers_give_the_same_bits(problem, device):
    if device.type == "cuda":
        pytest.skip("one architecture has one of them")
    p = problem(70, 48, 64, 0.4, torch.bfloat16)
    for ours, others in zip(all_three(p, "sm_90"), all_three(p, "sm_80"), strict=True):
        assert torch.equal(ours, others)


def test_gathering_gives_the_same_bits(problem, arch):
    """Rows picked by the loads, or gathered to the front before."""
    p = problem(70, 48, 64, 0.4, torch.bfloat16)
    grad_hidden, _, grad_weight = all_three(p, arch)
    dense = torch.full_like(grad_hidden, 7.0)
    G.rows_matmul(p.front_grad, p.weight, p.count, dense, out_index=p.index, **options(arch))
    assert torch.equal(dense, grad_hidden)
    dense = torch.full_like(grad_weight, torch.nan)
    G.depth_matmul(p.front_grad, p.front_h, p.count, dense, **options(arch))
    assert torch.equal(dense, grad_weight)


def test_a_row_does_not_see_its_neighbours(problem, arch):
    p = problem(70, 48, 64, 0.6, torch.bfloat16)
    together = torch.zeros(70, 48, device=p.h.device)
    G.rows_matmul(p.grad, p.weight, p.count, together, index=p.index, out_index=p.index, **options(arch))
    for place in (0, 17, len(p.live) - 1):
        alone = torch.zeros(1, 48, device=p.h.device)
        one = torch.ones(1, dtype=torch.int32, device=p.h.device)
        G.rows_matmul(p.front_grad[place : place + 1], p.weight, one, alone, **options(arch))
        assert torch.equal(alone[0], together[p.live[place]])


def test_start_scale_and_factors(problem, arch):
    """Slab by slab: the first slab's product is the second's start, and the last one goes out in 16 bits."""
    p = problem(70, 40, 64, 0.5, torch.bfloat16)
    n, device, scale = 70, p.h.device, torch.tensor(0.25, device=p.h.device)
    rows = {"index": p.index, "out_index": p.index, "scale": scale, **options(arch)}
    sums = torch.full((n, 40), torch.nan, device=device)
    out = torch.zeros(n, 40, dtype=torch.bfloat16, device=device)
    G.rows_matmul(p.grad[:, :16], p.weight[:16], p.count, sums, **rows)
    G.rows_matmul(p.grad[:, 16:32], p.weight[16:32], p.count, sums, start=sums, **rows)
    G.rows_matmul(p.grad[:, 32:], p.weight[32:], p.count, out, start=sums, **rows)
    exact = torch.zeros(n, 40, dtype=torch.float64, device=device)
    exact[p.live] = 0.25 * (p.grad[p.live].double() @ p.weight.double())
    assert ((out.double() - exact).abs() <= 2**-7 * exact.abs() + 1e-5).all()  # the interpreter truncates to bfloat16

    factors = torch.linspace(-1, 1, n, device=device)
    G.rows_matmul(p.grad, p.weight, p.count, sums, factors=factors, **rows)
    close(sums[p.live], 0.25 * factors.double()[p.live, None] * (p.grad[p.live].double() @ p.weight.double()), 64)

    weight = torch.ones(64, 40, device=device)
    G.depth_matmul(p.grad, p.front_h, p.count, weight, index=p.index, start=weight, scale=scale, **options(arch))
    close(weight, 1 + 0.25 * (p.grad[p.live].double().t() @ p.h[p.live].double()), 70)


def test_without_a_live_row(problem, arch):
    """depth_matmul still writes every element: zeros, or what it starts from."""
    p = problem(20, 24, 40, 0.0, torch.bfloat16)
    for a, index in ((p.grad, p.index), (p.front_grad, None)):
        out = torch.full((40, 24), torch.nan, dtype=torch.bfloat16, device=p.h.device)
        G.depth_matmul(a, p.front_h, p.count, out, index=index, **options(arch))
        assert (out == 0).all()
        start = torch.randn(40, 24, device=p.h.device)
        G.depth_matmul(a, p.front_h, p.count, out, index=index, start=start, **options(arch))
        assert torch.allclose(out.float(), start, rtol=2**-7)


def test_any_strides(problem, arch):
    """A transposed head, results into parts of larger matrices, and rows that are not 16-byte aligned."""
    p = problem(37, 33, 71, 0.5, torch.bfloat16)
    rows = {"index": p.index, "out_index": p.index, **options(arch)}
    memory = torch.zeros(37, 67, device=p.h.device)
    G.rows_matmul(p.grad, p.weight.t().contiguous().t(), p.count, memory[:, ::2][:, :33], **rows)
    expected = torch.zeros(37, 33, device=p.h.device)
    G.rows_matmul(p.grad, p.weight, p.count, expected, **rows)
    assert torch.equal(memory[:, ::2][:, :33], expected)
    assert not memory[:, 1::2].any()
    transposed = torch.zeros(33, 71, device=p.h.device)
    G.depth_matmul(p.grad, p.front_h, p.count, transposed.t(), index=p.index, **options(arch))
    expected = torch.zeros(71, 33, device=p.h.device)
    G.depth_matmul(p.grad, p.front_h, p.count, expected, index=p.index, **options(arch))
    assert torch.equal(transposed.t(), expected)


@settings(max_examples=5)
@given(
    n=st.integers(1, 70), width=st.integers(1, 40), vocab=st.integers(1, 70), live=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99), programs=st.integers(1, 9),
)  # fmt: skip
def test_any_shape(n, width, vocab, live, dtype, seed, programs, problem, arch):
    p = problem(n, width, vocab, live, dtype, seed)
    results = all_three(p, arch)
    again = torch.full((vocab, width), torch.nan, device=p.h.device)
    G.depth_matmul(p.grad, p.front_h, p.count, again, index=p.index, arch=arch, programs=programs, tiles=TILES)
    assert torch.equal(again, results[2]), "depends on how many programs there are"


@pytest.mark.parametrize("change", [{"block_m": 48}, {"parts": 3}, {"block_k": 128}])
def test_impossible_tiles(change):
    sizes = {"block_m": 64, "block_n": 64, "block_k": 32, "num_warps": 4, "num_stages": 2} | change
    with pytest.raises(ValueError, match=f"GemmTiles.{next(iter(change))} must"):
        G.GemmTiles(**sizes)
