"""Token rewards against a plain loop, running moments against all scores at once, and what both refuse."""

from __future__ import annotations

import json
import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.losses import KL_ESTIMATORS, RunningMoments, shape_scores, token_rewards
from fastalign.losses.shaping import overlong_penalty

ESTIMATORS = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(-d) - 1 + d}


def rollout(B=4, T=7, seed=0, dtype=torch.float64, valid=0.6):
    g = torch.Generator().manual_seed(seed)
    logps, ref = -3 * torch.rand(2, B, T, generator=g, dtype=dtype)
    return torch.randn(B, generator=g, dtype=dtype), logps, ref, torch.rand(B, T, generator=g) < valid


@settings(max_examples=40)
@given(
    B=st.integers(0, 4), T=st.integers(0, 8), valid=st.sampled_from([0.0, 0.4, 1.0]), seed=st.integers(0, 9),
    estimator=st.sampled_from(sorted(ESTIMATORS)), dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_rewards_by_hand(B, T, valid, seed, estimator, dtype):
    scores, logps, ref, mask = rollout(B, T, seed, dtype, valid)
    rewards, kl = token_rewards(scores, logps, ref, mask, kl_coef=0.3, kl_estimator=estimator)
    assert rewards.dtype == kl.dtype == dtype
    assert rewards.shape == kl.shape == (B, T)
    for b in range(B):
        valid_at = [t for t in range(T) if mask[b, t]]
        for t in range(T):
            expected = ESTIMATORS[estimator](float(logps[b, t]) - float(ref[b, t])) if t in valid_at else 0.0
            assert float(kl[b, t]) == pytest.approx(expected, abs=1e-6)
            score = float(scores[b]) if valid_at and t == valid_at[-1] else 0.0
            assert float(rewards[b, t]) == pytest.approx(score - 0.3 * expected, abs=1e-6)


def test_estimators_are_those_of_the_loss():
    assert sorted(ESTIMATORS) == sorted(KL_ESTIMATORS)


def test_a_completion_adds_up_to_its_score_minus_its_kl():
    scores, logps, ref, mask = rollout(valid=0.5)
    mask[2] = False
    rewards, kl = token_rewards(scores, logps, ref, mask, kl_coef=0.05)
    expected = torch.where(mask.any(1), scores - 0.05 * ((logps - ref) * mask).sum(1), 0)
    torch.testing.assert_close(rewards.sum(1), expected)
    torch.testing.assert_close(kl, (logps - ref) * mask)


def test_the_score_lies_at_the_last_valid_token_wherever_that_is():
    """Right padding, left padding, a gap, one token, none: found from the mask, never from what lies outside."""
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    scores = torch.tensor([1.0, 2, 3, 4, 5])
    rewards, kl = token_rewards(scores, torch.zeros(5, 4), None, mask, kl_coef=0.0)
    expected = torch.tensor([[0, 1.0, 0, 0], [0, 0, 0, 2], [0, 0, 3, 0], [0, 4, 0, 0], [0, 0, 0, 0]])
    assert torch.equal(rewards, expected)
    assert not kl.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_lies_under_the_mask_never_enters(bad):
    scores, logps, ref, mask = rollout()
    mask[1] = False
    clean = token_rewards(scores, logps, ref, mask, kl_coef=0.1)
    scores[1] = bad  # an empty completion has no score
    dirty = token_rewards(
        scores, torch.where(mask, logps, bad), torch.where(mask, ref, bad), mask, kl_coef=torch.tensor(0.1)
    )
    for a, b in zip(clean, dirty, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=0)
        assert not b[~mask].any()


def test_no_coefficient_silences_a_kl_that_is_infinite():
    scores, logps, ref, mask = rollout()
    rewards, kl = token_rewards(scores, logps, torch.full_like(ref, -math.inf), mask, kl_coef=0.0)
    assert rewards.isfinite().all()
    assert kl[mask].isinf().all()


def test_dtypes_and_gradients():
    scores, logps, ref, mask = rollout(dtype=torch.bfloat16)
    rewards, _ = token_rewards(scores, logps.requires_grad_(), ref.requires_grad_(), mask, kl_coef=0.1)
    assert rewards.dtype == torch.float32
    assert not rewards.requires_grad
    exact, _ = token_rewards(scores.double(), logps, ref, mask, kl_coef=0.1)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(rewards.double(), exact, rtol=1e-6, atol=1e-6)


def test_nothing_waits_for_the_device():
    """Meta tensors hold no numbers: whatever needs one of them on the host raises."""
    scores, logps, ref, mask = (x.to("meta") for x in rollout())
    rewards, _ = token_rewards(scores, logps, ref, mask, kl_coef=torch.zeros((), device="meta"), kl_estimator="k3")
    assert rewards.shape == logps.shape
    moments = RunningMoments()
    moments.update(scores)
    moments.update(scores, reduce=lambda tensor: tensor + tensor)
    finished = torch.ones(4, dtype=torch.bool, device="meta")
    assert shape_scores(scores, moments=moments, clip=1.0, finished=finished, missing_eos_penalty=1.0).shape == (4,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(3)}, r"scores: shape \(3,\), accepted is \(4,\), one per completion"),
        ({"scores": torch.zeros(4, 1)}, r"scores: shape \(4, 1\)"),
        ({"scores": torch.zeros(4, dtype=torch.int64)}, "scores: dtype torch.int64"),
        ({"logps": torch.zeros(4)}, r"logps: shape \(4,\), accepted is \(B, T\)"),
        ({"ref_logps": torch.zeros(4, 6)}, r"ref_logps: shape \(4, 6\)"),
        ({"ref_logps": None}, "kl_coef=0.1 needs ref_logps"),
        ({"ref_logps": None, "kl_coef": torch.tensor(0.0)}, "needs ref_logps"),
        ({"mask": torch.ones(4, 7)}, "mask: torch.float32"),
        ({"kl_coef": -0.1}, "kl_coef=-0.1: it must be at least 0 and finite"),
        ({"kl_coef": math.nan}, "kl_coef=nan"),
        ({"kl_coef": torch.zeros(1)}, r"kl_coef: shape \(1,\)"),
        ({"kl_estimator": "k4"}, "kl_estimator='k4': accepted are 'k1', 'k2', 'k3'"),
    ],
)
def test_refusals(change, message):
    scores, logps, ref, mask = rollout()
    arguments = {"scores": scores, "logps": logps, "ref_logps": ref, "mask": mask, "kl_coef": 0.1}
    with pytest.raises(ValueError, match=message):
        token_rewards(**arguments | change)


