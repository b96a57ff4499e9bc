"""The weight's gradient added to a float32 buffer: equal to the ordinary one, and refused where it cannot be."""

from __future__ import annotations

import pytest
import torch

from fastalign.linear import linear_cross_entropy, linear_dpo_loss, linear_ppo_loss
from fastalign.ops import linear_logps, linear_loss


@pytest.mark.parametrize("style", ["cpu", "gpu", "gpu, fused"])
@pytest.mark.parametrize(("schedule", "workspace_mb"), [("auto", 8), ("deferred", 0.1), ("cached", 8), ("cached", 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_the_ordinary_gradient_in_float32(make_problem, gpu_tiles, dtype, schedule, workspace_mb, style, request):
    if schedule == "cached" and dtype == torch.float16:
        pytest.skip("exponentials do not fit float16")
    if style == "cpu":
        request.getfixturevalue("monkeypatch").undo()
    else:
        gpu_tiles(fused=style.endswith("fused"))
    problem = make_problem(n=120, H=64, V=303, dtype=dtype)
    call = {"bias": problem.bias, "schedule": schedule, "workspace_mb": workspace_mb, "backend": "torch"}
    held = torch.randn(303, 64)
    before = held.clone()
    coefs = torch.randn(2, 120)

    def run(i: int, **more) -> tuple[torch.Tensor, ...]:
        out = linear_logps(problem.hidden, problem.weight, problem.targets, **call, **more)
        return torch.autograd.grad((out.logps * coefs[i]).sum(), problem.leaves, allow_unused=True)

    ordinary = [run(i) for i in range(2)]
    for i in range(2):
        hidden, weight, bias = run(i, accumulate_into=held)
        assert weight is None
        for mine, true in ((hidden, ordinary[i][0]), (bias, ordinary[i][2])):
            torch.testing.assert_close(mine, true, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-5)
    added = held - before
    expected = sum(grads[1].float() for grads in ordinary)
    scale = float(expected.abs().max())
    torch.testing.assert_close(added, expected, rtol=0, atol=scale * (1e-6 if dtype == torch.float32 else 8e-3))


def test_every_fused_loss_takes_it(make_problem):
    problem = make_problem(n=48, H=16, V=61, bias=False, ignored=0)
    hidden, weight, targets = problem.hidden.view(4, 12, 16), problem.weight, problem.targets.view(4, 12)
    per_token = {"old_logps": torch.randn(4, 12), "advantages": torch.randn(4, 12)}
    losses = {
        "ce": lambda **more: linear_cross_entropy(hidden, weight, targets, **more),
        "dpo": lambda **more: linear_dpo_loss(hidden, weight, targets, ref_logps=torch.zeros(4), **more),
        "ppo": lambda **more: linear_ppo_loss(hidden, weight, targets, **per_token, **more),
    }
    for name, loss in losses.items():
        true = torch.autograd.grad(loss().loss, [problem.hidden, weight])
        held = torch.zeros_like(weight)
        held_hidden, none = torch.autograd.grad(
            loss(accumulate_into=held).loss, [problem.hidden, weight], allow_unused=True
        )
        assert none is None, name
        torch.testing.assert_close(held, true[1], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(held_hidden, true[0], rtol=1e-4, atol=1e-6)


def test_micro_batches_add_up_in_the_weights_own_gradient(make_problem):
    """`weight.grad` of a float32 weight, several calls before their backward."""
    problem = make_problem(n=60, H=16, V=61, bias=False)
    halves = [slice(0, 25), slice(25, 60)]
    whole = linear_logps(problem.hidden, problem.weight, problem.targets).logps.sum()
    (true,) = torch.autograd.grad(whole, [problem.weight])
    problem.weight.grad = torch.zeros_like(problem.weight)
    losses = [
        linear_logps(
            problem.hidden[i], problem.weight, problem.targets[i], accumulate_into=problem.weight.grad
        ).logps.sum()
        for i in halves
    ]
    sum(losses).backward()
    torch.testing.assert_close(problem.weight.grad, true, rtol=1e-4, atol=1e-5)


WRONG = {
    "must be contiguous torch.float32": {"accumulate_into": torch.zeros(61, 16, dtype=torch.bfloat16)},
    r"\(61, 16\) on cpu like weight, got torch.float32 \(16, 61\)": {"accumulate_into": torch.zeros(16, 61)},
    "must be contiguous": {"accumulate_into": torch.zeros(16, 61).t()},
    "it must not require one": {"accumulate_into": torch.zeros(61, 16, requires_grad=True)},
    "take 'auto', 'deferred' or 'cached'": {"accumulate_into": torch.zeros(61, 16), "schedule": "overlaid"},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_take_it_is_refused(make_problem, message):
    problem = make_problem(n=20, H=16, V=61, bias=False)
    with pytest.raises(ValueError, match=message):
        linear_logps(problem.hidden, problem.weight, problem.targets, **WRONG[message])


def test_weights_that_cannot_give_it_are_refused(make_problem):
    problem = make_problem(n=20, H=16, V=61, bias=False)
    hidden, weight, targets = problem.hidden, problem.weight, problem.targets
    held = torch.zeros(61, 16)
    with pytest.raises(ValueError, match="but weight needs none"):
        linear_logps(hidden, weight.detach(), targets, accumulate_into=held)
    with pytest.raises(ValueError, match="the weight's own memory"):
        linear_logps(hidden, weight, targets, accumulate_into=weight.detach())
    with pytest.raises(ValueError, match="schedule='streamed'"):
        linear_loss(
            lambda s, cu: -s.logps, hidden, weight, targets, groups="tokens", schedule="streamed", accumulate_into=held
        )
    handle = weight.register_hook(lambda grad: grad)
    with pytest.raises(ValueError, match="weight has gradient hooks"):
        linear_logps(hidden, weight, targets, accumulate_into=held)
    handle.remove()

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(hidden, weight, targets):
        return linear_logps(hidden, weight, targets, accumulate_into=held).logps

    with pytest.raises(Exception, match="for eager calls"):
        compiled(hidden, weight, targets)
