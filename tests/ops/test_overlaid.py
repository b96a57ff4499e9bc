"""Logits in the memory of the weight's gradient: the gradients, whose memory it is, and where it cannot be."""

from __future__ import annotations

import pytest
import torch

from fastalign.ops import linear_logps, linear_logps_reference
from fastalign.ops.schedule import plan
from fastalign.ops.tiles import Tiles


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_overlaid(make_problem, dtype):
    problem = make_problem(n=24, H=32, dtype=dtype)
    args = (
        problem.hidden, problem.weight, problem.bias, problem.targets, None, False, 1.0, 1.0, False, -100,
        [True, False, False, False, True], [True, True, True], "torch", "overlaid", 0, 2**20, "auto", torch.float32,
        None,
    )  # fmt: skip
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")  # compiled calls do not overlay
    torch.library.opcheck(torch.ops.fastalign.linear_logps, args, test_utils=checks)


OVERLAID = {  # n, H, workspace: which rows wait in the gradient's memory
    "all": (40, 64, 16),
    "some of one tile": (75, 32, 16),
    "some of the first tile": (104, 32, 0.05),
}


@pytest.mark.parametrize("size", OVERLAID)
@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_in_the_memory_of_the_gradient(make_problem, within_rule, backend, dtype, softcap, size):
    n, H, workspace_mb = OVERLAID[size]
    problem = make_problem(n=n, H=H, V=403, dtype=dtype, ignored=0.1)
    ours = linear_logps(
        problem.hidden, problem.weight, problem.targets, bias=problem.bias, entropy=True, schedule="overlaid",
        workspace_mb=workspace_mb, backend=backend, softcap=softcap,
    )  # fmt: skip
    exact_problem = problem.cast(torch.float64)
    naive, exact = (
        linear_logps_reference(p.hidden, p.weight, p.targets, bias=p.bias, softcap=softcap)
        for p in (problem, exact_problem)
    )
    for mine, theirs, true in zip(
        problem.gradients(ours), problem.gradients(naive), exact_problem.gradients(exact), strict=True
    ):
        assert mine.dtype == dtype
        within_rule("gradient", mine, theirs, true, dtype)


def test_an_overlaid_gradient_is_nobodys_copy(make_problem):
    """The parameter's .grad is the very memory that held the logits."""
    problem = make_problem(n=40, H=64)
    out = linear_logps(problem.hidden, problem.weight, problem.targets, schedule="overlaid")
    memory = out.logps.grad_fn.next_functions[0][0].saved_tensors[-1].data_ptr()
    out.logps.sum().backward()
    assert problem.weight.grad.data_ptr() == memory


def test_an_overlay_needs_a_gradient_and_an_uncompiled_call(make_problem):
    problem = make_problem(n=40, H=64, needs=(True, False, False))
    with pytest.raises(ValueError, match="weight needs none"):
        linear_logps(problem.hidden, problem.weight, problem.targets, schedule="overlaid")
    with pytest.raises(ValueError, match="needs H ≥ 16, got H = 8"):
        plan(100, 8, 1000, schedule="overlaid")

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(hidden, weight, targets):
        return linear_logps(hidden, weight, targets, schedule="overlaid").logps

    with pytest.raises(Exception, match="cannot be compiled"):
        compiled(problem.hidden, problem.weight.detach().requires_grad_(), problem.targets)


def test_under_autocast(make_problem, backend):
    """16-bit logits' gradients summed in a float32 weight's gradient, which holds float32 logits of as many rows."""
    problem = make_problem(n=75, H=32, bias=False)
    call = {"backend": backend, "workspace_mb": 16}
    grads = []
    for schedule in ("overlaid", "deferred"):
        with torch.autocast("cpu", torch.bfloat16):
            out = linear_logps(problem.hidden, problem.weight, problem.targets, schedule=schedule, **call)
        grads.append(torch.autograd.grad(out.logps.sum(), [problem.hidden, problem.weight]))
    for mine, theirs in zip(*grads, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_two_calls_before_one_backward(make_problem, backend):
    problem = make_problem(n=40, H=64)
    halves = [slice(0, 17), slice(17, 40)]
    call = {"bias": problem.bias, "schedule": "overlaid", "backend": backend}
    whole = linear_logps(problem.hidden, problem.weight, problem.targets, **call)
    parts = [linear_logps(problem.hidden[i], problem.weight, problem.targets[i], **call) for i in halves]
    expected = torch.autograd.grad(whole.logps.sum(), problem.leaves)
    for mine, theirs in zip(
        torch.autograd.grad(sum(p.logps.sum() for p in parts), problem.leaves), expected, strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_backward_that_fails_leaves_no_trap(make_problem, monkeypatch):
    """Out of memory half-way, caught, and called again: what was overwritten is not taken for logits."""
    problem = make_problem(n=40, H=64, V=3000)
    out = linear_logps(problem.hidden, problem.weight, problem.targets, schedule="overlaid", backend="torch")
    (expected,) = torch.autograd.grad(
        linear_logps(problem.hidden, problem.weight, problem.targets, schedule="deferred").logps.sum(), [problem.weight]
    )
    store, calls = Tiles._store_rows, []

    def fail_once(self, *arguments):
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError("no more")
        return store(self, *arguments)

    monkeypatch.setattr(Tiles, "_store_rows", fail_once)
    with pytest.raises(MemoryError):
        torch.autograd.grad(out.logps.sum(), [problem.weight], retain_graph=True)
    (grad,) = torch.autograd.grad(out.logps.sum(), [problem.weight])
    torch.testing.assert_close(grad, expected)