@settings(max_examples=40)
@given(sizes=st.lists(st.integers(0, 9), max_size=6), offset=st.sampled_from([0.0, -3.0, 1e6]), seed=st.integers(0, 99))
def test_moments_of_any_split_are_those_of_the_whole(sizes, offset, seed):
    scores = np.random.default_rng(seed).normal(offset, 2.0, sum(sizes))
    moments = RunningMoments()
    for part in np.split(scores, np.cumsum(sizes)[:-1] if sizes else []):
        moments.update(torch.from_numpy(part))
    assert float(moments.count) == len(scores)
    if len(scores):
        assert float(moments.mean) == pytest.approx(scores.mean(), rel=1e-14, abs=1e-14)
    if len(scores) > 1:
        assert float(moments.variance) == pytest.approx(scores.var(ddof=1), rel=1e-9)


def test_moments_over_processes():
    """Two threads stand for two processes; the sum they share is the only thing that passes between them."""
    scores = torch.randn(3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 5
    barrier, shared, found = threading.Barrier(2, timeout=20), [None, None], [None, None]

    def process(rank):
        def reduce(tensor):
            shared[rank] = tensor
            barrier.wait()
            total = shared[0] + shared[1]
            barrier.wait()
            return total

        moments = RunningMoments()
        for batch in scores:
            moments.update(batch[:10] if rank == 0 else batch[10:], reduce=reduce)
        found[rank] = moments.state_dict()

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert found[0]["count"] == scores.numel()
    assert found[0]["mean"] == pytest.approx(float(scores.mean()), rel=1e-13)
    assert found[0]["sum_of_squares"] == pytest.approx(float((scores - scores.mean()).square().sum()), rel=1e-12)


def test_moments_continue_to_the_bit_through_json():
    first, second = torch.randn(2, 11, generator=torch.Generator().manual_seed(1))
    whole, resumed = RunningMoments(), RunningMoments()
    whole.update(first)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for moments in (whole, resumed):
        moments.update(second)
    assert whole.state_dict() == resumed.state_dict()
    with pytest.raises(ValueError, match="accepted are count, mean, sum_of_squares"):
        resumed.load_state_dict({"count": 1.0})
    with pytest.raises(ValueError, match="count and sum_of_squares at least 0"):
        resumed.load_state_dict({"count": -1.0, "mean": 0.0, "sum_of_squares": 0.0})
    with pytest.raises(ValueError, match="must be finite"):
        resumed.load_state_dict({"count": 1.0, "mean": math.nan, "sum_of_squares": 0.0})
    with pytest.raises(ValueError, match="scores: dtype"):
        resumed.update(torch.tensor([1]))


def test_shaping_normalises_then_clips_then_penalises():
    moments = RunningMoments()
    moments.update(torch.tensor([0.0, 2.0, 4.0]))  # mean 2, std 2
    scores = torch.tensor([4.0, 100.0, -100.0, 2.0], dtype=torch.float64)
    finished = torch.tensor([True, True, False, False])
    full = shape_scores(scores, moments=moments, clip=3.0, finished=finished, missing_eos_penalty=0.5)
    assert full.tolist() == [1.0, 3.0, -3.5, -0.5]
    assert shape_scores(scores, moments=moments, shift_mean=False).tolist() == [2.0, 50.0, -50.0, 1.0]
    assert shape_scores(scores, clip=3.0).tolist() == [3.0, 3.0, -3.0, 2.0]
    assert torch.equal(shape_scores(scores, finished=finished), scores)
    assert float(moments.count) == 3  # shaping takes nothing in


def test_normalised_scores_have_mean_0_and_deviation_1():
    scores, moments = torch.randn(200, generator=torch.Generator().manual_seed(2)) * 7 - 30, RunningMoments()
    moments.update(scores)
    shaped = shape_scores(scores, moments=moments)
    assert shaped.dtype == torch.float32
    assert float(shaped.mean()) == pytest.approx(0, abs=1e-5)
    assert float(shaped.std()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e4])
