"""Rows without a gradient on a GPU: the kernels at real sizes, a step with and without them, a captured graph.

    pytest -m gpu tests/kernels/test_gpu_live.py         with 16 GB of device memory

The tests of interpreted/ run compiled where there is a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

from fastalign.kernels import live_gemm, live_rows

from fastalign.linear import linear_ppo_loss
from fastalign.ops import backends, linear_logps, live

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET is set: nothing is compiled"
    ),
]


@pytest.fixture(autouse=True)
def shares(device):
    live.forget_shares()
    yield live._shares
    live.forget_shares()


def on(device):
    return {"arch": backends.architecture(device), "programs": backends.multiprocessors(device)}


def rows_of(n, share, device, seed=0):
    g = torch.Generator(device).manual_seed(seed)
    chosen = torch.rand(n, generator=g, device=device) < share
    index, count = live_rows.live_rows(chosen.float(), torch.zeros(n, device=device), None)
    return chosen, index, count


@pytest.mark.parametrize("n", [1, 1023, 200_000, 5_000_000])
def test_a_stable_partition_of_many_rows(n, device):
    chosen, index, count = rows_of(n, 0.37, device)
    assert torch.equal(index, torch.cat([chosen.nonzero()[:, 0], (~chosen).nonzero()[:, 0]]))
    assert int(count) == int(chosen.sum())


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize(("n", "width", "vocab"), [(4096, 4096, 32768), (3001, 2048, 50257), (2048, 1000, 8200)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_at_real_sizes(n, width, vocab, share, dtype, device):
    """The gradient lies over the float32 tile it comes from: a pitch of twice its width, garbage in between."""
    g = torch.Generator(device).manual_seed(0)
    pitch = -(-vocab // 8) * 8
    grad = torch.full((n, pitch), torch.nan, device=device).view(dtype)[:, :vocab]
    grad.copy_(torch.randn(n, vocab, generator=g, device=device) / vocab**0.5)
    h, weight = (torch.randn(size, generator=g, device=device).to(dtype) for size in ((n, width), (vocab, width)))
    _, index, count = rows_of(n, share, device)
    m = int(count)
    picked = index[:m]
    front = torch.full((-(-n // 16) * 16, width), torch.nan, dtype=dtype, device=device)
    live_rows.gather_rows(h, index, count, front)
    grad[index[m:]] = torch.nan  # is not read

    def products():
        hidden = torch.full((n, width), 7.0, device=device)
        live_gemm.rows_matmul(grad, weight, count, hidden, index=index, out_index=index, **on(device))
        weights = torch.full((vocab, width), torch.nan, device=device)
        live_gemm.depth_matmul(grad, front, count, weights, index=index, **on(device))
        logits = torch.full((n, vocab), 7.0, device=device)
        live_gemm.rows_matmul(front, weight.t(), count, logits, out_index=index, **on(device))
        return hidden, weights, logits

    hidden, weights, logits = found = products()
    assert (hidden[index[m:]] == 7).all()
    assert (logits[index[m:]] == 7).all()
    pairs = (
        (hidden[picked], grad[picked].float() @ weight.float()),
        (weights, grad[picked].float().t() @ front[:m].float()),
        (logits[picked], front[:m].float() @ weight.t().float()),
    )
    for ours, exact in pairs:
        assert ours.isfinite().all()
        assert m == 0 or (ours - exact).norm() <= 2e-6 * exact.norm() + 1e-6
    for _ in range(3):
        for first, again in zip(found, products(), strict=True):
            assert torch.equal(first, again), "not deterministic"


def test_more_elements_than_32_bits_count(device):
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 16e9:
        pytest.skip("needs 16 GB of free device memory")
    n, vocab, width = 20_000, 131_072, 64
    grad = torch.zeros(n, vocab, dtype=torch.bfloat16, device=device)
    chosen = torch.zeros(n, device=device)
    chosen[[0, n - 2, n - 1]] = 1
    grad[-2:] = torch.randn(2, vocab, device=device).to(grad.dtype)
    weight = torch.randn(vocab, width, device=device).to(grad.dtype)
    index, count = live_rows.live_rows(chosen, torch.zeros_like(chosen), None)
    out = torch.zeros(n, width, device=device)
    live_gemm.rows_matmul(grad, weight, count, out, index=index, out_index=index, **on(device))
    exact = grad[-2:].float() @ weight.float()
    assert (out[-2:] - exact).norm() <= 1e-5 * exact.norm()
    assert not out[:-2].any()


def step(device, n=3000, width=1024, vocab=32_003, seed=0, dtype=torch.bfloat16):
    """A PPO step's head, and the share of its tokens that the clip leaves."""
    g = torch.Generator(device).manual_seed(seed)
    hidden, weight = (torch.randn(size, generator=g, device=device) for size in ((n, width), (vocab, width)))
    hidden, weight = hidden.to(dtype).requires_grad_(), (weight / width**0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (n,), generator=g, device=device)
    rows = torch.arange(n)
    with torch.no_grad():
        logps = linear_logps(hidden, weight, targets, rows=rows).logps
    clipped = torch.rand(n, generator=g, device=device) < 0.7
    given = {"old_logps": logps - clipped.float(), "advantages": torch.ones(n, device=device)}
    return hidden, weight, targets, rows, given, clipped


