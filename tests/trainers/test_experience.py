"""From scores to advantages: against loops over completions in plain Python, and over two shares of a phase."""

import numpy as np
import pytest
import torch

from fastalign.losses import RunningMoments, merge_metrics, summarize
from fastalign.trainers.experience import TokenGrid, make_experience

LENGTHS = [3, 1, 5, 2]
CU = np.concatenate([[0], np.cumsum(LENGTHS)])
SCORES = [1.0, -2.0, 0.5, 3.0]
FINISHED = [True, False, True, True]


def given(seed=0):
    rng = np.random.default_rng(seed)
    n = CU[-1]
    logps = torch.tensor(rng.normal(-2, 0.5, n), dtype=torch.float32)
    return {
        "scores": torch.tensor(SCORES), "finished": torch.tensor(FINISHED), "cu_seqlens": CU, "logps": logps,
        "ref_logps": logps + torch.tensor(rng.normal(0, 0.3, n), dtype=torch.float32),
        "values": torch.tensor(rng.normal(0, 1, n), dtype=torch.float32), "kl_coef": 0.1,
    }  # fmt: skip


def parts(tensor):
    return [part.double().tolist() for part in tensor.split(LENGTHS)]


def shaped_rewards(inputs, scores=SCORES, kl=lambda d: d):
    rewards = []
    for i, (logps, refs) in enumerate(zip(parts(inputs["logps"]), parts(inputs["ref_logps"]), strict=True)):
        own = [-0.1 * kl(a - b) for a, b in zip(logps, refs, strict=True)]
        own[-1] += scores[i]
        rewards.append(own)
    return rewards


def advantages_of(rewards, values, gamma, lam):
    found = []
    for r, v in zip(rewards, values, strict=True):
        following, out = 0.0, [0.0] * len(r)
        for t in reversed(range(len(r))):
            delta = r[t] + gamma * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t]
            following = out[t] = delta + gamma * lam * following
        found.append(out)
    return found


def flat(lists):
    return torch.tensor([x for part in lists for x in part], dtype=torch.float32)


def whitened(tensor):
    return (tensor - tensor.mean()) / (tensor.var() + 1e-8).sqrt()


def test_a_grid_and_back():
    grid = TokenGrid(CU, torch.device("cpu"))
    values = torch.arange(1.0, 12.0)
    spread = grid.spread(values)
    assert spread.tolist() == [[1, 2, 3, 0, 0], [4, 0, 0, 0, 0], [5, 6, 7, 8, 9], [10, 11, 0, 0, 0]]
    assert torch.equal(grid.mask, spread > 0)
    assert torch.equal(grid.gather(spread), values)


def test_gae_with_a_critic(kit):
    inputs = given()
    args = kit.ppo_config(gamma=0.9, lam=0.7)
    got = make_experience(args, **inputs)
    expected = advantages_of(shaped_rewards(inputs), parts(inputs["values"]), 0.9, 0.7)
    torch.testing.assert_close(got.advantages, whitened(flat(expected)))
    torch.testing.assert_close(got.returns, flat(expected) + inputs["values"])  # before they are whitened
    args.whiten_advantages = False
    torch.testing.assert_close(make_experience(args, **inputs).advantages, flat(expected))


def test_whitened_rewards_keep_their_mean(kit):
    inputs = given()
    rewards = flat(shaped_rewards(inputs))
    scaled = whitened(rewards) + rewards.mean()
    expected = advantages_of([part.tolist() for part in scaled.split(LENGTHS)], parts(inputs["values"]), 1.0, 0.95)
    got = make_experience(kit.ppo_config(whiten_rewards=True, whiten_advantages=False), **inputs)
    torch.testing.assert_close(got.advantages, flat(expected), rtol=1e-4, atol=1e-5)
    sums = sum(map(sum, shaped_rewards(inputs))) / 4
    assert float(got.metrics["objective/rlhf_reward"].value) == pytest.approx(sums, rel=1e-5)  # as they were


def test_reinforce_is_the_return(kit):
    inputs = given() | {"values": None}
    got = make_experience(kit.ppo_config(advantage_estimator="reinforce", gamma=0.9, whiten_advantages=False), **inputs)
    zeros = [[0.0] * n for n in LENGTHS]
    torch.testing.assert_close(got.advantages, flat(advantages_of(shaped_rewards(inputs), zeros, 0.9, 1.0)))
    assert got.returns is None


