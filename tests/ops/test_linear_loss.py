"""Streamed losses equal the same loss applied to log-probs scored beforehand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.ops import linear_logps_reference, linear_loss, sequence_logps
from fastalign.types import Metric


def group_loss(scored, cu, scale):
    """A loss that mixes the log-probs, normaliser and lengths of the two sequences of a group."""
    sums, lse = sequence_logps(scored.logps, cu_seqlens=cu), sequence_logps(scored.lse, cu_seqlens=cu, reduction="mean")
    first, second = (sums * scale + 0.1 * lse + 0.01 * cu.diff()).chunk(2)
    return torch.nn.functional.softplus(second - first)


def build(P, T, H, V, ignored=0.4, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2 * P, T, H, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=g).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (2 * P, T), generator=g)
    targets[torch.rand(2 * P, T, generator=g) < ignored] = -100
    return hidden, weight, bias, targets, torch.rand(2 * P, generator=g).to(dtype)


def unfused(hidden, weight, bias, targets, scale):
    out = linear_logps_reference(hidden, weight, targets, bias=bias)
    mask = targets != -100
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    return group_loss(type(out)(out.logps[mask], out.lse[mask]), cu, scale).sum()


@settings(max_examples=40)
@given(
    P=st.integers(0, 5), T=st.integers(1, 20), H=st.integers(1, 40), V=st.integers(2, 90),
    workspace_kb=st.integers(2, 300), ignored=st.sampled_from([0.0, 0.5, 1.0]), packed=st.booleans(),
    schedule=st.sampled_from(["auto", "streamed"]), seed=st.integers(0, 9),
)  # fmt: skip
def test_streamed_equals_unfused(P, T, H, V, workspace_kb, ignored, packed, schedule, seed):
    """Whatever the workspace: chunks of many groups, of one, and groups that do not fit."""
    hidden, weight, bias, targets, scale = build(P, T, H, V, ignored, seed)
    expected = unfused(hidden, weight, bias, targets, scale) / 7
    h, t, cu = hidden, targets, None
    if packed:
        h, t, cu = hidden.reshape(-1, H), targets.reshape(-1), torch.arange(0, 2 * P * T + 1, T, dtype=torch.int32)
    out = linear_loss(
        group_loss, h, weight, t, bias=bias, cu_seqlens=cu, groups=[*range(P)] * 2, inputs={"scale": scale},
        denominator=7.0, workspace_mb=workspace_kb / 1024, schedule=schedule,
    )  # fmt: skip
    torch.testing.assert_close(out.loss, expected, rtol=1e-10, atol=1e-10)
    leaves = [hidden, weight, bias]
    grads = torch.autograd.grad(out.loss * 3, leaves)
    for mine, true in zip(grads, torch.autograd.grad(expected * 3, leaves), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("schedule", ["streamed", "deferred", "overlaid", "cached"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backends_and_schedules(dtype, backend, schedule):
    hidden, weight, bias, targets, scale = build(4, 13, 40, 300, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    expected = unfused(*exact, targets, scale.double())
    out = linear_loss(
        group_loss, hidden, weight, targets, bias=bias, groups=[*range(4)] * 2, inputs={"scale": scale},
        backend=backend, schedule=schedule, workspace_mb=0.3,
    )  # fmt: skip
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(out.loss, [hidden, weight, bias])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for mine, true in zip(grads, torch.autograd.grad(expected, exact), strict=True):
        assert mine.dtype == dtype
        error = (mine.double() - true).norm() / true.norm()
        assert error < tolerance


@pytest.mark.parametrize("workspace_mb", [0.01, 8])
def test_tokens_as_groups_with_per_token_inputs(workspace_mb):
    hidden, weight, bias, targets, _ = build(3, 7, 8, 50)
    advantages = torch.randn(targets.shape, dtype=torch.float64)

    def loss_fn(scored, cu, advantages):
        assert cu is None
        return -scored.logps.exp() * advantages - 0.1 * scored.entropy

    out = linear_loss(
        loss_fn, hidden, weight, targets, bias=bias, groups="tokens", inputs={"advantages": advantages}, entropy=True,
        denominator=None, workspace_mb=workspace_mb,
    )  # fmt: skip
    exact = linear_logps_reference(hidden, weight, targets, bias=bias)
    mask = targets != -100
    expected = (-exact.logps.exp() * advantages - 0.1 * exact.entropy)[mask].mean()
    torch.testing.assert_close(out.loss, expected)
    leaves = [hidden, weight, bias]
    for mine, true in zip(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(mine, true)


def test_metrics_see_all_scored_tokens_once_in_order():
    hidden, weight, bias, targets, scale = build(5, 6, 8, 40)
    calls = []

    def metrics_fn(scored, cu, scale):
        calls.append((scored, cu, scale))
        return {"nll": Metric(-scored.logps.sum(), torch.tensor(float(len(scored.logps))))}

    out = linear_loss(
        group_loss, hidden, weight, targets, bias=bias, groups=[*range(5)] * 2, inputs={"scale": scale},
        metrics_fn=metrics_fn, top1=True, mean_logits=True, workspace_mb=0.005,
    )  # fmt: skip
    ((scored, cu, given_scale),) = calls
    exact = linear_logps_reference(hidden, weight, targets, bias=bias)
    mask = targets != -100
    torch.testing.assert_close(scored.logps, exact.logps[mask].detach())
    torch.testing.assert_close(scored.mean_logits, exact.mean_logits[mask].detach())
    assert torch.equal(scored.is_top1, exact.is_top1[mask])
    assert cu.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert torch.equal(given_scale, scale)
    assert not scored.logps.requires_grad
    torch.testing.assert_close(out.metrics["nll"].value, -exact.logps[mask].mean().detach())


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_needed_gradients(needs):
    tensors = build(3, 6, 8, 40)
    expected = unfused(*tensors)
    hidden, weight, bias = (t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=False))
    out = linear_loss(
        group_loss, hidden, weight, tensors[3], bias=bias, groups=[*range(3)] * 2, inputs={"scale": tensors[4]}
    )
    out.loss.backward()
    true = torch.autograd.grad(expected, tensors[:3])
    for t, need, grad in zip((hidden, weight, bias), needs, true, strict=True):
        assert (t.grad is not None) == need
        if need:
            torch.testing.assert_close(t.grad, grad)


def test_no_grad_gives_the_same_loss():
    hidden, weight, bias, targets, scale = build(3, 6, 8, 40)
    arguments = {"bias": bias, "groups": [*range(3)] * 2, "inputs": {"scale": scale}}
    trained = linear_loss(group_loss, hidden, weight, targets, **arguments).loss
    with torch.no_grad():
        evaluated = linear_loss(group_loss, hidden, weight, targets, **arguments).loss
    torch.testing.assert_close(trained.detach(), evaluated)
    assert not evaluated.requires_grad


def test_a_second_backward_is_refused():
    hidden, weight, _, targets, scale = build(2, 4, 8, 20)
    loss = linear_loss(group_loss, hidden, weight, targets, groups=[0, 1, 0, 1], inputs={"scale": scale}).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward through a streamed loss"):
        loss.backward()


def test_given_rows_equal_found_rows():
    hidden, weight, bias, targets, scale = build(3, 6, 8, 40)
    rows = (targets.flatten() != -100).nonzero()[:, 0]
    arguments = {"bias": bias, "groups": [*range(3)] * 2, "inputs": {"scale": scale}}
    found = linear_loss(group_loss, hidden, weight, targets, **arguments).loss
    given_rows = linear_loss(group_loss, hidden, weight, targets, rows=rows, **arguments).loss
    assert torch.equal(found, given_rows)


@pytest.mark.parametrize("schedule", ["streamed", "deferred"])
@pytest.mark.parametrize("workspace_kb", [10, 4000])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_log_sum_sq_probs_comes_with_the_pass(backend, schedule, workspace_kb, softcap):
    """For the loss, detached, in whatever pieces; and for the metrics, in the order of the rows."""
    hidden, weight, bias, targets, scale = build(4, 13, 40, 300, dtype=torch.float32)
    seen = []

    def loss_fn(scored, cu, scale):
        assert not scored.log_sum_sq_probs.requires_grad
        aligned = sequence_logps(scored.logps.detach() - scored.log_sum_sq_probs, cu_seqlens=cu, reduction="mean")
        return group_loss(scored, cu, scale) * aligned.exp().chunk(2)[0]

    def metrics_fn(scored, cu, scale):
        seen.append(scored.log_sum_sq_probs)
        return {}

    given = {"groups": [*range(4)] * 2, "inputs": {"scale": scale}, "bias": bias, "softcap": softcap}
    out = linear_loss(
        loss_fn, hidden, weight, targets, **given, metrics_fn=metrics_fn, log_sum_sq_probs=True, backend=backend,
        schedule=schedule, workspace_mb=workspace_kb / 1024,
    )  # fmt: skip
    z = hidden.double() @ weight.double().T + bias.double()
    p = (z if softcap is None else softcap * torch.tanh(z / softcap)).softmax(-1)
    mask = targets != -100
    exact = p.square().sum(-1).log()
    torch.testing.assert_close(seen[0].double(), exact[mask].detach(), rtol=1e-5, atol=1e-5)
    logps = p.gather(-1, targets.clamp(min=0)[..., None])[..., 0].log()
    factor = (torch.where(mask, logps - exact, 0).sum(1) / mask.sum(1).clamp(min=1)).exp().chunk(2)[0].detach()
    plain = linear_loss(group_loss, hidden, weight, targets, **given, reduce=False, backend="torch").loss
    expected = (plain * factor).sum()
    torch.testing.assert_close(out.loss.double(), expected.double(), rtol=1e-4, atol=1e-4)
    leaves = [hidden, weight, bias]
    for mine, true in zip(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert (mine - true).norm() <= 1e-4 * true.norm()


BAD = {
    "requires grad": {"inputs": {"scale": torch.zeros(4, requires_grad=True)}},
    "must be per token": {"inputs": {"scale": torch.zeros(3)}},
    "groups must give one integer per sequence": {"groups": [0, 1]},
    "groups must be integers per sequence, None or 'tokens'": {"groups": "pairs"},
    "one loss per group": {"loss_fn": lambda scored, cu, scale: scored.logps.sum()},
    "cu_seqlens goes with packed hidden": {"cu_seqlens": torch.tensor([0, 16])},
    "rows must ascend": {"rows": torch.tensor([3, 1])},
    "schedule='streamed' needs a reduction": {"reduce": False, "schedule": "streamed"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    hidden, weight, _, targets, scale = build(2, 4, 8, 20, ignored=0)
    arguments = {"loss_fn": group_loss, "groups": [0, 1, 0, 1], "inputs": {"scale": scale}} | BAD[message]
    with pytest.raises(ValueError, match=message):
        linear_loss(hidden=hidden, weight=weight, targets=targets, **arguments)


def test_bad_cu_seqlens_is_named():
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to N = 6"):
        linear_loss(
            group_loss, torch.randn(6, 3), torch.randn(5, 3), torch.zeros(6, dtype=torch.int64),
            cu_seqlens=torch.tensor([0, 4, 7]), inputs={},
        )  # fmt: skip
