"""linear_ppo_loss equals ppo_loss of linear_logps, whatever the schedule, the aggregation and the split."""

from __future__ import annotations

import pytest
import torch

from fastalign.linear import linear_ppo_loss
from fastalign.losses import AGGREGATIONS, ppo_loss, summarize
from fastalign.ops import linear_logps_reference
from fastalign.ops.tile_sizes import align
from fastalign.ops.tiles import Tiles


def ppo_inputs(B=4, T=9, H=16, V=120, seed=0):
    """hidden, weight, bias, targets, and per-token inputs that hold NaN where nothing was sampled."""
    g = torch.Generator().manual_seed(seed)
    shapes = (B, T, H), (V, H), (V,)
    hidden, weight, bias = (torch.randn(s, generator=g, dtype=torch.float64).mul_(0.5).requires_grad_() for s in shapes)
    targets = torch.randint(0, V, (B, T), generator=g)
    targets[torch.rand(B, T, generator=g) < 0.4] = -100
    old, advantages, ref = torch.randn(3, B, T, generator=g, dtype=torch.float64)
    reference = linear_logps_reference(hidden, weight, targets, bias=bias).logps.detach()
    tensors = {"old_logps": reference + 0.3 * old, "advantages": advantages, "ref_logps": reference + 0.2 * ref}
    return hidden, weight, bias, targets, {k: torch.where(targets == -100, torch.nan, v) for k, v in tensors.items()}


@pytest.mark.parametrize("schedule", ["auto", "streamed", "deferred"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_linear_ppo_loss_is_ppo_loss_of_linear_logps(aggregation, schedule):
    hidden, weight, bias, targets, given = ppo_inputs()
    options = {
        "epsilon_high": 0.3, "dual_clip": 2.0, "kl_coef": 0.1, "entropy_coef": 0.01, "aggregation": aggregation,
        "max_completion_length": 11 if aggregation == "constant" else None,
    }  # fmt: skip
    exact = linear_logps_reference(hidden, weight, targets, bias=bias)
    expected = ppo_loss(
        exact.logps, given["old_logps"], given["advantages"], targets != -100, ref_logps=given["ref_logps"],
        entropy=exact.entropy, **options,
    )  # fmt: skip
    ours = linear_ppo_loss(hidden, weight, targets, **given, bias=bias, schedule=schedule, workspace_mb=0.02, **options)
    torch.testing.assert_close(ours.loss, expected.loss)
    leaves = [hidden, weight, bias]
    for mine, true in zip(
        torch.autograd.grad(ours.loss, leaves), torch.autograd.grad(expected.loss, leaves), strict=True
    ):
        torch.testing.assert_close(mine, true, rtol=1e-8, atol=1e-10)
    found = summarize(ours.metrics)
    for name, value in summarize(expected.metrics).items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("schedule", ["streamed", "deferred", "overlaid"])
def test_tokens_without_a_gradient_stay_out_of_its_gemms(schedule, monkeypatch):
    """Clipped tokens and tokens without an advantage; with a KL term they have a gradient again."""
    hidden, weight, bias, targets, given = ppo_inputs(T=40, H=32)
    ratio = (linear_logps_reference(hidden, weight, targets, bias=bias).logps - given["old_logps"]).exp()
    advantages = torch.where(torch.arange(40) % 3 == 0, 0.0, given["advantages"])
    clipped = torch.where(advantages > 0, ratio > 1.2, ratio < 0.8)
    silent = (targets == -100) | (advantages == 0) | clipped
    given = {**given, "advantages": advantages}
    assert 0 < (clipped & (targets != -100)).sum() < (~silent).sum() < 0.7 * (targets != -100).sum()
    rows: list[int] = []
    add = Tiles.add_weight

    def counting(self, sinks, v0, v1, grad, *others):
        rows.extend([grad.shape[0]] if v0 == 0 else [])
        add(self, sinks, v0, v1, grad, *others)

    monkeypatch.setattr(Tiles, "add_weight", counting)
    for kl_coef in (0.0, 0.1):
        rows.clear()
        ours = linear_ppo_loss(hidden, weight, targets, **given, bias=bias, schedule=schedule, kl_coef=kl_coef)
        grads = torch.autograd.grad(ours.loss, [hidden, weight, bias])
        expected = linear_logps_reference(hidden, weight, targets, bias=bias)
        loss = ppo_loss(
            expected.logps, given["old_logps"], advantages, targets != -100, ref_logps=given["ref_logps"],
            kl_coef=kl_coef,
        ).loss  # fmt: skip
        for mine, true in zip(grads, torch.autograd.grad(loss, [hidden, weight, bias]), strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-8, atol=1e-10)
        moved = ~silent if not kl_coef else targets != -100
        assert sum(rows) == align(int(moved.sum()))
        assert torch.equal(grads[0].abs().sum(-1) > 0, moved)


def test_ppo_micro_batches_and_packed_tokens():
    hidden, weight, bias, targets, given = ppo_inputs()
    whole = linear_ppo_loss(hidden, weight, targets, **given, bias=bias, kl_coef=0.1)
    tokens = int((targets != -100).sum())
    parts = [
        linear_ppo_loss(
            hidden[i],
            weight,
            targets[i],
            **{k: v[i] for k, v in given.items()},
            bias=bias,
            kl_coef=0.1,
            num_items=tokens,
        ).loss
        for i in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), whole.loss)
    packed = linear_ppo_loss(
        hidden.flatten(0, 1), weight, targets.flatten(), **{k: v.flatten() for k, v in given.items()}, bias=bias,
        kl_coef=0.1,
    )  # fmt: skip
    torch.testing.assert_close(packed.loss, whole.loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old_logps": torch.zeros(4, 8)}, r"old_logps: shape \(4, 8\), accepted is that of targets, \(4, 9\)"),
        ({"kl_coef": 0.1, "ref_logps": None}, "kl_coef=0.1 needs ref_logps"),
        ({"reduction": "none"}, "call linear_logps and losses.ppo_loss"),
        ({"dual_clip": 1.0}, "dual_clip=1.0"),
    ],
)
def test_ppo_refusals(change, message):
    hidden, weight, _, targets, given = ppo_inputs()
    with pytest.raises(ValueError, match=message):
        linear_ppo_loss(hidden, weight, targets, **given | change)
    flat = {k: v.flatten() for k, v in given.items()}
    with pytest.raises(ValueError, match="needs sequences"):
        linear_ppo_loss(hidden.flatten(0, 1), weight, targets.flatten(), aggregation="sequence_mean", **flat)
