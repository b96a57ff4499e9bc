"""Listwise losses: loops over the formulas in float64, ties, temperatures, extremes, and what they refuse."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fastalign.losses import LISTWISE_LOSSES, infonce_loss, list_losses, merge_metrics, pro_loss, summarize

LOSSES = {"pro": pro_loss, "infonce": infonce_loss}


def build(sizes, seed, ties=True):
    """scores, ranks, rewards that fall with the ranks, lengths, cu_lists of lists of the given sizes."""
    g = torch.Generator().manual_seed(seed)
    count = sum(sizes)
    ranks = torch.randint(1, 4, (count,), generator=g) if ties else torch.cat([torch.randperm(k) + 1 for k in sizes])
    rewards = -ranks.double() - 0.5 * torch.rand(count, generator=g, dtype=torch.float64)
    cu = torch.tensor([0, *torch.tensor(sizes, dtype=torch.int64).cumsum(0).tolist()])
    scores = torch.randn(count, generator=g, dtype=torch.float64)
    return scores, ranks, rewards, torch.randint(1, 30, (count,), generator=g), cu


def members(cu):
    return [range(a, b) for a, b in pairwise(cu.tolist())]


def term(k, worse, f, r):
    """−log [exp(f_k/T_k) / (exp(f_k/T_k) + Σ exp(f_i/T_i))], by the definition."""
    if not worse:
        return 0.0
    inverse = {i: 1.0 if r is None else max(r[k] - r[i], 0.0) for i in worse}
    own = f[k] * max(inverse.values())
    return math.log(math.exp(own) + sum(math.exp(f[i] * inverse[i]) for i in worse)) - own


def by_loops(loss_type, scores, ranks, rewards, cu):
    f, rank = scores.tolist(), ranks.tolist()
    r = None if rewards is None else rewards.tolist()
    losses = []
    for own in members(cu):
        worse = {k: [i for i in own if rank[i] > rank[k]] for k in own}
        terms = {k: term(k, worse[k], f, r) for k in own}
        best = [k for k in own if rank[k] == min(rank[i] for i in own)]
        if loss_type == "pro":
            losses.append(sum(terms.values()))
        else:
            losses.append(sum(terms[k] for k in best) / max(len(best), 1))
    return losses


@pytest.mark.parametrize("loss_type", LISTWISE_LOSSES)
@pytest.mark.parametrize("tempered", [False, True], ids=["plain", "tempered"])
@given(sizes=st.lists(st.integers(0, 5), max_size=5), seed=st.integers(0, 999))
def test_losses_and_metrics_are_those_of_loops(loss_type, tempered, sizes, seed):
    scores, ranks, rewards, lengths, cu = build(sizes, seed)
    rewards = rewards if tempered else None
    out = LOSSES[loss_type](scores, ranks, cu_lists=cu, rewards=rewards, lengths=lengths, reduction="none")
    expected = by_loops(loss_type, scores, ranks, rewards, cu)
    assert out.loss.tolist() == pytest.approx(expected, abs=1e-12)
    mean = LOSSES[loss_type](scores, ranks, cu_lists=cu, rewards=rewards).loss
    assert float(mean) == pytest.approx(sum(expected) / max(len(expected), 1), abs=1e-12)

    pairs = [(k, i) for own in members(cu) for k in own for i in own if ranks[k] < ranks[i]]
    right = sum(bool(scores[k] > scores[i]) for k, i in pairs)
    margin = sum(float(scores[k] - scores[i]) for k, i in pairs)
    assert [float(x) for x in out.metrics["accuracy"]] == [right, len(pairs)]
    assert float(out.metrics["margin"].total) == pytest.approx(margin, abs=1e-9)
    top, comparable, best, worst = 0, 0, [], []
    for own in members(cu):
        if len({int(ranks[i]) for i in own}) > 1:
            comparable += 1
            low, high = min(ranks[i] for i in own), max(ranks[i] for i in own)
            top += ranks[max(own, key=lambda i: scores[i])] == low
            best += [i for i in own if ranks[i] == low]
            worst += [i for i in own if ranks[i] == high]
    assert [float(x) for x in out.metrics["top1_accuracy"]] == [top, comparable]
    for name, index in (("best", best), ("worst", worst)):
        for what, values in (("scores", scores), ("length", lengths)):
            metric = out.metrics[f"{what}/{name}"]
            assert float(metric.total) == pytest.approx(float(values[index].sum()), abs=1e-9)
            assert float(metric.weight) == len(index)
    if len(pairs) > 2:
        x = torch.tensor([float(scores[k] - scores[i]) for k, i in pairs], dtype=torch.float64)
        y = torch.tensor([float(lengths[k] - lengths[i]) for k, i in pairs], dtype=torch.float64)
        correlation = float(summarize(out.metrics)["length/margin_correlation"])
        expected = float(torch.corrcoef(torch.stack([x, y]))[0, 1]) if y.std() > 0 else math.nan
        assert correlation == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_a_worked_example():
    """f = (2, 1, 0): −log(e²/(e²+e+1)) − log(e/(e+1)); r = (3, 1, 0) weighs the scores by 3, 2, 3 and by 1, 1."""
    f, ranks, cu = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64), torch.tensor([1, 2, 3]), torch.tensor([0, 3])
    e = math.e
    first, second = math.log((e**2 + e + 1) / e**2), math.log((e + 1) / e)
    assert float(pro_loss(f, ranks, cu_lists=cu).loss) == pytest.approx(first + second, abs=1e-12)
    assert float(infonce_loss(f, ranks, cu_lists=cu).loss) == pytest.approx(first, abs=1e-12)
    tempered = math.log((e**6 + e**2 + 1) / e**6) + math.log((e + 1) / e)
    rewards = torch.tensor([3.0, 1.0, 0.0])
    assert float(pro_loss(f, ranks, cu_lists=cu, rewards=rewards).loss) == pytest.approx(tempered, abs=1e-12)


@pytest.mark.parametrize("loss_type", LISTWISE_LOSSES)
def test_two_responses_are_a_pair(loss_type):
    f = torch.randn(20, dtype=torch.float64)
    losses = list_losses(f, torch.tensor([1, 2] * 10), cu_lists=torch.arange(0, 21, 2), loss_type=loss_type)
    torch.testing.assert_close(losses, -F.logsigmoid(f[0::2] - f[1::2]))
    swapped = list_losses(f, torch.tensor([2, 1] * 10), cu_lists=torch.arange(0, 21, 2), loss_type=loss_type)
    torch.testing.assert_close(swapped, -F.logsigmoid(f[1::2] - f[0::2]))


def test_pro_is_the_likelihood_of_plackett_and_luce():
    """Over all rankings of four responses the likelihoods add up to 1."""
    f = torch.randn(4, dtype=torch.float64)
    orders = torch.cartesian_prod(*[torch.arange(1, 5)] * 4)
    orders = orders[orders.sort(dim=1).values.eq(torch.arange(1, 5)).all(dim=1)]
    assert len(orders) == 24
    losses = list_losses(f.repeat(24), orders.flatten(), cu_lists=torch.arange(0, 97, 4))
    assert float((-losses).exp().sum()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("loss_type", LISTWISE_LOSSES)
@pytest.mark.parametrize("tempered", [False, True], ids=["plain", "tempered"])
@given(k=st.integers(2, 6), seed=st.integers(0, 999))
def test_the_order_in_a_list_changes_nothing_tied_or_not(loss_type, tempered, k, seed):
    scores, ranks, rewards, _, cu = build([k], seed)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    rewards = rewards if tempered else None
    a = LOSSES[loss_type](scores, ranks, cu_lists=cu, rewards=rewards)
    given_rewards = None if rewards is None else rewards[order]
    b = LOSSES[loss_type](scores[order], ranks[order], cu_lists=cu, rewards=given_rewards)
    torch.testing.assert_close(a.loss, b.loss)
    for name, metric in a.metrics.items():
        torch.testing.assert_close(metric, b.metrics[name])


def test_tied_responses_are_not_compared():
    """Moving one tied score moves neither the other's term nor its gradient, where nothing is ranked before them."""
    ranks, cu = torch.tensor([1, 1, 2]), torch.tensor([0, 3])
    f = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(pro_loss(f, ranks, cu_lists=cu).loss, f)
    moved = torch.tensor([0.3, 4.0, 0.1], dtype=torch.float64, requires_grad=True)
    (other,) = torch.autograd.grad(pro_loss(moved, ranks, cu_lists=cu).loss, moved)
    assert grad[0] == other[0]
    assert grad[1] != other[1]
    everything_tied = pro_loss(f, torch.ones(3), cu_lists=cu)
    assert everything_tied.loss.item() == 0
    (grad,) = torch.autograd.grad(everything_tied.loss, f)
    assert not grad.any()


