"""Every variant of the policy loss: its paper's formula written out in loops, identities, masks and splits."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastalign.losses import AGGREGATIONS, merge_metrics, ppo_loss, summarize
from fastalign.losses.policy_options import IMPORTANCE_SAMPLING_LEVELS, POLICY_LOSSES

LENGTH = 9  # the constant of Dr. GRPO
WIDE = {"epsilon_low": 0.15, "epsilon_high": 0.2}  # ratios of the batch lie on all sides of it, those of sequences too


def batch(B=5, T=6, seed=1, shift=0.4, constant=True):
    """logps, old_logps, advantages (one per sequence, or per token), ref_logps and a mask; a sequence has no token."""
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(B, T, generator=g, dtype=torch.float64) * 3
    step = torch.randn(B, 1, generator=g, dtype=torch.float64) + torch.randn(B, T, generator=g, dtype=torch.float64)
    logps = (old + shift * step).requires_grad_()
    advantages = torch.randn(B, 1 if constant else T, generator=g, dtype=torch.float64).expand(B, T).clone()
    mask = torch.rand(B, T, generator=g) < 0.7
    mask[1] = False
    return logps, old, advantages, old + 0.2 * torch.randn(B, T, generator=g, dtype=torch.float64), mask


def constants(loss_type, aggregation=None):
    constant = (aggregation or POLICY_LOSSES[loss_type].aggregation) == "constant"
    return {"max_completion_length": LENGTH} if constant else {}


# ---- what the papers say, sequence by sequence: new, old, a are lists of 0-dim tensors


def clipped(ratio, advantage, low, high):
    bounded = min(max(ratio, torch.tensor(1 - low, dtype=torch.float64)), torch.tensor(1 + high, dtype=torch.float64))
    return -min(ratio * advantage, bounded * advantage)


def by_token(new, old, a, low, high):
    return [clipped((x - y).exp(), z, low, high) for x, y, z in zip(new, old, a, strict=True)]


def token_mean(rows):
    tokens = [loss for row in rows for loss in row]
    return sum(tokens) / len(tokens)


def gspo(rows, low, high):
    losses = []
    for new, o, a in rows:
        ratio = (sum(x - y for x, y in zip(new, o, strict=True)) / len(new)).exp()
        losses.append(clipped(ratio, a[0], low, high))
    return sum(losses) / len(losses)


def gspo_token(rows, low, high):
    """The value of s, the gradient of the token."""
    losses = []
    for new, o, a in rows:
        ratio = (sum(x - y for x, y in zip(new, o, strict=True)) / len(new)).exp().detach()
        parts = [clipped(ratio * (x - x.detach()).exp(), z, low, high) for x, z in zip(new, a, strict=True)]
        losses.append(sum(parts) / len(parts))
    return sum(losses) / len(losses)


def cispo(rows, low, high):
    return token_mean(
        [
            [-(x - y).exp().detach().clamp(1 - low, 1 + high) * z * x for x, y, z in zip(*row, strict=True)]
            for row in rows
        ]
    )


ORACLES = {
    "ppo": lambda rows, low, high: token_mean([by_token(*row, low, high) for row in rows]),
    "rloo": lambda rows, low, high: sum(sum(by_token(*row, low, high)) for row in rows) / len(rows),
    "grpo": lambda rows, low, high: sum(sum(by_token(*row, low, high)) / len(row[0]) for row in rows) / len(rows),
    "dr_grpo": lambda rows, low, high: sum(sum(by_token(*row, low, high)) for row in rows) / (len(rows) * LENGTH),
    "dapo": lambda rows, low, high: token_mean([by_token(*row, low, high) for row in rows]),
    "gspo": gspo,
    "cispo": cispo,
}
OWN_RANGES = {
    "ppo": (0.2, 0.2), "rloo": (0.2, 0.2), "grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28),
    "gspo": (3e-4, 4e-4), "cispo": (1.0, 4.0),
}  # fmt: skip


def rows_of(logps, old, advantages, mask):
    return [
        tuple(list(tensor[i][mask[i]].unbind()) for tensor in (logps, old, advantages))
        for i in range(len(mask))
        if mask[i].any()
    ]


def test_every_variant_has_an_oracle():
    assert set(ORACLES) == set(OWN_RANGES) == set(POLICY_LOSSES)


@pytest.mark.parametrize("own", [True, False], ids=["own range", "wide"])
@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_value_and_gradient_are_the_papers(loss_type, own):
    logps, old, advantages, _, mask = batch(shift=1e-3 if own and loss_type == "gspo" else 0.9 if own else 0.25)
    low, high = OWN_RANGES[loss_type] if own else WIDE.values()
    out = ppo_loss(logps, old, advantages, mask, loss_type=loss_type, **({} if own else WIDE), **constants(loss_type))
    expected = ORACLES[loss_type](rows_of(logps, old, advantages, mask), low, high)
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-14)
    (grad,), (true,) = torch.autograd.grad(out.loss, logps), torch.autograd.grad(expected, logps)
    torch.testing.assert_close(grad, true, rtol=1e-12, atol=1e-14)
    assert not grad[~mask].any()
    fraction = float(summarize(out.metrics)["clip_fraction"])
    assert 0 < fraction < 1  # both sides are tested


@pytest.mark.parametrize("constant", [True, False])
def test_gspo_token(constant):
    """With one advantage a sequence it is GSPO, in value and gradient; else each token has its own."""
    logps, old, advantages, _, mask = batch(shift=0.25, constant=constant)
    options = {"loss_type": "gspo", **WIDE}
    out = ppo_loss(logps, old, advantages, mask, importance_sampling_level="sequence_token", **options)
    expected = gspo_token(rows_of(logps, old, advantages, mask), *WIDE.values())
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-14)
    (grad,), (true,) = torch.autograd.grad(out.loss, logps), torch.autograd.grad(expected, logps)
    torch.testing.assert_close(grad, true, rtol=1e-12, atol=1e-14)
    sequence = ppo_loss(logps, old, advantages, mask, **options)
    torch.testing.assert_close(out.loss, sequence.loss)
    (other,) = torch.autograd.grad(sequence.loss, logps)
    assert torch.allclose(grad, other) is constant


LEVELS = [("ppo", level) for level in IMPORTANCE_SAMPLING_LEVELS] + [("cispo", "token"), ("cispo", "sequence")]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("objective", "level"), LEVELS)
def test_every_level_with_every_aggregation(objective, level, aggregation):
    """The parts are independent: a token's loss from level and objective, and its weight."""
    logps, old, advantages, _, mask = batch(shift=0.25, constant=False)
    options = {"loss_type": objective, "importance_sampling_level": level, "aggregation": aggregation, **WIDE}
    out = ppo_loss(logps, old, advantages, mask, **options, **constants(objective, aggregation))
    losses = []
    for new, o, a in rows_of(logps, old, advantages, mask):
        own = [x - y for x, y in zip(new, o, strict=True)]
        mean = sum(own) / len(own)
        shared = [mean.detach() + d - d.detach() for d in own] if level == "sequence_token" else [mean] * len(own)
        ratios = [d.exp() for d in (own if level == "token" else shared)]
        if objective == "ppo":
            losses.append([clipped(r, z, *WIDE.values()) for r, z in zip(ratios, a, strict=True)])
        else:
            losses.append([-r.detach().clamp(0.85, 1.2) * z * x for r, z, x in zip(ratios, a, new, strict=True)])
    sums = [sum(row) for row in losses]
    expected = {
        "token_mean": sum(sums) / sum(map(len, losses)),
        "sequence_mean": sum(s / len(row) for s, row in zip(sums, losses, strict=True)) / len(losses),
        "sequence_sum": sum(sums) / len(losses),
        "constant": sum(sums) / (len(losses) * LENGTH),
    }[aggregation]
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-14)
    (grad,), (true,) = torch.autograd.grad(out.loss, logps), torch.autograd.grad(expected, logps)
    torch.testing.assert_close(grad, true, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_at_the_old_policy(loss_type):
    """Every ratio is 1, nothing is clipped, and the gradient is REINFORCE's under the variant's aggregation."""
    _, old, advantages, _, mask = batch()
    logps = old.clone().requires_grad_()
    out = ppo_loss(logps, old, advantages, mask, loss_type=loss_type, **constants(loss_type))
    (grad,) = torch.autograd.grad(out.loss, logps)
    lengths, tokens = mask.sum(1, keepdim=True).clamp(min=1), mask.sum()
    sequences = mask.any(1).sum()
    weight = {
        "token_mean": 1 / tokens, "sequence_mean": 1 / (lengths * sequences), "sequence_sum": 1 / sequences,
        "constant": 1 / (sequences * LENGTH),
    }[POLICY_LOSSES[loss_type].aggregation]  # fmt: skip
    torch.testing.assert_close(grad, -(advantages * mask * weight))
    values = {name: float(value) for name, value in summarize(out.metrics).items()}
    assert values["ratio"] == pytest.approx(1, rel=1e-14)
    assert not any(values[name] for name in ("approx_kl", "approx_kl_k3", "clip_fraction"))


def test_gspo_takes_the_gradient_of_whole_sequences():
    """Length-normalised, and gone where the sequence is clipped."""
    old = torch.zeros(3, 4, dtype=torch.float64)
    logps = torch.tensor([[0.4, 0, 0, 0], [0.4, 0, 0, 9.0], [-0.8, 0.8, 0, 0]], dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    advantages = torch.tensor([1.0, 1.0, -2.0], dtype=torch.float64)[:, None].expand(3, 4)
    out = ppo_loss(logps, old, advantages, mask, loss_type="gspo", epsilon_low=0.12, epsilon_high=0.12)
    (grad,) = torch.autograd.grad(out.loss, logps)
    assert not grad[1].any()  # exp(0.4/3) = 1.14 is clipped; what lies outside the mask is not part of it
    torch.testing.assert_close(grad[0], torch.full((4,), -math.exp(0.1) / 4 / 3, dtype=torch.float64))
    torch.testing.assert_close(grad[2], torch.full((4,), 2 / 4 / 3, dtype=torch.float64))
    values = {name: float(value) for name, value in summarize(out.metrics).items()}
    assert values["ratio"] == pytest.approx((math.exp(0.1) + math.exp(0.4 / 3) + 1) / 3)  # over sequences, not tokens
    assert values["clip_fraction"] == values["clip_fraction/high"] == pytest.approx(1 / 3)
    assert float(out.metrics["ratio"].weight) == 3


def test_cispo_keeps_the_gradient_of_capped_tokens():
    old = torch.zeros(1, 4, dtype=torch.float64)
    logps = torch.tensor([[-0.5, 0.1, 1.0, 2.0]], dtype=torch.float64).requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, -2.0, 3.0]], dtype=torch.float64)
    out = ppo_loss(logps, old, advantages, loss_type="cispo", epsilon_high=0.5)
    (grad,) = torch.autograd.grad(out.loss, logps)
    weights = torch.tensor([[math.exp(-0.5), math.exp(0.1), 1.5, 1.5]], dtype=torch.float64)
    torch.testing.assert_close(grad, -weights * advantages / 4)
    values = {name: float(value) for name, value in summarize(out.metrics).items()}
    assert (values["clip_fraction"], values["clip_fraction/low"]) == (0.5, 0)  # whatever the advantage
    own = ppo_loss(logps, old, advantages, loss_type="cispo").metrics
    assert float(own["clip_fraction"].value) == 0.25  # the cap is 5, and exp(2) = 7.4
    bounded = ppo_loss(logps, old, advantages, loss_type="cispo", epsilon_low=0.2, epsilon_high=0.5)
    assert float(torch.autograd.grad(bounded.loss, logps)[0][0, 0]) == pytest.approx(-0.8 / 4)  # the paper's lower side


