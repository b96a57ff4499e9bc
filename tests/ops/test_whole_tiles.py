"""Tiles of an accelerator, on CPU tensors: every gradient within the rule, with fused kernels and without."""

from __future__ import annotations

import pytest
import torch

from fastalign.ops import backends, linear_logps, linear_logps_reference, linear_loss, sequence_logps

CASES = {  # schedule, workspace in MiB: what the plan does with it (see the assertions of test_gpu_schedule)
    "no tile": ("deferred", 16),
    "several tiles": ("deferred", 0.05),
    "some overlaid": ("overlaid", 16),
    "all kept": ("cached", 16),
    "some kept": ("cached", 0.25),
    "frozen": ("frozen", 16),
    "frozen, several tiles": ("frozen", 0.2),
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("fused", [False, True], ids=["library", "fused"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients(make_problem, within_rule, gpu_tiles, dtype, case, fused):
    schedule, workspace_mb = CASES[case]
    if schedule == "cached" and dtype == torch.float16:
        pytest.skip("exponentials do not fit float16")
    gpu_tiles(fused=fused)
    frozen = schedule == "frozen"
    for bias in (False, True):
        needs = (True, not frozen, bias and not frozen)
        problem = make_problem(n=150, H=64, V=403, dtype=dtype, peaked=True, bias=bias, needs=needs)
        ours = linear_logps(
            problem.hidden, problem.weight, problem.targets, bias=problem.bias, schedule=schedule,
            workspace_mb=workspace_mb, backend="torch",
        )  # fmt: skip
        exact_problem = problem.cast(torch.float64)
        naive, exact = (
            linear_logps_reference(p.hidden, p.weight, p.targets, bias=p.bias) for p in (problem, exact_problem)
        )
        assert (ours.logps <= 0).all()
        within_rule("logps", ours.logps, naive.logps, exact.logps, dtype)
        for mine, theirs, true in zip(
            *(
                p.gradients(out, entropy=False)
                for p, out in ((problem, ours), (problem, naive), (exact_problem, exact))
            ),
            strict=True,
        ):
            assert mine.dtype == dtype
            within_rule("gradient", mine, theirs, true, dtype)


@pytest.mark.parametrize("fused", [False, True], ids=["library", "fused"])
def test_a_second_backward_finds_the_exponentials_again(make_problem, gpu_tiles, fused):
    gpu_tiles(fused=fused)
    problem = make_problem(n=75, H=64, V=403, dtype=torch.bfloat16, bias=False)
    out = linear_logps(problem.hidden, problem.weight, problem.targets, schedule="cached", backend="torch")
    coefs = torch.randn(2, 75)
    first = torch.autograd.grad((out.logps * coefs[0]).sum(), problem.leaves, retain_graph=True)
    torch.autograd.grad((out.logps * coefs[1]).sum(), problem.leaves, retain_graph=True)
    for mine, true in zip(torch.autograd.grad((out.logps * coefs[0]).sum(), problem.leaves), first, strict=True):
        assert torch.equal(mine, true)


def test_rows_whose_coefficients_cancel(gpu_tiles, make_problem):
    """a = c: the gradient is the target's alone, base is 0, and nothing divides by it; all zero: no gradient at all."""
    gpu_tiles(fused=True)
    problem = make_problem(n=64, H=64, V=403, dtype=torch.bfloat16, bias=False, ignored=0)
    out = linear_logps(problem.hidden, problem.weight, problem.targets, schedule="cached", backend="torch")
    coefs = torch.arange(64).remainder(3) - 1.0
    grad_hidden, grad_weight = torch.autograd.grad(((out.logps + out.lse) * coefs).sum(), problem.leaves)
    h, w = (t.detach().double() for t in problem.leaves)
    torch.testing.assert_close(grad_hidden.double(), coefs[:, None] * w[problem.targets], rtol=8e-3, atol=0)
    expected = torch.zeros_like(w).index_add_(0, problem.targets, coefs[:, None] * h)
    torch.testing.assert_close(grad_weight.double(), expected, rtol=2e-2, atol=2e-2)


LOSSES = {"streamed": 16, "streamed, several chunks": 0.35, "groups over the workspace": 0.06}


@pytest.mark.parametrize("fused", [False, True], ids=["library", "fused"])
@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("schedule", ["streamed", "auto"])
def test_streamed_losses(gpu_tiles, make_problem, within_rule, schedule, by_token, case, fused):
    """Pairs whose rows are no range, and single tokens; grad_output 2: no second rounding."""
    gpu_tiles(fused=fused)
    dtype = torch.bfloat16
    problem = make_problem(n=160, H=64, V=403, dtype=dtype, bias=False)
    weights = torch.rand(160) * (torch.arange(160) % 5 > 0)

    def by_pairs(scored, cu, weights):
        first, second = sequence_logps(scored.logps * weights, cu_seqlens=cu).chunk(2)
        return torch.nn.functional.softplus(second - first)

    def of_all(out):
        mask = problem.targets != -100
        if by_token:
            return -(out.logps * weights)[mask].sum()
        sums = (out.logps * weights * mask).view(8, 20).sum(1)
        return torch.nn.functional.softplus(sums[4:] - sums[:4]).sum()

    ours = linear_loss(
        (lambda s, cu, weights: -s.logps * weights) if by_token else by_pairs, problem.hidden.view(8, 20, 64),
        problem.weight, problem.targets.view(8, 20), groups="tokens" if by_token else [*range(4)] * 2,
        inputs={"weights": weights.view(8, 20)}, schedule=schedule, workspace_mb=LOSSES[case], backend="torch",
    ).loss  # fmt: skip
    exact_problem = problem.cast(torch.float64)
    naive, exact = (of_all(linear_logps_reference(p.hidden, p.weight, p.targets)) for p in (problem, exact_problem))
    torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-3)
    triples = (
        torch.autograd.grad(2 * x, p.leaves) for x, p in ((ours, problem), (naive, problem), (exact, exact_problem))
    )
    for mine, theirs, true in zip(*triples, strict=True):
        within_rule("gradient", mine, theirs, true, dtype)


def test_under_autocast(gpu_tiles, make_problem):
    """A float32 weight is rounded slab by slab, and its gradient is float32."""
    gpu_tiles(fused=True)
    problem = make_problem(n=75, H=64, V=403, bias=False)
    for schedule in ("deferred", "cached"):
        with torch.autocast("cpu", torch.bfloat16):
            out = linear_logps(problem.hidden, problem.weight, problem.targets, schedule=schedule, backend="torch")
        grads = torch.autograd.grad(out.logps.sum(), problem.leaves)
        rounded = problem.cast(torch.bfloat16).cast(torch.float64)
        exact = linear_logps_reference(rounded.hidden, rounded.weight, rounded.targets)
        for mine, true in zip(grads, torch.autograd.grad(exact.logps.sum(), rounded.leaves), strict=True):
            assert mine.dtype == torch.float32
            torch.testing.assert_close(mine.double(), true, rtol=2e-2, atol=2e-2)


def test_an_entropy_that_is_a_metric_lets_exponentials_wait(gpu_tiles, make_problem, within_rule):
    gpu_tiles(fused=True)
    problem = make_problem(n=75, H=64, V=403, dtype=torch.bfloat16, bias=False)
    how = {"entropy": True, "backend": "torch", "workspace_mb": 16}
    with pytest.raises(ValueError, match="an entropy output"):
        linear_logps(problem.hidden, problem.weight, problem.targets, schedule="cached", **how)
    out = linear_logps(problem.hidden, problem.weight, problem.targets, schedule="cached", entropy_grad=False, **how)
    assert not out.entropy.requires_grad
    exact_problem = problem.cast(torch.float64)
    naive, exact = (linear_logps_reference(p.hidden, p.weight, p.targets) for p in (problem, exact_problem))
    within_rule("entropy", out.entropy, naive.entropy.detach(), exact.entropy.detach(), torch.bfloat16)
    (grad_weight,) = torch.autograd.grad(-exact.logps.sum(), [exact_problem.weight], retain_graph=True)
    pairs = ((problem, out), (problem, naive), (exact_problem, exact))
    for mine, theirs, true in zip(*(p.gradients(o, entropy=False) for p, o in pairs), strict=True):
        within_rule("gradient", mine, theirs, true, torch.bfloat16)

    def loss_fn(scored, cu):
        assert not scored.entropy.requires_grad
        return -scored.logps

    for schedule in ("streamed", "auto"):
        loss = linear_loss(
            loss_fn, problem.hidden, problem.weight, problem.targets, groups="tokens", schedule=schedule,
            entropy_grad=False, **how,
        ).loss  # fmt: skip
        (mine,) = torch.autograd.grad(loss, [problem.weight])
        torch.testing.assert_close(mine.double(), grad_weight, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(not backends.interpreting(), reason="runs interpreted kernels: set TRITON_INTERPRET=1")
@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("schedule", ["cached", "frozen", "streamed", "deferred"])
def test_kernels_in_their_place(gpu_tiles, make_problem, within_rule, schedule, backend):
    """The fused forward, the exponentials that it leaves, and what becomes of them."""
    dtype, needs = torch.bfloat16, (True, schedule != "frozen", False)
    problem = make_problem(n=40, H=32, V=300, dtype=dtype, bias=False, peaked=True, needs=needs)
    how = {"schedule": schedule, "backend": backend, "workspace_mb": 4}
    if schedule == "streamed":
        loss = linear_loss(
            lambda s, cu: -s.logps, problem.hidden, problem.weight, problem.targets, groups="tokens", **how
        )
        total = loss.loss
    else:
        total = -linear_logps(problem.hidden, problem.weight, problem.targets, **how).logps.sum()
    exact_problem = problem.cast(torch.float64)
    naive, exact = (
        -linear_logps_reference(p.hidden, p.weight, p.targets).logps.sum() for p in (problem, exact_problem)
    )
    torch.testing.assert_close(total.double(), exact, rtol=1e-4, atol=1e-4)
    pairs = ((problem, total), (problem, naive), (exact_problem, exact))
    for mine, theirs, true in zip(*(torch.autograd.grad(x, p.leaves) for p, x in pairs), strict=True):
        within_rule("gradient", mine, theirs, true, dtype)