@pytest.mark.parametrize("loss_type", LISTWISE_LOSSES)
def test_gradients(loss_type):
    scores, ranks, rewards, _, cu = build([3, 1, 0, 4, 2], 3)
    scores.requires_grad_()
    for given_rewards in (None, rewards):
        assert torch.autograd.gradcheck(
            lambda f, r=given_rewards: list_losses(f, ranks, cu_lists=cu, rewards=r, loss_type=loss_type), scores
        )


@pytest.mark.parametrize("loss_type", LISTWISE_LOSSES)
def test_equal_rewards_divide_nothing_by_zero(loss_type):
    f = torch.randn(4, dtype=torch.float64, requires_grad=True)
    ranks, rewards, cu = torch.tensor([1, 2, 3, 4]), torch.tensor([2.0, 2.0, 1.0, 1.0]), torch.tensor([0, 4])
    out = LOSSES[loss_type](f, ranks, cu_lists=cu, rewards=rewards)
    (grad,) = torch.autograd.grad(out.loss, f)
    assert out.loss.isfinite()
    assert grad.isfinite().all()
    assert grad[0] != 0
    flat = LOSSES[loss_type](f, ranks, cu_lists=cu, rewards=torch.ones(4))  # every exponent is 0
    assert flat.loss.item() == pytest.approx(math.log(4) + (math.log(3) + math.log(2)) * (loss_type == "pro"))


