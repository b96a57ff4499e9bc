"""Policy losses token by token against plain Python, their identities, aggregations and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.losses import (
    AGGREGATIONS,
    KL_ESTIMATORS,
    kl_estimate,
    merge_metrics,
    ppo_loss,
    ppo_penalty_loss,
    summarize,
    value_loss,
)


def batch(B=3, T=6, seed=0, dtype=torch.float64, shift=0.4):
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(B, T, generator=g, dtype=dtype) * 3
    logps = (old + shift * torch.randn(B, T, generator=g, dtype=dtype)).requires_grad_()
    advantages, ref = torch.randn(2, B, T, generator=g, dtype=dtype)
    mask = torch.rand(B, T, generator=g) < 0.7
    return logps, old, advantages, ref - 2, mask


def by_hand(logp, old, a, low, high, dual):
    ratio = math.exp(logp - old)
    objective = min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
    if dual is not None and a < 0:
        objective = max(objective, dual * a)
    return -objective


@pytest.mark.parametrize("dual", [None, 1.5])
def test_the_clip_by_hand(dual):
    logps, old, advantages, _, _ = batch(shift=1.0)
    out = ppo_loss(logps, old, advantages, epsilon_high=0.3, dual_clip=dual, reduction="none")
    for x in zip(out.loss.flatten(), logps.flatten(), old.flatten(), advantages.flatten(), strict=True):
        loss, *rest = (float(v) for v in x)
        assert loss == pytest.approx(by_hand(*rest, 0.2, 0.3, dual), rel=1e-12)


def test_at_the_old_policy():
    """Loss −mean(A), nothing clipped, no KL; and the gradient is that of REINFORCE."""
    _, old, advantages, _, mask = batch()
    logps = old.clone().requires_grad_()
    out = ppo_loss(logps, old, advantages, mask)
    torch.testing.assert_close(out.loss, -advantages[mask].mean())
    values = summarize(out.metrics)
    assert float(values["ratio"]) == 1
    assert not any(float(values[name]) for name in ("approx_kl", "approx_kl_k3", "clip_fraction"))
    (grad,) = torch.autograd.grad(out.loss, logps)
    (expected,) = torch.autograd.grad(-(logps * advantages)[mask].mean(), logps)
    torch.testing.assert_close(grad, expected)


def test_clipped_tokens_have_no_gradient_and_are_counted():
    old = torch.zeros(1, 6, dtype=torch.float64)
    logps = torch.tensor([[0.5, -0.5, 0.5, -0.5, 0.1, 2.0]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    out = ppo_loss(logps, old, advantages, dual_clip=3.0)
    (grad,) = torch.autograd.grad(out.loss, logps)
    assert (grad == 0).tolist() == [[True, False, False, True, False, True]]
    values = {name: float(value) for name, value in summarize(out.metrics).items()}
    assert values["clip_fraction"] == pytest.approx(3 / 6)
    assert values["clip_fraction/low"] == pytest.approx(1 / 6)
    assert values["clip_fraction/high"] == pytest.approx(2 / 6)


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_kl_estimators(estimator):
    """k1 and k3 are unbiased: over tokens drawn from p their mean is KL(p‖q); k2's gradient is that of the KL."""
    g = torch.Generator().manual_seed(0)
    theta = torch.randn(5, generator=g, dtype=torch.float64, requires_grad=True)
    log_q = torch.randn(5, generator=g, dtype=torch.float64).log_softmax(0)
    log_p = theta.log_softmax(0)
    p = log_p.exp().detach()
    exact = (log_p.exp() * (log_p - log_q)).sum()
    estimate = (p * kl_estimate(log_p, log_q, estimator)).sum()
    if estimator == "k2":
        (mine,) = torch.autograd.grad(estimate, theta, retain_graph=True)
        (true,) = torch.autograd.grad(exact, theta)
        torch.testing.assert_close(mine, true)
    else:
        torch.testing.assert_close(estimate, exact)
    if estimator == "k1":
        (grad,) = torch.autograd.grad(estimate, theta)
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-12)
    if estimator == "k3":
        assert (kl_estimate(log_p, log_q, "k3") >= 0).all()


def test_kl_and_entropy_enter_the_loss():
    logps, old, advantages, ref, mask = batch()
    entropy = torch.rand_like(old).requires_grad_()
    plain = ppo_loss(logps, old, advantages, mask)
    full = ppo_loss(
        logps, old, advantages, mask, ref_logps=ref, entropy=entropy, kl_coef=0.1, kl_estimator="k2", entropy_coef=0.01
    )
    d = (logps - ref)[mask]
    torch.testing.assert_close(full.loss, plain.loss + 0.1 * (d * d / 2).mean() - 0.01 * entropy[mask].mean())
    (grad,) = torch.autograd.grad(full.loss, entropy)
    torch.testing.assert_close(grad, -0.01 * mask.double() / mask.sum())
    values = summarize(full.metrics)
    torch.testing.assert_close(values["kl"], (d * d / 2).mean().detach())
    torch.testing.assert_close(values["entropy"], entropy[mask].mean().detach())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregations(aggregation):
    logps, old, advantages, _, mask = batch(B=4, T=7, seed=2)
    mask[1] = False  # a sequence without a token does not count
    length = {"max_completion_length": 9} if aggregation == "constant" else {}
    tokens = ppo_loss(logps, old, advantages, mask, reduction="none").loss
    assert not tokens[~mask].any()
    rows = [tokens[i][mask[i]] for i in range(4) if mask[i].any()]
    expected = {
        "token_mean": torch.cat(rows).mean(),
        "sequence_mean": torch.stack([row.mean() for row in rows]).mean(),
        "sequence_sum": torch.stack([row.sum() for row in rows]).mean(),
        "constant": torch.cat(rows).sum() / (len(rows) * 9),
    }[aggregation]
    whole = ppo_loss(logps, old, advantages, mask, aggregation=aggregation, **length)
    torch.testing.assert_close(whole.loss, expected)
    items = int(mask.sum()) if aggregation == "token_mean" else len(rows)
    parts = [
        ppo_loss(logps[i], old[i], advantages[i], mask[i], aggregation=aggregation, num_items=items, **length)
        for i in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    merged = summarize(merge_metrics(*(part.metrics for part in parts)))
    for name, value in summarize(whole.metrics).items():
        torch.testing.assert_close(merged[name], value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1.0])