@pytest.mark.parametrize("estimator", ["group", "rloo"])
def test_the_others_of_a_prompt_are_the_baseline(kit, estimator):
    inputs = given() | {"values": None}
    got = make_experience(kit.ppo_config(advantage_estimator=estimator, num_generations=2), **inputs)
    totals = np.array([sum(r) for r in shaped_rewards(inputs)]).reshape(2, 2)
    expected = totals - totals[:, ::-1]
    if estimator == "group":
        expected = (totals - totals.mean(1, keepdims=True)) / (totals.std(1, ddof=1, keepdims=True) + 1e-4)
    torch.testing.assert_close(
        got.advantages, torch.from_numpy(np.repeat(expected.flatten(), LENGTHS)).float(), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="4 completions are not a multiple of num_generations=8"):
        make_experience(kit.ppo_config(advantage_estimator=estimator, num_generations=8), **inputs)


def test_a_group_of_equal_scores_is_counted(kit):
    inputs = given() | {"scores": torch.tensor([1.0, 1.0, 0.0, 3.0]), "values": None}
    args = kit.ppo_config(advantage_estimator="group", num_generations=2)
    assert float(make_experience(args, **inputs).metrics["frac_reward_zero_std"].value) == 0.5


def test_groups_without_spread_are_not_kept(kit):
    inputs = given() | {"scores": torch.tensor([1.0, 1.0, 0.0, 3.0]), "values": None}
    settings = {"advantage_estimator": "group", "num_generations": 2}
    assert make_experience(kit.ppo_config(**settings), **inputs).kept is None
    got = make_experience(kit.ppo_config(filter_groups=True, **settings), **inputs)
    assert got.kept.tolist() == [False, False, True, True]
    assert float(got.metrics["completions/filtered_ratio"].value) == 0.5
    # a penalty on length is part of the score: completions of 3 tokens and 1 differ again
    longer = kit.ppo_config(filter_groups=True, overlong_buffer=4, **settings)
    assert make_experience(longer, **inputs).kept.tolist() == [True] * 4


def test_truncated_completions_are_not_kept(kit):
    """But scored: what the others of the group have is measured against them too."""
    inputs = given() | {"scores": torch.tensor([1.0, 2.0, 3.0, 3.0]), "values": None}
    settings = {"advantage_estimator": "group", "num_generations": 2, "mask_truncated_completions": True}
    got = make_experience(kit.ppo_config(**settings), **inputs)
    assert got.kept.tolist() == FINISHED == [True, False, True, True]
    plain = make_experience(kit.ppo_config(**(settings | {"mask_truncated_completions": False})), **inputs)
    assert torch.equal(got.advantages, plain.advantages)
    both = make_experience(kit.ppo_config(filter_groups=True, **settings), **inputs)
    assert both.kept.tolist() == [True, False, False, False]


def test_long_completions_are_penalised(kit):
    """Of at most 6 tokens, the last 4 of which cost a quarter of the penalty each."""
    inputs = given()
    args = kit.ppo_config(overlong_buffer=4, overlong_penalty=2.0, whiten_advantages=False, missing_eos_penalty=0.5)
    got = make_experience(args, **inputs)
    scores = [
        score - 2.0 * max(n - 2, 0) / 4 - 0.5 * (not done)
        for score, n, done in zip(SCORES, LENGTHS, FINISHED, strict=True)
    ]
    expected = advantages_of(shaped_rewards(inputs, scores), parts(inputs["values"]), 1.0, 0.95)
    torch.testing.assert_close(got.advantages, flat(expected), rtol=1e-5, atol=1e-5)
    assert float(got.metrics["objective/scores"].value) == pytest.approx(np.mean(SCORES))  # raw


