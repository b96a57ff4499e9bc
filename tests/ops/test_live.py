"""Rows without a gradient on an accelerator: its way on CPU tensors, with plain PyTorch for the kernels (their own
tests are in tests/kernels). And what skip_rows="auto" goes by.
"""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager

import pytest
import torch

from fastalign.linear import linear_ppo_loss
from fastalign.ops import backends, linear_logps, linear_logps_reference, linear_loss, live
from fastalign.ops import rows as R

N, H, V = 150, 64, 403


def live_rows(base, target, entropy):
    alive = (base != 0) | (target != 0)
    if entropy is not None:
        alive |= entropy != 0
    index = torch.cat([alive.nonzero()[:, 0], (~alive).nonzero()[:, 0]])
    return index, alive.sum(dtype=torch.int32)[None]


def gather_rows(source, index, count, out):
    m, padded = int(count), -(-max(int(count), 1) // 64) * 64
    out[m:padded] = 0
    out[:m] = source[index[:m]]


def rows_matmul(a, b, count, out, *, index=None, out_index=None, start=None, factors=None, scale=None, **_):
    m = int(count)
    rows, places = (slice(0, m) if i is None else i[:m] for i in (index, out_index))
    product = a[rows].float() @ b.float()
    for multiple in (None if factors is None else factors[rows, None], scale):
        product = product if multiple is None else product * multiple
    out[places] = (product if start is None else product + start[places]).to(out.dtype)


def depth_matmul(a, b, count, out, *, index, start=None, scale=None, **_):
    m = int(count)
    product = a[index[:m]].float().t() @ b[:m].float()
    product = product if scale is None else product * scale
    out.copy_(product if start is None else product + start)


def row_grad(tile, bias, targets, v0, stats, coef, spec, out, rows=None):
    """As the kernels do: rows without coefficients are not read, whatever memory holds there."""
    dead = (coef.base == 0) & (coef.target == 0)
    if coef.entropy is not None:
        dead &= coef.entropy == 0
    R.row_grad(tile.masked_fill(dead[:, None], 0), bias, targets, v0, stats, coef, spec, out, rows)
    out.masked_fill_(dead[:, None], 0)


@pytest.fixture
def shares(monkeypatch):
    """What "auto" goes by, forgotten before and after."""
    live.forget_shares()
    yield live._shares
    live.forget_shares()


@pytest.fixture
def device_rows(gpu_tiles, shares, monkeypatch):
    """device_rows(fused): the torch backend on an accelerator's way, with kernels for live rows. Counts their calls."""
    calls = []

    def counted(function):
        def call(*args, **kwargs):
            calls.append((function.__name__, int(args[2])))
            return function(*args, **kwargs)

        return call

    kernels = live._Kernels(live_rows, gather_rows, counted(rows_matmul), counted(depth_matmul))
    monkeypatch.setattr(live, "_kernels", lambda: kernels)
    monkeypatch.setattr(live, "served", lambda backend, device: True)
    torch.use_deterministic_algorithms(False)

    def use(*, fused: bool):
        gpu_tiles(fused=fused)
        found = dataclasses.replace(backends._load("torch"), row_grad=row_grad)
        monkeypatch.setattr(backends, "_load", lambda name: found)
        return calls

    return use


CASES = {  # schedule, workspace in MiB
    "no tile": ("deferred", 16),
    "several tiles": ("deferred", 0.05),
    "all overlaid": ("overlaid", 16),
    "some overlaid": ("overlaid", 0.1),
    "all kept": ("cached", 16),
    "some kept": ("cached", 0.25),
}


def combinations():
    """Dtype, case, fused kernels, share of live rows, share of ignored ones (none: all rows of hidden count)."""
    for case in CASES:
        for fused in (False, True):
            yield torch.bfloat16, case, fused, 0.3, 0.3
        yield torch.bfloat16, case, False, 0.3, 0.0
        yield torch.float32, case, False, 0.3, 0.3
        if CASES[case][0] != "cached":  # exponentials do not fit float16
            yield torch.float16, case, False, 0.3, 0.3
    for case in ("no tile", "all kept"):
        yield torch.bfloat16, case, True, 0.0, 0.0


@contextmanager
def poisoned_memory():
    """New memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("dtype", "case", "fused", "share", "ignored"), [*combinations()], ids=str)
def test_gradients(make_problem, within_rule, device_rows, dtype, case, fused, share, ignored):
    """Of every schedule within the rule, from GEMMs over the live rows alone."""
    schedule, workspace_mb = CASES[case]
    calls = device_rows(fused=fused)
    bias = not fused
    needs = (True, True, bias)
    problem = make_problem(n=N, H=H, V=V, dtype=dtype, peaked=True, bias=bias, needs=needs, ignored=ignored)
    chosen = torch.rand(N, generator=torch.Generator().manual_seed(1)) < share

    def gradients(p, out):
        total = (out.logps.double() * chosen * torch.linspace(-1, 1, N)).sum() + (out.lse * chosen).sum()
        return torch.autograd.grad(total, p.leaves)

    ours = linear_logps(
        problem.hidden, problem.weight, problem.targets, bias=problem.bias, schedule=schedule,
        workspace_mb=workspace_mb, backend="torch", skip_rows="always",
    )  # fmt: skip
    exact_problem = problem.cast(torch.float64)
    naive, exact = (
        linear_logps_reference(p.hidden, p.weight, p.targets, bias=p.bias) for p in (problem, exact_problem)
    )
    with poisoned_memory():
        found = gradients(problem, ours)
    others = gradients(problem, naive), gradients(exact_problem, exact)
    for mine, theirs, true in zip(found, *others, strict=True):
        assert mine.dtype == dtype
        within_rule("gradient", mine, theirs, true, dtype)
    alive = int((chosen & (problem.targets != -100)).sum())
    depths = [rows for name, rows in calls if name == "depth_matmul"]
    assert depths
    assert sum(depths) % max(alive, 1) == 0, "some row took part twice, or not at all"
    assert max(depths) <= alive


@pytest.mark.parametrize("fused", [False, True], ids=["library", "fused"])
@pytest.mark.parametrize("workspace_mb", [16, 0.35], ids=["one chunk", "several"])
@pytest.mark.parametrize("schedule", ["streamed", "auto"])
def test_a_streamed_loss(device_rows, make_problem, schedule, workspace_mb, fused):
    """PPO's clipped tokens: the gradients are those of all rows, as one order of float32 sums is another's."""
    calls = device_rows(fused=fused)
    problem = make_problem(n=N, H=H, V=V, dtype=torch.bfloat16, bias=False)
    old = linear_logps_reference(*(t.detach().float() for t in (problem.hidden, problem.weight)), problem.targets).logps
    advantages = torch.randn(N, generator=torch.Generator().manual_seed(2))
    clipped = torch.arange(N) % 3 > 0
    given = {"old_logps": old - clipped * advantages.sign(), "advantages": advantages}

    def gradients(skip_rows):
        calls.clear()
        loss = linear_ppo_loss(
            problem.hidden, problem.weight, problem.targets, **given, schedule=schedule, workspace_mb=workspace_mb,
            backend="torch", skip_rows=skip_rows,
        ).loss  # fmt: skip
        return torch.autograd.grad(loss, problem.leaves), [rows for name, rows in calls if name == "depth_matmul"]

    full, none = gradients("never")
    assert not none
    ours, depths = gradients("always")
    assert sum(depths) == int((~clipped & (problem.targets != -100)).sum())
    for mine, true in zip(ours, full, strict=True):
        torch.testing.assert_close(mine, true, rtol=2e-2, atol=2e-2 * true.abs().max().item())


def test_a_second_backward(device_rows, make_problem):
    """What is kept serves another backward, of other live rows."""
    device_rows(fused=True)
    problem = make_problem(n=N, H=H, V=V, dtype=torch.bfloat16, bias=False)
    how = {"schedule": "cached", "backend": "torch", "skip_rows": "always"}
    out = linear_logps(problem.hidden, problem.weight, problem.targets, **how)
    coefs = torch.randn(2, N) * (torch.rand(2, N) < 0.5)
    first = torch.autograd.grad((out.logps * coefs[0]).sum(), problem.leaves, retain_graph=True)
    torch.autograd.grad((out.logps * coefs[1]).sum(), problem.leaves, retain_graph=True)
    for mine, true in zip(torch.autograd.grad((out.logps * coefs[0]).sum(), problem.leaves), first, strict=True):
        assert torch.equal(mine, true)


def test_auto_follows_the_share_of_live_rows(device_rows, make_problem, monkeypatch):
    """Over all rows while nothing is known or most are alive, over live rows where those are few."""
    calls = device_rows(fused=False)
    monkeypatch.setattr(live, "ENOUGH_ROWS", 16)
    monkeypatch.setattr(live, "PATIENCE", 3)
    problem = make_problem(n=N, H=16, V=40, dtype=torch.bfloat16, bias=False, ignored=0)

    def skipped(share):
        calls.clear()
        out = linear_logps(problem.hidden, problem.weight, problem.targets, schedule="deferred", backend="torch")
        chosen = torch.arange(N) < share * N
        torch.autograd.grad((out.logps * chosen).sum(), problem.leaves)
        return bool(calls)

    assert [skipped(0.2) for _ in range(3)] == [False, True, True]
    assert [skipped(1.0) for _ in range(3)] == [True, False, False]
    again = [skipped(0.2) for _ in range(2 * live.PATIENCE)]
    assert again[-1], "the share is asked for now and then"
    assert not again[0]
    torch.use_deterministic_algorithms(True)
    try:
        assert not skipped(0.2)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_share_never_waits():
    """A count that has not arrived leaves what was known, and is not followed by another."""
    share, arrived = live.Share(), []
    assert share.wants_count(0.8)
    share.send(torch.tensor([30], dtype=torch.int32), 100)
    share._sent = (lambda: bool(arrived), *share._sent[1:])
    assert share.look() is None
    assert not share.wants_count(0.8)
    arrived.append(1)
    assert share.look() == 0.3
    assert share.wants_count(0.8)


def test_few_rows_and_wide_operands_are_left_alone(device_rows, make_problem, shares):
    device_rows(fused=False)
    for dtype in (torch.bfloat16, torch.float32):
        problem = make_problem(n=N, H=H, V=V, dtype=dtype, bias=False)
        loss = linear_loss(
            lambda s, cu: -s.logps, problem.hidden, problem.weight, problem.targets, groups="tokens", backend="torch",
            schedule="streamed",
        ).loss  # fmt: skip
        torch.autograd.grad(loss, problem.leaves)
    assert not shares


def test_never_on_the_cpu(make_problem, monkeypatch):
    """Its GEMMs take all rows then, too."""
    asked = []
    monkeypatch.setattr(R, "live_rows", lambda coef: asked.append(1))
    problem = make_problem(n=40, bias=False, needs=(True, True, False))
    for skip_rows, times in (("never", 0), ("auto", 1)):
        out = linear_logps(
            problem.hidden, problem.weight, problem.targets, schedule="deferred", backend="torch", skip_rows=skip_rows
        )  # fmt: skip
        torch.autograd.grad(out.logps.sum(), problem.leaves)
        assert bool(asked) == bool(times)


def test_bad_option(make_problem):
    problem = make_problem(n=8)
    with pytest.raises(ValueError, match=r"skip_rows must be one of .*'sometimes'"):
        linear_logps(problem.hidden, problem.weight, problem.targets, skip_rows="sometimes")


@pytest.mark.skipif(not backends.interpreting(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("schedule", ["deferred", "streamed"])
def test_triton_kernels(gpu_tiles, make_problem, schedule):
    """The kernels themselves in their place, interpreted: the gradients of a step without skipping."""
    problem = make_problem(n=40, H=24, V=67, dtype=torch.bfloat16, bias=False)
    chosen = torch.arange(40) % 3 == 0

    def gradients(skip_rows):
        loss = linear_loss(
            lambda s, cu, chosen: s.logps * chosen, problem.hidden, problem.weight, problem.targets, groups="tokens",
            inputs={"chosen": chosen.float()}, schedule=schedule, backend="triton", skip_rows=skip_rows,
        ).loss  # fmt: skip
        return torch.autograd.grad(loss, problem.leaves)

    found = gradients("always")
    assert not found[0][~chosen].any()
    for mine, true in zip(found, gradients("never"), strict=True):
        torch.testing.assert_close(mine, true, rtol=2e-2, atol=2e-2 * true.abs().max().item())