@pytest.mark.parametrize("workspace_mb", [None, 100])
@pytest.mark.parametrize("schedule", ["auto", "streamed", "deferred", "cached", "overlaid"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_step_equals_the_full_one(device, schedule, workspace_mb, backend):
    hidden, weight, targets, rows, given, clipped = step(device)
    try:
        backends.resolve(backend, hidden)
    except ValueError as error:
        pytest.skip(str(error))

    def gradients(skip_rows):
        loss = linear_ppo_loss(
            hidden, weight, targets, **given, rows=rows, schedule=schedule, workspace_mb=workspace_mb, backend=backend,
            skip_rows=skip_rows,
        ).loss  # fmt: skip
        return torch.autograd.grad(loss, (hidden, weight))

    full, ours = gradients("never"), gradients("always")
    assert not ours[0][clipped].any()
    for mine, true in zip(ours, full, strict=True):
        assert (mine.float() - true.float()).norm() <= 4e-3 * true.float().norm()
    for mine, again in zip(ours, gradients("always"), strict=True):
        assert torch.equal(mine, again), "not deterministic"


def test_auto_learns_without_waiting(device, shares):
    """The first call takes all rows, later ones the live rows alone; nothing synchronises."""
    hidden, weight, targets, rows, given, clipped = step(device)

    def call():
        loss = linear_ppo_loss(hidden, weight, targets, **given, rows=rows).loss
        return torch.autograd.grad(loss, (hidden, weight))

    expected = call()
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
        found = call()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    (share,) = shares.values()
    torch.cuda.synchronize()
    assert share.look() == pytest.approx(1 - clipped.float().mean().item(), abs=1e-6)
    for mine, true in zip(found, expected, strict=True):
        assert (mine.float() - true.float()).norm() <= 4e-3 * true.float().norm()


def test_a_busy_device_is_not_waited_for(device):
    share = live.Share()
    torch.cuda._sleep(400_000_000)
    share.send(torch.full((1,), 25, dtype=torch.int32, device=device), 100)
    assert share.look() is None
    assert not share.wants_count(0.8)
    torch.cuda.synchronize()
    assert share.look() == 0.25


def test_a_captured_graph_skips_anew(device):
    """Other rows at every replay, none and all of them among those."""
    n, width, vocab = 1000, 256, 4096
    coef = torch.zeros(n, device=device)
    grad, h, weight = (
        torch.randn(size, device=device).to(torch.bfloat16) for size in ((n, vocab), (n, width), (vocab, width))
    )
    front = torch.empty(-(-n // 16) * 16, width, dtype=torch.bfloat16, device=device)
    hidden, weights = torch.empty(n, width, device=device), torch.empty(vocab, width, device=device)

    def products():
        index, count = live_rows.live_rows(coef, torch.zeros_like(coef), None)
        live_rows.gather_rows(h, index, count, front)
        hidden.zero_()
        live_gemm.rows_matmul(grad, weight, count, hidden, index=index, out_index=index, **on(device))
        live_gemm.depth_matmul(grad, front, count, weights, index=index, **on(device))

    products()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        products()
    for share in (0.5, 0.0, 1.0, 0.1):
        coef.copy_(torch.rand(n, device=device) < share)
        graph.replay()
        kept = grad.float() * coef[:, None]
        for ours, exact in ((hidden, kept @ weight.float()), (weights, kept.t() @ h.float())):
            assert (ours - exact).norm() <= 2e-6 * exact.norm() + 1e-6