@pytest.mark.parametrize("loss_type", LISTWISE_LOSSES)
@pytest.mark.parametrize("scale", [1e3, 1e30])
@pytest.mark.parametrize("tempered", [False, True], ids=["plain", "tempered"])
def test_extreme_scores_are_finite(loss_type, scale, tempered):
    f = (scale * torch.tensor([-1.0, 1.0, 0.0, 1.0, -1.0, 0.5])).requires_grad_()
    ranks, cu = torch.tensor([1, 2, 3, 1, 2, 2]), torch.tensor([0, 3, 6])
    out = LOSSES[loss_type](f, ranks, cu_lists=cu, rewards=-ranks.float() if tempered else None, reduction="none")
    (grad,) = torch.autograd.grad(out.loss.sum(), f)
    assert out.loss.isfinite().all()
    assert grad.isfinite().all()
    assert out.loss[0].item() >= 2 * scale
    assert out.loss[1].item() == 0


def test_tails_keep_their_digits():
    """A list that is almost surely right: log1p, not log(1 + 2e-9) = 0 in float32."""
    f, ranks, cu = torch.tensor([20.0, 0.0]), torch.tensor([1, 2]), torch.tensor([0, 2])
    assert float(pro_loss(f, ranks, cu_lists=cu).loss) == pytest.approx(math.exp(-20), rel=1e-5)


def test_rewards_against_the_ranks_never_reward_the_worse_response():
    """1/T is at least 0: a better response of a lower reward is not pushed down."""
    f = torch.randn(2, dtype=torch.float64, requires_grad=True)
    out = pro_loss(f, torch.tensor([1, 2]), cu_lists=torch.tensor([0, 2]), rewards=torch.tensor([0.0, 5.0]))
    (grad,) = torch.autograd.grad(out.loss, f)
    assert not grad.any()


@pytest.mark.parametrize("loss_type", LISTWISE_LOSSES)
def test_micro_batches_add_up(loss_type):
    scores, ranks, _, lengths, cu = build([3, 2, 5, 4], 1)
    loss = LOSSES[loss_type]
    whole = loss(scores, ranks, cu_lists=cu, lengths=lengths)
    cut = int(cu[2])
    parts = [
        loss(scores[a:b], ranks[a:b], cu_lists=bounds, lengths=lengths[a:b], num_items=items)
        for a, b, bounds, items in (
            (0, cut, cu[:3], 4),
            (cut, len(scores), cu[2:] - cut, torch.tensor(4)),
        )
    ]
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss)
    merged = summarize(merge_metrics(*(p.metrics for p in parts)))
    for name, value in summarize(whole.metrics).items():
        torch.testing.assert_close(merged[name], value, equal_nan=True)
    total = loss(scores, ranks, cu_lists=cu, reduction="sum").loss
    torch.testing.assert_close(total, 4 * whole.loss)


def test_16_bit_scores_are_computed_in_float32():
    scores, ranks, _, _, cu = build([4, 3], 0)
    half = scores.to(torch.bfloat16)
    out = pro_loss(half, ranks, cu_lists=cu)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, pro_loss(half.float(), ranks, cu_lists=cu).loss)


def test_nothing_is_zero_and_attached():
    f = torch.zeros(0, requires_grad=True)
    out = pro_loss(f, torch.zeros(0), cu_lists=torch.tensor([0]))
    assert out.loss.item() == 0
    out.loss.backward()
    assert pro_loss(f, torch.zeros(0), cu_lists=torch.tensor([0, 0]), rewards=f.detach(), reduction="none").loss == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, r, cu: pro_loss(f.long(), r, cu_lists=cu), "scores: dtype torch.int64"),
        (lambda f, r, cu: pro_loss(f[:, None], r, cu_lists=cu), r"scores: shape \(3, 1\), accepted is \(C,\)"),
        (lambda f, r, cu: pro_loss(f, r[:2], cu_lists=cu), r"ranks: shape \(2,\)"),
        (lambda f, r, cu: pro_loss(f, r, cu_lists=cu, rewards=f[:2]), r"rewards: shape \(2,\)"),
        (lambda f, r, cu: pro_loss(f, r, cu_lists=cu, lengths=r[:2]), r"lengths: shape \(2,\)"),
        (lambda f, r, cu: pro_loss(f, r, cu_lists=cu, rewards=f.clone().requires_grad_()), "rewards requires grad"),
        (lambda f, r, cu: infonce_loss(f, r, cu_lists=cu - 1), "cu_lists must rise from 0 to 3"),
        (lambda f, r, cu: pro_loss(f, r, cu_lists=torch.tensor([0, 2])), "must rise from 0 to 3"),
        (lambda f, r, cu: pro_loss(f, r, cu_lists=cu, reduction="all"), "reduction='all'"),
        (lambda f, r, cu: pro_loss(f, r, cu_lists=cu, reduction="sum", num_items=2), "num_items"),
        (lambda f, r, cu: list_losses(f, r, cu_lists=cu, loss_type="plackett"), "accepted are 'pro', 'infonce'"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3), torch.tensor([1, 2, 3]), torch.tensor([0, 3]))
