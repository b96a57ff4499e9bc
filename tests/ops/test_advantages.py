"""GAE on every backend against a float64 loop, its identities, whitening and group baselines."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.ops import discounted_returns, gae, group_advantages, whiten


def problem(B, T, seed=0, valid=0.7):
    g = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, B, T, generator=g)
    return rewards, values, torch.rand(B, T, generator=g) < valid


def loop(rewards, values, mask, gamma, lam):
    """Plain Python over the valid tokens of each sequence."""
    advantages = torch.zeros(rewards.shape, dtype=torch.float64)
    for b in range(rewards.shape[0]):
        following = ahead = 0.0
        for t in reversed(mask[b].nonzero()[:, 0].tolist()):
            delta = float(rewards[b, t]) + gamma * following - float(values[b, t])
            ahead = delta + gamma * lam * ahead
            advantages[b, t], following = ahead, float(values[b, t])
    return advantages, torch.where(mask, advantages + values.double(), 0)


def test_by_hand(backend):
    """γ = 0.9, λ = ½, a gap: δ = 1.4, −1.9, 3; hence A_2 = 3, A_1 = −1.9 + 0.45·3 and A_0 = 1.4 − 0.45·0.55."""
    rewards, values = torch.tensor([[1.0, 7.0, 0.0, 2.0, 7.0]]), torch.tensor([[0.5, 7.0, 1.0, -1.0, 7.0]])
    mask = torch.tensor([[True, False, True, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.5, backend=backend)
    torch.testing.assert_close(advantages, torch.tensor([[1.1525, 0, -0.55, 3.0, 0]]))
    torch.testing.assert_close(returns, torch.tensor([[1.6525, 0, 0.45, 2.0, 0]]))


def test_float64_stays_float64():
    rewards, values, mask = problem(6, 50)
    rewards = rewards.double() / 3
    ours = gae(rewards, values, mask, gamma=0.97, lam=0.9)
    for mine, true in zip(ours, loop(rewards, values, mask, 0.97, 0.9), strict=True):
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)


@settings(max_examples=30)
@given(
    B=st.integers(0, 5), T=st.integers(0, 40), gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]), valid=st.sampled_from([0.0, 0.5, 1.0]), seed=st.integers(0, 9),
)  # fmt: skip
def check_shapes(backend, B, T, gamma, lam, valid, seed):
    rewards, values, mask = problem(B, T, seed, valid)
    ours = gae(rewards, values, mask, gamma=gamma, lam=lam, backend=backend)
    for mine, true in zip(ours, loop(rewards, values, mask, gamma, lam), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-5)


def test_any_shape(backend):
    check_shapes(backend)


def test_longer_than_a_block(backend):
    rewards, values, mask = problem(3, 4500, valid=0.9)
    mask[1, 1900:3200] = False  # a gap over a block's boundary
    ours = gae(rewards, values, mask, gamma=0.99, lam=0.95, backend=backend)
    for mine, true in zip(ours, loop(rewards, values, mask, 0.99, 0.95), strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-4)


def test_opcheck(backend):
    torch.library.opcheck(torch.ops.fastalign.gae, (*problem(3, 5), 0.9, 0.8, backend))


def test_compiles_without_a_graph_break():
    rewards, values, mask = problem(3, 7)
    compiled = torch.compile(lambda *tensors: gae(*tensors, lam=0.9), fullgraph=True, backend="aot_eager")
    for ours, plain in zip(compiled(rewards, values, mask), gae(rewards, values, mask, lam=0.9), strict=True):
        assert torch.equal(ours, plain)


def test_what_lies_under_the_mask_never_enters(backend):
    rewards, values, mask = problem(4, 20)
    clean = gae(rewards, values, mask, backend=backend)
    for bad in (math.nan, math.inf):
        dirty = gae(torch.where(mask, rewards, bad), torch.where(mask, values, bad), mask, backend=backend)
        for a, b in zip(clean, dirty, strict=True):
            assert torch.equal(a, b)
            assert not b[~mask].any()


def test_16_bit_inputs_are_computed_in_float32(backend):
    rewards, values, mask = problem(4, 60)
    half = rewards.bfloat16(), values.bfloat16()
    for a, b in zip(
        gae(*half, mask, backend=backend), gae(*(x.float() for x in half), mask, backend=backend), strict=True
    ):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_strided_inputs(backend):
    rewards, values, mask = (x.t().contiguous().t() for x in problem(4, 20))
    dense = gae(rewards.contiguous(), values.contiguous(), mask.contiguous(), backend=backend)
    for a, b in zip(gae(rewards, values, mask, backend=backend), dense, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_on_a_gpu():
    rewards, values, mask = problem(64, 2500, valid=0.9)
    ours = gae(rewards.cuda(), values.cuda(), mask.cuda(), gamma=0.99, lam=0.95, backend="triton")
    for mine, true in zip(ours, loop(rewards, values, mask, 0.99, 0.95), strict=True):
        torch.testing.assert_close(mine.cpu().double(), true, rtol=1e-4, atol=1e-4)


def test_identities():
    rewards, values, mask = problem(3, 15)
    rewards, values = rewards.double(), values.double()
    returns = discounted_returns(rewards, mask, gamma=0.9)
    advantages, targets = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    torch.testing.assert_close(advantages, torch.where(mask, returns - values, 0))
    torch.testing.assert_close(targets, returns)
    one_step, _ = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    for b in range(3):
        at = mask[b].nonzero()[:, 0]
        following = torch.cat([values[b, at[1:]], values.new_zeros(1)])
        torch.testing.assert_close(one_step[b, at], rewards[b, at] + 0.9 * following - values[b, at])


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_over_processes(shift_mean):
    values, _, mask = problem(6, 30)
    values = 3 * values + 5
    whole = whiten(values, mask, shift_mean=shift_mean)
    found = whole[mask]
    assert float(found.std()) == pytest.approx(1, abs=1e-5)
    assert float(found.mean()) == pytest.approx(0 if shift_mean else float(values[mask].mean()), abs=1e-5)
    assert not whole[~mask].any()

    # two processes: each contributes its sums and is handed those of both
    valid = values[mask].double()
    answers = torch.stack([valid.sum(), mask.sum().double()]), (valid - valid.mean()).square().sum()
    contributed = []
    for part in (slice(0, 2), slice(2, 6)):
        mine = []

        def reduce(tensor, mine=mine):
            mine.append(tensor)
            return answers[len(mine) - 1]

        found = whiten(values[part], mask[part], shift_mean=shift_mean, reduce=reduce)
        torch.testing.assert_close(found, whole[part], rtol=1e-6, atol=1e-6)
        contributed.append(mine)
    for stage, answer in enumerate(answers):
        torch.testing.assert_close(contributed[0][stage] + contributed[1][stage], answer)


def test_whitening_of_one_token_and_none():
    assert not whiten(torch.ones(1, 3), torch.tensor([[True, False, False]])).any()
    assert not whiten(torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.bool)).any()


def test_group_baselines():
    rewards = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 9.0], dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 1, 1, 2])
    first = rewards[:3]
    expected = torch.cat([(first - 3) / (first.std() + 1e-4), torch.zeros(3, dtype=torch.float64)])
    torch.testing.assert_close(group_advantages(rewards, groups), expected)
    torch.testing.assert_close(
        group_advantages(rewards, groups, scale=False), torch.tensor([-2.0, -1, 3, 0, 0, 0], dtype=torch.float64)
    )
    leave_one_out = torch.tensor([1 - 4, 2 - 3.5, 6 - 1.5, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards, groups, estimator="rloo"), leave_one_out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 1.5}, r"gamma=1.5: it must be in \[0, 1\]"),
        ({"mask": torch.ones(2, 3)}, "mask must be bool"),
        ({"values": torch.ones(2, 4)}, r"all tensors must be \(2, 3\)"),
        ({"rewards": torch.ones(3)}, r"accepted are float tensors \(B, T\)"),
    ],
)
def test_refusals(change, message):
    arguments = {"rewards": torch.ones(2, 3), "values": torch.ones(2, 3), "mask": torch.ones(2, 3, dtype=torch.bool)}
    with pytest.raises(ValueError, match=message):
        gae(**arguments | change)
