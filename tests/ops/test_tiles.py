"""Rows whose coefficients are all zero stay out of the gradient GEMMs, and nothing else changes."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.ops import linear_logps, linear_logps_reference, linear_loss, sequence_logps
from fastalign.ops import rows as R
from fastalign.ops.tile_sizes import align
from fastalign.ops.tiles import Tiles

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}


@contextmanager
def poisoned_memory():
    """What is allocated without a value holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def gemm_rows():
    """The row counts of the gradient tiles that enter a GEMM for the weight's gradient."""
    counts: list[int] = []
    add = Tiles.add_weight

    def counting(self, sinks, v0, v1, grad, h, scale, *alive):
        assert grad.shape[0] == h.shape[0]
        if v0 == 0:
            counts.append(grad.shape[0])
        add(self, sinks, v0, v1, grad, h, scale, *alive)

    with mock.patch.object(Tiles, "add_weight", counting):
        yield counts


def without_skipping():
    return mock.patch.object(R, "live_rows", return_value=None)


def build(n, H, V, live, dtype, seed, *, bias=True, weight_grad=True, ignored=0.1):
    """Two sequences of n tokens; `live` of them have a coefficient for the log-prob, lse and entropy."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, n, H, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, generator=g) * 0.3).to(dtype).requires_grad_(weight_grad)
    b = torch.randn(V, generator=g).to(dtype).requires_grad_() if bias else None
    targets = torch.randint(0, V, (2, n), generator=g)
    targets[torch.rand(2, n, generator=g) < ignored] = -100
    alive = torch.rand(2, n, generator=g) < live
    coefs = torch.randn(3, 2, n, generator=g).to(torch.float64 if dtype == torch.float64 else torch.float32) * alive
    return hidden, weight, b, targets, coefs, alive & (targets != -100)


def linear_in_outputs(entropy):
    def loss_fn(scored, cu, a, c, e):
        losses = a * scored.logps + c * scored.lse + (e * scored.entropy if entropy else 0)
        return sequence_logps(losses, cu_seqlens=cu).sum()[None]

    return loss_fn


def gradients(problem, *, entropy, schedule, workspace_mb, softcap, backend="auto"):
    hidden, weight, bias, targets, (a, c, e), _ = problem
    loss = linear_loss(
        linear_in_outputs(entropy), hidden, weight, targets, bias=bias, groups=[0, 0], inputs={"a": a, "c": c, "e": e},
        entropy=entropy, schedule=schedule, workspace_mb=workspace_mb, softcap=softcap, backend=backend,
    ).loss  # fmt: skip
    leaves = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    return loss, torch.autograd.grad(loss, leaves)


@settings(max_examples=60)
@given(
    n=st.integers(1, 90), H=st.integers(32, 50), V=st.integers(2, 150), workspace_kb=st.integers(10, 400),
    live=st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.8, 1.0]), dtype=st.sampled_from(list(TOLERANCE)),
    schedule=st.sampled_from(["auto", "streamed", "deferred", "overlaid"]), entropy=st.booleans(), bias=st.booleans(),
    weight_grad=st.booleans(), softcap=st.sampled_from([None, 6.0]), seed=st.integers(0, 9),
)  # fmt: skip
def test_the_gradients_are_those_of_all_rows(
    n, H, V, workspace_kb, live, dtype, schedule, entropy, bias, weight_grad, softcap, seed
):
    """One group of two sequences: of one tile, or of several, which are then computed again."""
    if schedule == "overlaid" and not weight_grad:
        schedule = "deferred"
    problem = build(n, H, V, live, dtype, seed, bias=bias, weight_grad=weight_grad)
    how = {"entropy": entropy, "schedule": schedule, "workspace_mb": workspace_kb / 1024, "softcap": softcap}
    with poisoned_memory():
        with without_skipping():
            loss, expected = gradients(problem, **how)
        ours, grads = gradients(problem, **how)
    assert torch.equal(ours, loss)
    for mine, true in zip(grads, expected, strict=True):
        scale = float(true.abs().max()) if true.numel() else 1.0
        torch.testing.assert_close(mine, true, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * max(scale, 1e-3))
    dead = ~problem[-1].flatten()
    assert not grads[0].flatten(0, 1)[dead].any()


SCHEDULES = {  # workspace in MiB, schedule
    "one tile, streamed": (8, "streamed"),
    "a group over the workspace, streamed": (0.15, "streamed"),
    "deferred": (0.15, "deferred"),
    "all overlaid": (8, "overlaid"),
    "some overlaid": (0.1, "overlaid"),
    "some kept": (0.4, "cached"),
}


@pytest.mark.parametrize("case", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gemms_are_as_short_as_there_are_live_rows(case, dtype, backend):
    workspace_mb, schedule = SCHEDULES[case]
    problem = build(150, 64, 300, 0.3, dtype, 0)
    entropy = schedule != "cached" or dtype == torch.float32  # exponentials carry none
    how = {"entropy": entropy, "schedule": schedule, "workspace_mb": workspace_mb, "softcap": None, "backend": backend}
    hidden, weight, bias, targets, coefs, alive = problem
    with poisoned_memory(), gemm_rows() as counts:
        _, grads = gradients(problem, **how)
    live, scored = int(alive.sum()), int((targets != -100).sum())
    assert live < scored / 2
    assert live <= sum(counts) <= align(live) + 16 * len(counts)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    out = linear_logps_reference(exact[0], exact[1], targets, bias=exact[2])
    a, c, e = coefs.double()
    loss = a * out.logps + c * out.lse + (e * out.entropy if entropy else 0)
    for mine, true in zip(grads, torch.autograd.grad(loss[targets != -100].sum(), exact), strict=True):
        assert (mine.double() - true).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * true.norm()


@pytest.mark.parametrize("schedule", ["streamed", "deferred", "overlaid", "cached"])
def test_without_a_live_row_there_is_no_gemm(schedule):
    problem = build(50, 64, 300, 0.0, torch.float32, 0, ignored=0.0)
    with poisoned_memory(), gemm_rows() as counts:
        loss, grads = gradients(problem, entropy=True, schedule=schedule, workspace_mb=0.5, softcap=None)
    assert counts == []
    assert loss == 0
    assert not any(grad.any() for grad in grads)


def test_a_frozen_head_whose_entropy_gets_a_gradient():
    """The kept D does not serve it: the logits of live rows are computed again."""
    problem = build(80, 24, 100, 0.4, torch.float64, 1, weight_grad=False, bias=False)
    hidden, weight, _, targets, (a, _, e), alive = problem
    ours, exact = linear_logps(hidden, weight, targets, entropy=True), linear_logps_reference(hidden, weight, targets)
    mine, true = (torch.autograd.grad((a * o.logps + e * o.entropy).sum(), hidden)[0] for o in (ours, exact))
    torch.testing.assert_close(mine, true)
    assert not mine[~alive].any()


@pytest.mark.parametrize("schedule", ["streamed", "deferred"])
def test_a_nan_coefficient_is_not_lost(schedule):
    problem = build(60, 24, 100, 0.3, torch.float32, 2, ignored=0.0)
    problem[4][0, 1, 7] = torch.nan
    _, (grad_hidden, grad_weight, _) = gradients(
        problem, entropy=False, schedule=schedule, workspace_mb=8, softcap=None
    )
    assert grad_hidden[1, 7].isnan().all()
    assert int(grad_hidden.isnan().any(-1).sum()) == 1
    assert grad_weight.isnan().all()


def test_a_retained_graph_gives_the_same_again():
    """The kept tile and the hidden states are still there after rows were gathered."""
    hidden, weight, bias, targets, coefs, _ = build(70, 32, 120, 0.4, torch.float32, 3)
    for schedule in ("cached", "overlaid"):
        out = linear_logps(hidden, weight, targets, bias=bias, schedule=schedule, workspace_mb=1)
        loss = (out.logps * coefs[0]).sum()
        first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
        for mine, true in zip(torch.autograd.grad(loss, [hidden, weight]), first, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-5)
