"""Reward-model losses: worked examples, brute force over pairs, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastalign.losses import bradley_terry_loss, label_loss, merge_metrics, ranking_loss, summarize


def t(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_worked_examples():
    """P(B ≻ A) = 0.9 means a difference of log 9 and a loss of 0.1054; 0.8 against −1.4 gives 0.9002."""
    out = bradley_terry_loss(t(math.log(9)), t(0.0))
    assert float(out.loss) == pytest.approx(-math.log(0.9), abs=1e-12)
    assert round(float(out.loss), 4) == 0.1054
    assert round(math.exp(-float(bradley_terry_loss(t(0.8), t(-1.4)).loss)), 4) == 0.9002


def test_margin_and_centering():
    chosen, rejected, margin = t(1.0, -0.5), t(0.2, 0.3), torch.tensor([0.5, 1.0])
    out = bradley_terry_loss(chosen, rejected, margin=margin, center_rewards_coefficient=0.01, reduction="none")
    for i in range(2):
        d = float(chosen[i] - rejected[i] - margin[i])
        expected = math.log1p(math.exp(-d)) + 0.01 * float(chosen[i] + rejected[i]) ** 2
        assert float(out.loss[i]) == pytest.approx(expected, rel=1e-12)
    plain = bradley_terry_loss(chosen, rejected)
    shifted = bradley_terry_loss(chosen + 7, rejected + 7)
    torch.testing.assert_close(plain.loss, shifted.loss)


def test_gradients():
    chosen, rejected = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda a, b: bradley_terry_loss(a, b, center_rewards_coefficient=0.1).loss, (chosen, rejected)
    )
    ranks, cu = torch.tensor([1, 2, 2, 1, 3, 2]), torch.tensor([0, 3, 6])
    assert torch.autograd.gradcheck(lambda r: ranking_loss(r, ranks, cu_lists=cu).loss, (chosen,))


@given(sizes=st.lists(st.integers(0, 5), max_size=5), seed=st.integers(0, 99))
def test_ranking_is_the_mean_over_strict_comparisons(sizes, seed):
    g = torch.Generator().manual_seed(seed)
    count = sum(sizes)
    rewards = torch.randn(count, generator=g, dtype=torch.float64)
    ranks = torch.randint(1, 4, (count,), generator=g)
    cu = torch.tensor([0, *torch.tensor(sizes, dtype=torch.int64).cumsum(0).tolist()])
    out = ranking_loss(rewards, ranks, cu_lists=cu, reduction="none")
    right = strict = 0
    for k in range(len(sizes)):
        members = range(int(cu[k]), int(cu[k + 1]))
        pairs = [(i, j) for i in members for j in members if ranks[i] < ranks[j]]
        losses = [math.log1p(math.exp(float(rewards[j] - rewards[i]))) for i, j in pairs]
        assert float(out.loss[k]) == pytest.approx(sum(losses) / max(len(pairs), 1), abs=1e-9)
        right += sum(float(rewards[i]) > float(rewards[j]) for i, j in pairs)
        strict += len(pairs)
    assert float(out.metrics["accuracy"].total) == right
    assert float(out.metrics["accuracy"].weight) == strict


def test_a_pair_is_a_list_of_two():
    chosen, rejected = torch.randn(2, 7)
    rewards = torch.stack([chosen, rejected], 1).flatten()
    ranks, cu = torch.tensor([1, 2] * 7), torch.arange(0, 15, 2)
    pairs, lists = bradley_terry_loss(chosen, rejected), ranking_loss(rewards, ranks, cu_lists=cu)
    torch.testing.assert_close(pairs.loss, lists.loss)
    for name, value in summarize(pairs.metrics).items():
        torch.testing.assert_close(value, summarize(lists.metrics)[name], equal_nan=True)


def test_micro_batches_add_up():
    chosen, rejected = torch.randn(2, 9)
    whole = bradley_terry_loss(chosen, rejected)
    parts = [bradley_terry_loss(chosen[i], rejected[i], num_items=9) for i in (slice(0, 2), slice(2, 9))]
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss)
    merged = summarize(merge_metrics(*(p.metrics for p in parts)))
    for name, value in summarize(whole.metrics).items():
        torch.testing.assert_close(merged[name], value, equal_nan=True)


def test_calibration_of_a_model_that_is():
    """Outcomes drawn with the model's own probabilities: accuracy and confidence agree in every bucket."""
    g = torch.Generator().manual_seed(0)
    size = torch.rand(200_000, generator=g, dtype=torch.float64) * 6
    wins = torch.rand(len(size), generator=g, dtype=torch.float64) < torch.sigmoid(size)
    difference = torch.where(wins, size, -size)
    values = summarize(bradley_terry_loss(difference, torch.zeros_like(difference)).metrics)
    for i in range(5):
        assert float(values[f"calibration/{i}/accuracy"]) == pytest.approx(
            float(values[f"calibration/{i}/confidence"]), abs=0.01
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: bradley_terry_loss(r[:, None], r), r"chosen_rewards: shape \(3, 1\), accepted is \(P,\)"),
        (lambda r: bradley_terry_loss(r, r[:2]), r"rejected_rewards: shape \(2,\)"),
        (lambda r: bradley_terry_loss(r, r, margin=r[:2]), r"margin: shape \(2,\)"),
        (lambda r: bradley_terry_loss(r.long(), r), "chosen_rewards: dtype torch.int64"),
        (lambda r: bradley_terry_loss(r, r, center_rewards_coefficient=-1), "center_rewards_coefficient=-1"),
        (lambda r: ranking_loss(r, torch.tensor([1, 2]), cu_lists=torch.tensor([0, 3])), r"ranks: shape \(2,\)"),
        (lambda r: ranking_loss(r, torch.tensor([1, 2, 3]), cu_lists=torch.tensor([0, 2])), "must rise from 0 to 3"),
        (lambda r: ranking_loss(r, torch.tensor([1, 2, 3]), cu_lists=torch.tensor([0, 2, 1, 3])), "must rise"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3))


