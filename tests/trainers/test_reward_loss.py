"""Loss and metrics of reward batches: the formulas, standard errors, extremes, and no trace of how a batch was cut."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fastalign.data import RewardCollator
from fastalign.losses import bradley_terry_loss
from fastalign.trainers.batches import split_batch
from fastalign.trainers.reward_loss import RewardMeter, reward_loss, spread_errors
from fastalign.types import Metric


def rng_ids(rng, n: int) -> list[int]:
    return rng.integers(3, 60, n).tolist()


def pairs(n: int, seed: int = 0, margin: bool = False) -> list[dict]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        ids = {name: rng_ids(rng, rng.integers(1, 12)) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        rows.append(ids | ({"margin": float(rng.normal())} if margin else {}))
    return rows


def lists(n: int, seed: int = 0, largest: int = 5, ties: bool = True) -> list[dict]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        k = int(rng.integers(2, largest + 1))
        ranks = rng.integers(1, 4, k) if ties else rng.permutation(k) + 1
        ranks[:2] = (1, 2) if ties else ranks[:2]
        rows.append(
            {
                "prompt_ids": rng_ids(rng, 4),
                "response_ids": [rng_ids(rng, rng.integers(1, 9)) for _ in range(k)],
                "ranks": ranks.tolist(),
            }
        )
    return rows


def labels(n: int, seed: int = 0, binary: bool = False) -> list[dict]:
    rng = np.random.default_rng(seed)
    value = (lambda: bool(rng.integers(2))) if binary else (lambda: float(rng.normal()))
    return [{"prompt_ids": rng_ids(rng, 3), "completion_ids": rng_ids(rng, 5), "label": value()} for _ in range(n)]


KINDS = {
    "pairs": (pairs, {"center_rewards_coefficient": 0.05}),
    "margins": (lambda n, seed: pairs(n, seed, margin=True), {}),
    "lists": (lists, {}),
    "scalar": (labels, {}),
    "binary": (lambda n, seed: labels(n, seed, binary=True), {"label_type": "binary"}),
}


def rewards_of(batch, weights) -> torch.Tensor:
    """A reward that depends on a sequence's tokens alone, linear in `weights` (60,)."""
    real = batch["attention_mask"].to(weights.dtype)
    return (weights[batch["input_ids"]] * real).sum(1) / real.sum(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_tokens", [1, 60])
def test_pieces_add_up_to_the_whole(kind, max_tokens):
    make, options = KINDS[kind]
    batch = RewardCollator(0)(make(9, seed=3))
    meters, losses, grads = [], [], []
    for pieces in ([batch], split_batch(batch, max_tokens)):
        weights = torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
        meter = RewardMeter(lambda tensor: tensor, errors=True)
        total = torch.zeros((), dtype=torch.float64)
        for piece in pieces:
            output = reward_loss(rewards_of(piece, weights), piece, num_items=9, **options)
            output.loss.backward()
            total = total + output.loss.detach()
            meter.update(output.metrics)
        meters.append(meter.values()[0])
        losses.append(total)
        grads.append(weights.grad)
    assert len(split_batch(batch, max_tokens)) > 1
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(grads[0], grads[1])
    assert meters[0].keys() == meters[1].keys()
    for name, value in meters[0].items():
        assert meters[1][name] == pytest.approx(value, rel=1e-9, abs=1e-12), name
    assert not any("_se/" in name for name in meters[0])


def test_lists_are_all_explicit_pairs_over_their_number():
    """K-wise loss and gradient are those of every pair by itself, weighted 1/C(K, 2) within its list."""
    rows = lists(6, ties=False)
    batch = RewardCollator(0)(rows)
    weights = torch.randn(60, dtype=torch.float64, requires_grad=True)
    reward_loss(rewards_of(batch, weights), batch).loss.backward()
    kwise, weights.grad = weights.grad, None
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        order = np.argsort(row["ranks"])
        prompt, responses = row["prompt_ids"], row["response_ids"]
        explicit = [
            {"prompt_ids": prompt, "chosen_ids": responses[i], "rejected_ids": responses[j]}
            for i, j in combinations(order.tolist(), 2)
        ]
        k = len(order)
        assert len(explicit) == math.comb(k, 2)
        part = RewardCollator(0)(explicit)
        loss = reward_loss(rewards_of(part, weights), part).loss / len(rows)
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(reward_loss(rewards_of(batch, weights), batch).loss.detach(), total)
    torch.testing.assert_close(kwise, weights.grad)


def test_a_margin_reaches_the_loss():
    batch = RewardCollator(0)(pairs(4, margin=True))
    rewards = torch.randn(8)
    output = reward_loss(rewards, batch)
    margins = torch.tensor([row["margin"] for row in pairs(4, margin=True)])
    expected = -F.logsigmoid(rewards[:4] - rewards[4:] - margins).mean()
    torch.testing.assert_close(output.loss, expected)
    plain = {name: value for name, value in batch.items() if name != "margin"}
    torch.testing.assert_close(reward_loss(rewards, plain).loss, bradley_terry_loss(rewards[:4], rewards[4:]).loss)


def test_metrics_of_pairs():
    rows = pairs(5)
    batch, rewards = RewardCollator(0)(rows), torch.randn(10)
    meter = RewardMeter(lambda tensor: tensor)
    meter.update(reward_loss(rewards, batch).metrics)
    values, _ = meter.values()
    difference = rewards[:5] - rewards[5:]
    lengths = torch.tensor([len(row[name]) for name in ("chosen_ids", "rejected_ids") for row in rows]).float()
    expected = {
        "accuracy": (difference > 0).float().mean(), "margin": difference.mean(), "mean_reward": rewards.mean(),
        "min_reward": rewards.min(), "max_reward": rewards.max(), "length/chosen": lengths[:5].mean(),
        "length/rejected": lengths[5:].mean(),
        "length/reward_correlation": torch.corrcoef(torch.stack([rewards, lengths]))[0, 1],
        "length/margin_correlation": torch.corrcoef(torch.stack([difference, lengths[:5] - lengths[5:]]))[0, 1],
    }  # fmt: skip
    for name, value in expected.items():
        assert values[name] == pytest.approx(float(value), rel=1e-5, abs=1e-6), name
    others = {name for name in values if name not in expected}
    assert others
    assert all(name.startswith("calibration/") for name in others)
    assert not any(math.isnan(value) for value in values.values())  # empty buckets are left out


def test_standard_errors_of_pairs_and_of_lists():
    batch, rewards = RewardCollator(0)(pairs(40)), torch.randn(80, dtype=torch.float64)
    output = reward_loss(rewards, batch)
    errors = spread_errors(output.metrics)
    difference = (rewards[:40] - rewards[40:]).numpy()
    right = difference > 0
    assert errors["accuracy_se"] == pytest.approx(np.std(right) / 39**0.5)
    assert errors["margin_se"] == pytest.approx(np.std(difference) / 39**0.5)
    losses = np.logaddexp(0, -difference)
    assert errors["loss_se"] == pytest.approx(np.std(losses) / 39**0.5)

    # copies of one comparison inside a list are no more evidence than the comparison
    single = pairs(30, seed=1)
    rewards = torch.randn(60, dtype=torch.float64)
    pair_errors = spread_errors(reward_loss(rewards, RewardCollator(0)(single)).metrics)
    copied = []
    for row in single:
        responses = [row["chosen_ids"]] * 3 + [row["rejected_ids"]] * 3
        copied.append({"prompt_ids": row["prompt_ids"], "response_ids": responses, "ranks": [1, 1, 1, 2, 2, 2]})
    of_lists = torch.stack([rewards[:30]] * 3 + [rewards[30:]] * 3, 1).flatten()
    list_errors = spread_errors(reward_loss(of_lists, RewardCollator(0)(copied)).metrics)
    for name, value in pair_errors.items():
        assert list_errors[name] == pytest.approx(value), name


@given(st.lists(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=4), min_size=1, max_size=4))
def test_extremes_are_of_all_responses_and_of_all_processes(batches):
    meter = RewardMeter(lambda tensor: torch.cat([tensor, torch.tensor([-7.0, -8.0])]))  # another process: −7 and 8
    one = torch.ones(())
    for values in batches:
        rewards = torch.tensor(values)
        meter.update({"min_reward": Metric(rewards.min(), one), "max_reward": Metric(rewards.max(), one)})
    meter.update(
        {"min_reward": Metric(one * 0, one * 0), "max_reward": Metric(one * 0, one * 0)}
    )  # filled up: no weight
    everything = [value for values in batches for value in values]
    alone, _ = meter.values()
    assert alone == {"min_reward": min(everything), "max_reward": max(everything)}
    both, _ = meter.values(lambda tensor: tensor)
    assert both == {"min_reward": -7.0, "max_reward": 8.0}
    meter.clear()
    assert "min_reward" not in meter.values()[0]