def test_scores_that_never_differ_are_not_blown_up(value):
    scores, moments = torch.full((7,), value), RunningMoments()
    assert shape_scores(scores, moments=moments, shift_mean=False).tolist() == scores.tolist()  # none seen yet
    for _ in range(3):
        moments.update(scores)
    assert shape_scores(scores, moments=moments).abs().max() < 1e-6 * max(1, abs(value))
    assert shape_scores(scores, moments=moments, shift_mean=False).tolist() == scores.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip": 0.0}, "clip=0.0: it must be positive and finite"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty=-1.0"),
        ({"missing_eos_penalty": 1.0}, "missing_eos_penalty=1.0 needs finished"),
        ({"finished": torch.ones(4)}, "finished: torch.float32"),
        ({"finished": torch.ones(3, dtype=torch.bool)}, r"finished: torch.bool \(3,\), accepted is bool \(4,\)"),
    ],
)
def test_shaping_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        shape_scores(torch.zeros(4), **change)


def test_overlong_penalty_is_dapos():
    """Eq. 13 with L_max = 10 and L_cache = 4: nothing up to 6, then a quarter a token."""
    lengths = torch.tensor([1, 6, 7, 8, 10, 13])
    assert overlong_penalty(lengths, max_length=10, buffer=4).tolist() == [0, 0, 0.25, 0.5, 1, 1]
    assert overlong_penalty(lengths, max_length=10, buffer=10).tolist() == pytest.approx([0.1, 0.6, 0.7, 0.8, 1, 1])
    for buffer in (0, 11):
        with pytest.raises(ValueError, match=f"buffer={buffer}: it must be positive and at most max_length=10"):
            overlong_penalty(lengths, max_length=10, buffer=buffer)