# ---- labels


def test_scalar_labels_are_squared_errors():
    rewards, labels = t(1.0, -0.5, 2.0), torch.tensor([0.0, 0.5, 2.5])
    out = label_loss(rewards, labels, reduction="none")
    assert out.loss.tolist() == pytest.approx([1.0, 1.0, 0.25])
    assert float(label_loss(rewards, labels).loss) == pytest.approx(0.75)
    assert float(label_loss(rewards, labels, num_items=9).loss) == pytest.approx(0.25)
    values = summarize(label_loss(rewards, labels).metrics)
    expected = torch.corrcoef(torch.stack([rewards.detach(), labels.double()]))[0, 1]
    assert float(values["label_correlation"]) == pytest.approx(float(expected))
    assert float(values["mean_reward"]) == pytest.approx(2.5 / 3)
    assert float(values["mean_label"]) == pytest.approx(1.0)


def test_binary_labels_are_comparisons_with_reward_zero():
    rewards, labels = t(1.2, -0.5, 2.0, 0.0), torch.tensor([True, True, False, True])
    out = label_loss(rewards, labels, label_type="binary", reduction="none")
    zero = torch.zeros(4, dtype=torch.float64)
    good, bad = torch.where(labels, rewards, zero), torch.where(labels, zero, rewards)
    expected = bradley_terry_loss(good, bad, reduction="none")
    torch.testing.assert_close(out.loss, expected.loss)
    for name in expected.metrics.keys() - {"mean_reward"}:
        torch.testing.assert_close(out.metrics[name], expected.metrics[name])
    assert float(out.metrics["accuracy"].value) == 0.25  # a reward of 0 says nothing


def test_label_gradients_and_large_rewards():
    rewards = torch.randn(5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 1, 0, 1])
    for label_type in ("scalar", "binary"):
        assert torch.autograd.gradcheck(lambda r, kind=label_type: label_loss(r, labels, label_type=kind).loss, rewards)
    out = label_loss(torch.tensor([-200.0]), torch.tensor([1]), label_type="binary")
    assert float(out.loss) == 200


def test_bad_labels_are_refused():
    rewards = torch.zeros(3)
    for kwargs, message in (
        ({"labels": torch.zeros(2)}, r"labels: \(2,\)"),
        ({"labels": torch.zeros(3), "label_type": "real"}, "label_type='real': accepted are 'scalar', 'binary'"),
        ({"labels": torch.zeros(3), "reduction": "all"}, "reduction='all'"),
    ):
        with pytest.raises(ValueError, match=message):
            label_loss(rewards, **kwargs)
    with pytest.raises(ValueError, match=r"torch\.int64"):
        label_loss(torch.zeros(3, dtype=torch.int64), torch.zeros(3))