def test_what_lies_under_the_mask_never_enters(bad):
    logps, old, advantages, ref, mask = batch()
    clean = ppo_loss(logps, old, advantages, mask, ref_logps=ref, kl_coef=0.1)
    dirty = [torch.where(mask, x.detach(), bad) for x in (logps, old, advantages, ref)]
    dirty[0].requires_grad_()
    out = ppo_loss(*dirty[:3], mask, ref_logps=dirty[3], kl_coef=0.1)
    assert torch.equal(out.loss, clean.loss)
    (grad,), (expected,) = torch.autograd.grad(out.loss, dirty[0]), torch.autograd.grad(clean.loss, logps)
    assert torch.equal(grad, expected)
    values, target = torch.where(mask, old, bad), torch.where(mask, ref, bad)
    assert torch.equal(value_loss(values, target, mask).loss, value_loss(old, ref, mask).loss)


@settings(max_examples=25)
@given(B=st.integers(0, 4), T=st.integers(0, 5), seed=st.integers(0, 9), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_any_shape(B, T, seed, dtype):
    logps, old, advantages, _, mask = batch(B, T, seed, torch.float32)
    cast = [x.detach().to(getattr(torch, dtype)) for x in (logps, old, advantages)]
    out = ppo_loss(cast[0].requires_grad_(), *cast[1:], mask)
    assert out.loss.dtype == torch.float32
    assert out.loss.requires_grad
    assert out.loss.isfinite()


def test_gradcheck():
    logps, old, advantages, ref, mask = batch()
    options = {"ref_logps": ref, "kl_coef": 0.2, "dual_clip": 2.0}
    assert torch.autograd.gradcheck(lambda x: ppo_loss(x, old, advantages, mask, **options).loss, logps)
    assert torch.autograd.gradcheck(lambda x: ppo_penalty_loss(x, old, advantages, mask, penalty_coef=0.7).loss, logps)
    assert torch.autograd.gradcheck(lambda v: value_loss(v, ref, mask, old_values=old, epsilon_value=0.2).loss, logps)


def test_the_penalty_by_hand():
    logps, old, advantages, _, mask = batch()
    out = ppo_penalty_loss(logps, old, advantages, mask, penalty_coef=0.7)
    ratio = (logps - old).exp()
    kl = ratio - 1 - (logps - old)
    torch.testing.assert_close(out.loss, -(ratio * advantages - 0.7 * kl)[mask].mean())
    torch.testing.assert_close(summarize(out.metrics)["approx_kl_k3"], kl[mask].mean().detach())


@pytest.mark.parametrize("epsilon", [None, 0.3])
def test_value_loss_by_hand(epsilon):
    values, old, returns, _, mask = batch(shift=1.0)
    out = value_loss(values, returns, mask, old_values=old, epsilon_value=epsilon)
    expected, clipped = [], 0
    for v, o, r, m in zip(values.flatten(), old.flatten(), returns.flatten(), mask.flatten(), strict=True):
        if not m:
            continue
        plain = float(v - r) ** 2
        bounded = plain if epsilon is None else float(o + max(-epsilon, min(epsilon, float(v - o))) - r) ** 2
        expected.append(max(plain, bounded) / 2)
        clipped += bounded > plain
    assert float(out.loss) == pytest.approx(sum(expected) / len(expected), rel=1e-12)
    found = summarize(out.metrics)
    assert float(found["clip_fraction"]) == pytest.approx(clipped / len(expected))
    pair = torch.stack([values.detach()[mask], returns[mask]])
    assert float(found["correlation"]) == pytest.approx(float(torch.corrcoef(pair)[0, 1]))


REFUSED = {
    "epsilon_low=-0.1": {"epsilon_low": -0.1},
    "epsilon_high=-1": {"epsilon_high": -1},
    "dual_clip=0.5": {"dual_clip": 0.5},
    "kl_coef=0.1 needs ref_logps": {"kl_coef": 0.1},
    "entropy_coef=0.1 needs entropy": {"entropy_coef": 0.1},
    "kl_estimator='k4'": {"kl_estimator": "k4"},
    "aggregation='mean'": {"aggregation": "mean"},
    "max_completion_length is the constant": {"aggregation": "constant"},
    r"old_logps: shape \(2, 6\)": {"old_logps": torch.zeros(2, 6)},
    "advantages requires grad": {"advantages": torch.zeros(3, 6, requires_grad=True)},
    "mask: torch.float32": {"mask": torch.ones(3, 6)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message):
    arguments = {name: torch.zeros(3, 6) for name in ("logps", "old_logps", "advantages")} | REFUSED[message]
    with pytest.raises(ValueError, match=message):
        ppo_loss(**arguments)