@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_splits_and_masks_change_nothing(loss_type):
    """Micro-batches with the whole's count add up, metrics included; NaN outside the mask never enters."""
    logps, old, advantages, ref, mask = batch()
    given = {"ref_logps": ref, "sampler_logps": old + 0.3 * ref}
    options = {"loss_type": loss_type, "kl_coef": 0.1, "sampler_cap": 1.5, **WIDE, **constants(loss_type)}
    whole = ppo_loss(logps, old, advantages, mask, **given, **options)
    token_mean = POLICY_LOSSES[loss_type].aggregation == "token_mean"
    items = int(mask.sum()) if token_mean else int(mask.any(1).sum())

    def dirty(tensor):
        return torch.where(mask, tensor, torch.nan)

    leaf = dirty(logps.detach()).requires_grad_()
    parts = [
        ppo_loss(
            leaf[i], dirty(old)[i], dirty(advantages)[i], mask[i], num_items=items, **options,
            **{name: dirty(tensor)[i] for name, tensor in given.items()},
        )
        for i in (slice(0, 2), slice(2, 3), slice(3, 5))
    ]  # fmt: skip
    loss = sum(part.loss for part in parts)
    torch.testing.assert_close(loss, whole.loss)
    (grad,), (expected,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(whole.loss, logps)
    torch.testing.assert_close(grad, expected)
    merged = summarize(merge_metrics(*(part.metrics for part in parts)))
    for name, value in summarize(whole.metrics).items():
        if name != "sampler_ratio/max":
            torch.testing.assert_close(merged[name], value)
    none = ppo_loss(logps, old, advantages, mask, reduction="none", **given, **options)
    assert none.loss.shape == mask.shape
    assert not none.loss[~mask].any()


@pytest.mark.parametrize("loss_type", [name for name, entry in POLICY_LOSSES.items() if entry.objective == "clip"])
def test_gradcheck(loss_type):
    """The others stop a gradient on purpose, which finite differences do not know."""
    logps, old, advantages, ref, mask = batch(B=3, T=4, seed=4)
    mask[1, 0] = True
    options = {"loss_type": loss_type, **WIDE, **constants(loss_type)}
    given = {"ref_logps": ref, "kl_coef": 0.2, "dual_clip": 2.0, "sampler_logps": old - 0.1}
    assert torch.autograd.gradcheck(lambda x: ppo_loss(x, old, advantages, mask, **given, **options).loss, logps)


class NoReads(TorchDispatchMode):
    """Forbids what would make a host wait for its device: reading a number, and shapes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique"), name
        booleans = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name == "index" else []
        assert not booleans, "a boolean index"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("level", IMPORTANCE_SAMPLING_LEVELS)
@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_nothing_waits_for_the_device(loss_type, level):
    if loss_type == "cispo" and level == "sequence_token":
        level = "sequence"
    logps, old, advantages, ref, mask = batch()
    given = {"ref_logps": ref, "sampler_logps": ref, "kl_coef": 0.1, "sampler_correction": "sequence_mask"}
    with NoReads():
        out = ppo_loss(
            logps, old, advantages, mask, loss_type=loss_type, importance_sampling_level=level, num_items=mask.sum(),
            **given, **constants(loss_type),
        )  # fmt: skip
        torch.autograd.grad(out.loss, logps)
        summarize(out.metrics)


@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_nothing_to_train_on(loss_type):
    for B, T in ((0, 0), (0, 4), (2, 0), (2, 3)):
        logps = torch.zeros(B, T, requires_grad=True)
        zeros, mask = torch.zeros(B, T), torch.zeros(B, T, dtype=torch.bool)
        out = ppo_loss(logps, zeros, zeros, mask, loss_type=loss_type, **constants(loss_type))
        assert float(out.loss.detach()) == 0
        (grad,) = torch.autograd.grad(out.loss, logps)
        assert not grad.any()