def test_scores_are_normalised_clipped_and_then_penalised(kit):
    inputs = given()
    moments = RunningMoments()
    moments.update(torch.tensor([0.0, 1.0, 2.0, 9.0]))
    args = kit.ppo_config(score_clip=0.4, missing_eos_penalty=5.0, whiten_advantages=False, normalize_scores=True)
    before = moments.state_dict()
    got = make_experience(args, **inputs, moments=moments)
    assert moments.state_dict() == before  # whoever collects lets them learn
    std = np.std([0, 1, 2, 9], ddof=1)
    scores = [
        float(np.clip((score - 3) / std, -0.4, 0.4)) - (0 if done else 5.0)
        for score, done in zip(SCORES, FINISHED, strict=True)
    ]
    expected = advantages_of(shaped_rewards(inputs, scores), parts(inputs["values"]), 1.0, 0.95)
    torch.testing.assert_close(got.advantages, flat(expected), rtol=1e-5, atol=1e-5)
    assert float(got.metrics["objective/scores"].value) == pytest.approx(np.mean(SCORES))  # raw


def test_metrics_by_hand(kit):
    inputs = given()
    got = make_experience(kit.ppo_config(kl_estimator="k3"), **inputs)
    found = {name: float(value) for name, value in summarize(got.metrics).items()}
    left = got.returns - inputs["values"]
    assert found["val/explained_variance"] == pytest.approx(float(1 - left.var() / got.returns.var()), rel=1e-4)
    d = [np.array(a) - np.array(b) for a, b in zip(parts(inputs["logps"]), parts(inputs["ref_logps"]), strict=True)]
    k3 = [np.expm1(-x) + x for x in d]
    assert found["objective/kl"] == pytest.approx(
        np.mean([x.sum() for x in d]), rel=1e-5
    )  # k1, whatever shapes rewards
    assert found["objective/kl_k3"] == pytest.approx(np.mean([x.sum() for x in k3]), rel=1e-4)
    assert found["objective/non_score_reward"] == pytest.approx(-0.1 * np.mean([x.sum() for x in k3]), rel=1e-4)
    assert found["objective/rlhf_reward"] == pytest.approx(np.mean(SCORES) + found["objective/non_score_reward"])
    assert found["objective/entropy"] == pytest.approx(-float(inputs["logps"].sum()) / 4, rel=1e-5)
    assert found["objective/scores_std"] == pytest.approx(np.std(SCORES), rel=1e-5)
    assert found["completions/clipped_ratio"] == 0.25
    assert found["completions/mean_length"] == 11 / 4


def test_without_a_reference_there_is_no_kl(kit):
    found = make_experience(kit.ppo_config(kl_coef=0.0), **(given() | {"ref_logps": None, "kl_coef": 0.0})).metrics
    assert "objective/kl" not in found
    assert float(found["objective/non_score_reward"].value) == 0


class Together:
    """Sums over two processes that are run one after the other: what the other one gives is known from a first run."""

    def __init__(self, other=()):
        self.seen, self.other = [], list(other)

    def __call__(self, tensor):
        self.seen.append(tensor)
        return tensor + self.other[len(self.seen) - 1] if self.other else tensor


def test_two_shares_have_the_metrics_and_advantages_of_the_whole(kit):
    """Whitening, deviation and explained variance are those of all processes; all of them call `reduce` alike."""
    inputs, args = given(), kit.ppo_config(whiten_rewards=True)
    whole = make_experience(args, **inputs)

    def share(first, last):
        rows = slice(CU[first], CU[last])
        cut = {name: inputs[name][rows] for name in ("logps", "ref_logps", "values")}
        cut |= {name: inputs[name][first:last] for name in ("scores", "finished")}
        return cut | {"cu_seqlens": CU[first : last + 1] - CU[first], "kl_coef": 0.1}

    shares, reduces = [share(0, 1), share(1, 4)], [Together(), Together()]
    for _ in range(8):  # a later sum depends on an earlier one: fixed point
        ran = []
        for other, inputs_of in ((1, shares[0]), (0, shares[1])):
            reduce = Together(reduces[other].seen)
            ran.append((make_experience(args, **inputs_of, reduce=reduce), reduce))
        reduces = [reduce for _, reduce in ran]
    (one, _), (two, _) = ran
    torch.testing.assert_close(torch.cat([one.advantages, two.advantages]), whole.advantages)
    merged = summarize(merge_metrics(one.metrics, two.metrics))
    for name, value in summarize(whole.metrics).items():
        assert float(merged[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), name


def test_a_process_that_only_takes_part_counts_for_nothing(kit):
    got = make_experience(kit.ppo_config(), **given(), counts=False).metrics
    assert all(float(metric.total) == float(metric.weight) == 0 for metric in got.values())
