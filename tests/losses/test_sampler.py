"""Truncated importance weights by hand, in both layouts, and what they do to a loss."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign.losses import ppo_loss, summarize
from fastalign.losses.policy_options import POLICY_LOSSES
from fastalign.losses.sampler import SAMPLER_CORRECTIONS, sampler_weights

CAP = 1.5


def batch(B=4, T=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(B, T, generator=g, dtype=torch.float64) * 3
    sampler = old + 0.5 * torch.randn(B, T, generator=g, dtype=torch.float64)
    mask = torch.rand(B, T, generator=g) < 0.7
    mask[2] = False
    return old, sampler, mask


def by_hand(old, sampler, mask, correction):
    """Weights at the tokens that count, and the ratios that they come from, per token or per sequence."""
    weights, ratios = torch.ones_like(old), []
    for i in range(len(mask)):
        places = mask[i].nonzero()[:, 0].tolist()
        differences = [float(old[i, t] - sampler[i, t]) for t in places]
        if correction.startswith("sequence"):
            own = [math.exp(sum(differences))] * len(places)
            ratios += own[:1]
        else:
            own = [math.exp(d) for d in differences]
            ratios += own
        for t, ratio in zip(places, own, strict=True):
            capped = CAP if correction.endswith("truncate") else 0.0
            weights[i, t] = capped if ratio > CAP else ratio
    return weights, ratios


@pytest.mark.parametrize("correction", SAMPLER_CORRECTIONS)
def test_weights_and_metrics_by_hand(correction):
    old, sampler, mask = batch(seed=2)
    expected, ratios = by_hand(old, sampler, mask, correction)
    dirty = torch.where(mask, sampler, torch.nan)
    weights, metrics = sampler_weights(old, dirty, mask, sampler_correction=correction, sampler_cap=CAP)
    torch.testing.assert_close(weights, expected)
    values = {name: float(value) for name, value in summarize(metrics).items()}
    assert values["sampler_ratio"] == pytest.approx(sum(ratios) / len(ratios))
    assert values["sampler_ratio/max"] == pytest.approx(max(ratios))
    assert values["sampler_capped"] == pytest.approx(sum(r > CAP for r in ratios) / len(ratios))
    assert 0 < values["sampler_capped"] < 1
    # packed: the same tokens one after the other, padding and all, with an empty sequence more
    cu = torch.tensor([0, 5, 10, 15, 20, 20], dtype=torch.int32)
    flat, again = sampler_weights(
        old.flatten(), dirty.flatten(), mask.flatten(), sampler_correction=correction, sampler_cap=CAP, cu_seqlens=cu
    )
    torch.testing.assert_close(flat.view_as(weights), weights)
    for name, metric in metrics.items():
        torch.testing.assert_close(again[name], metric)


@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
@pytest.mark.parametrize("correction", SAMPLER_CORRECTIONS)
def test_the_policy_term_alone_is_weighed(loss_type, correction):
    old, sampler, mask = batch(seed=3)
    g = torch.Generator().manual_seed(1)
    noise, advantages = torch.randn(2, *old.shape, generator=g, dtype=torch.float64)
    logps = (old + 0.2 * noise).requires_grad_()
    entropy = torch.rand(old.shape, generator=g, dtype=torch.float64).requires_grad_()
    options = {"loss_type": loss_type, "epsilon_low": 0.2, "epsilon_high": 0.3}
    if loss_type == "dr_grpo":
        options["max_completion_length"] = 7
    both = {"ref_logps": old - 0.1, "entropy": entropy, "kl_coef": 0.1, "entropy_coef": 0.2}
    policy = ppo_loss(logps, old, advantages, mask, reduction="none", **options).loss
    rest = ppo_loss(logps, old, advantages * 0, mask, reduction="none", **both, **options).loss
    expected = policy * by_hand(old, sampler, mask, correction)[0] + rest
    given = {"sampler_logps": sampler, "sampler_correction": correction, "sampler_cap": CAP}
    ours = ppo_loss(logps, old, advantages, mask, reduction="none", **both, **given, **options)
    torch.testing.assert_close(ours.loss, expected)
    for leaf in (logps, entropy):
        (grad,) = torch.autograd.grad(ours.loss.sum(), leaf, retain_graph=True)
        (true,) = torch.autograd.grad(expected.sum(), leaf, retain_graph=True)
        torch.testing.assert_close(grad, true)


def test_weights_make_the_samplers_tokens_stand_for_the_trainers():
    """Without a cap the weighted mean of any function over the sampler's tokens is that over the trainer's."""
    g = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 50, generator=g, dtype=torch.float64).log_softmax(-1)
    value = torch.randn(50, generator=g, dtype=torch.float64)
    weights, metrics = sampler_weights(p[None], q[None], torch.ones(1, 50).bool(), sampler_cap=math.inf)
    torch.testing.assert_close((q.exp() * weights[0] * value).sum(), (p.exp() * value).sum())
    assert float(metrics["sampler_capped"].total) == 0
    same, metrics = sampler_weights(p[None], p[None], torch.ones(1, 50).bool())
    assert torch.equal(same, torch.ones(1, 50, dtype=torch.float64))
    assert float(metrics["sampler_ratio"].value) == 1


@pytest.mark.parametrize("correction", SAMPLER_CORRECTIONS)
def test_extreme_ratios_stay_finite_and_16_bit_log_probs_are_widened(correction):
    old = torch.tensor([[0.0, -200.0], [0.0, 0.0]]).bfloat16()
    sampler = torch.tensor([[-200.0, 0.0], [-200.0, -200.0]]).bfloat16()
    weights, _ = sampler_weights(old, sampler, torch.ones(2, 2).bool(), sampler_correction=correction)
    assert weights.dtype == torch.float32
    assert weights.isfinite().all()
    assert float(weights.max()) <= 2
