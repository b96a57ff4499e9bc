"""PPOTrainer with every loss type, samplers that are not the trainer, and groups without spread."""

import json

import numpy as np
import pytest
import torch
import transformers

from fastalign.losses import ppo_loss, summarize
from fastalign.losses.policy_options import POLICY_LOSSES
from fastalign.rollouts import Completion
from fastalign.trainers.ppo_update import policy_value_loss

TIMES = {"eps", "tokens_per_second", "epoch"}
# what is given beside a loss type to sample the groups that it needs
GROUPS = {name: {} if name == "ppo" else {"num_generations": 4} for name in POLICY_LOSSES}
EXACT = {
    "per_device_train_batch_size": 8, "micro_batch_tokens": 0, "optim": "sgd", "learning_rate": 0.3,
    "backend": "torch", "response_length": 5, "max_grad_norm": 1.0,
}  # fmt: skip


def run(kit, **settings):
    """Three phases of 16 completions in float64."""
    trainer = kit.ppo(kit.model().double(), **(EXACT | settings))
    trainer.train()
    return kit.weights(trainer), kit.logs(trainer)


def assert_same_logs(got, expected, but=()):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - TIMES - set(but):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_every_loss_type_learns(kit, loss_type):
    """From about −0.2, which is chance, towards 3.8: four times the good token."""
    settings = {"cliprange": 0.02, "cliprange_high": 0.03} if loss_type == "gspo" else {}  # its own are for long runs
    trainer = kit.ppo(
        kit.model(initializer_range=0.1, num_hidden_layers=1), train=kit.prompts(64), loss_type=loss_type, max_steps=8,
        per_device_train_batch_size=16, num_ppo_epochs=4, learning_rate=0.03, response_length=4,
        **GROUPS[loss_type], **settings,
    )  # fmt: skip
    trainer.train()
    logs = kit.logs(trainer)
    assert abs(logs[0]["objective/scores"]) < 0.3
    assert logs[-1]["objective/scores"] > logs[0]["objective/scores"] + 0.6
    assert ("objective/kl" in logs[0]) is (loss_type in ("ppo", "rloo", "grpo"))  # the others have no reference
    assert ("val/explained_variance" in logs[0]) is (loss_type == "ppo")


SPLITS = {
    "gspo": {"loss_type": "gspo", "num_generations": 4, "cliprange": 0.01},
    "gspo, token": {
        "loss_type": "gspo", "num_generations": 4, "importance_sampling_level": "sequence_token", "cliprange": 0.01
    },
    "cispo": {"loss_type": "cispo", "num_generations": 4, "cliprange_high": 0.05},
    "dapo": {
        "loss_type": "dapo", "num_generations": 4, "filter_groups": True, "overlong_buffer": 3, "entropy_coef": 0.1
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SPLITS)
def test_the_split_of_a_phase_changes_nothing(kit, name):
    """Eight times one completion is once eight: loss, weights and every metric."""
    settings = {"sampler": kit.fixed_answers(5), "cliprange_high": 0.02} | SPLITS[name]
    expected = run(kit, **settings)
    got = run(kit, per_device_train_batch_size=1, gradient_accumulation_steps=8, micro_batch_tokens=20, **settings)
    kit.assert_same(got[0], expected[0], rtol=1e-5, atol=1e-7)
    # completions of a prompt that do not fit into one piece compute it once in each
    assert_same_logs(got[1], expected[1], but=("sharing_ratio",))
    assert any(0 < log["policy/clipfrac_avg"] < 1 for log in expected[1])


# ---- samplers that differ from the trainer


class Drifted:
    """The kit's fixed answers with log-probs of its own."""

    def __init__(self, kit, response_length, tells=True):
        self._answers, self._tells = kit.fixed_answers(response_length), tells
        self.options = self._answers.options

    def sync(self, model):
        pass

    def generate(self, prompts, **options):
        return [
            Completion(c.ids, c.finished, self.logps(c) if self._tells or len(c.ids) > 1 else None)
            for c in self._answers.generate(prompts, **options)
        ]

    @staticmethod
    def logps(completion):
        rng = np.random.default_rng(completion.ids)
        return (-4.1 + 0.5 * rng.standard_normal(len(completion.ids))).astype(np.float32)


def test_a_sampler_that_differs_is_spoken_of(kit, caplog):
    kit.ppo(sampler=Drifted(kit, 6), max_steps=1).train()
    assert "the sampler's log-probs are 1.7 nats a token off the trainer's" in caplog.text
    caplog.clear()
    kit.ppo(sampler=Drifted(kit, 6), max_steps=1, sampler_correction="token_truncate").train()
    kit.ppo(max_steps=1).train()  # transformers' sampling is the trainer's
    assert "the sampler's log-probs" not in caplog.text


@pytest.mark.parametrize("correction", ["token_truncate", "sequence_mask"])
def test_the_samplers_log_probs_reach_the_loss(kit, correction):
    """In order, at their tokens: the first mini-batch's loss is that of plain PyTorch."""
    settings = {"sampler_correction": correction, "sampler_cap": 1.3, "loss_type": "dapo", "num_generations": 4}
    trainer = kit.ppo(
        kit.model(initializer_range=0.05).double(), sampler=Drifted(kit, 5), num_mini_batches=1, num_ppo_epochs=1,
        per_device_train_batch_size=8, max_steps=1, response_length=5, backend="torch", **settings,
    )  # fmt: skip
    seen = []
    update = trainer.update_on
    trainer.update_on = lambda model, batch, kept: (seen.append((batch, kept)), update(model, batch, kept))[1]
    trainer.train()
    ((batch, kept),) = seen
    assert kept is None
    mask = batch["targets"] != -100
    rows = [ids[own].tolist() for ids, own in zip(batch["targets"], mask, strict=True)]
    sampler = torch.from_numpy(np.concatenate([Drifted.logps(Completion(ids, True)) for ids in rows]))
    torch.testing.assert_close(batch["sampler_logps"], sampler)

    def spread(name):
        return torch.zeros(mask.shape).masked_scatter(mask, batch[name])

    expected = ppo_loss(
        spread("old_logps"), spread("old_logps"), spread("advantages"), mask, loss_type="dapo",
        sampler_logps=spread("sampler_logps"), sampler_correction=correction, sampler_cap=1.3,
    )  # fmt: skip
    (log,) = kit.logs(trainer)
    assert log["loss/policy_avg"] == pytest.approx(float(expected.loss), rel=1e-4, abs=1e-6)
    values = summarize(expected.metrics)
    assert abs(log["loss/policy_avg"]) > 0.01
    assert log["sampling/capped_fraction"] == pytest.approx(float(values["sampler_capped"]))
    assert 0 < log["sampling/capped_fraction"] < 1
    assert log["sampling/sampling_logp_difference/mean"] > 0.1


def test_a_sampler_that_is_the_trainer_needs_no_correction(kit):
    """transformers' own sampling: weights are 1 up to rounding, and training is the same."""
    plain, corrected = run(kit), run(kit, sampler_correction="token_truncate", sampler_cap=1.5)
    kit.assert_same(corrected[0], plain[0], rtol=1e-3, atol=1e-5)
    assert all(log["sampling/capped_fraction"] == 0 for log in corrected[1])


def test_a_sampler_without_log_probs_is_refused(kit):
    trainer = kit.ppo(sampler=kit.fixed_answers(6), sampler_correction="token_mask")
    with pytest.raises(ValueError, match=r"sampler_correction='token_mask' needs .* and FixedAnswers gave none"):
        trainer.train()
    with pytest.raises(ValueError, match="Drifted gave none"):  # for some of its completions
        kit.ppo(sampler=Drifted(kit, 6, tells=False), sampler_correction="token_mask", max_steps=8).train()


# ---- groups without spread


def tied(prompt_ids, completion_ids):
    """Ties where the prompt's first id is even."""
    return [0.0 if p[0] % 2 == 0 else float(len(c)) for p, c in zip(prompt_ids, completion_ids, strict=True)]


FILTERED = {"loss_type": "dapo", "num_generations": 4, "filter_groups": True, "backend": "torch", "reward": tied}


def test_groups_without_spread_are_left_out(kit):
    """Of no mini-batch, pass or mean: a phase of the kept ones alone gives the same loss and weights."""
    settings = FILTERED | EXACT | {"sampler": kit.fixed_answers(5), "num_mini_batches": 1, "max_steps": 1}
    odd, even = ({"prompt_ids": [a, b]} for a, b in ((5, 9), (4, 9)))
    from datasets import Dataset

    def model():
        return kit.model().double()

    got = kit.ppo(model(), train=Dataset.from_list([odd, even]), entropy_coef=0.1, **settings)
    alone = kit.ppo(
        model(), train=Dataset.from_list([odd]), entropy_coef=0.1,
        **(settings | {"per_device_train_batch_size": 4}),
    )  # fmt: skip
    for trainer in (got, alone):
        trainer.train()
    kit.assert_same(kit.weights(got), kit.weights(alone), rtol=1e-6, atol=1e-9)
    (log,), (expected,) = kit.logs(got), kit.logs(alone)
    assert (log["completions/filtered_ratio"], expected["completions/filtered_ratio"]) == (0.5, 0)
    assert log["loss/policy_avg"] == pytest.approx(expected["loss/policy_avg"], rel=1e-6)
    assert log["policy/entropy_avg"] == pytest.approx(expected["policy/entropy_avg"], rel=1e-6)
    assert log["objective/scores"] != expected["objective/scores"]  # what was sampled is all reported


def test_truncated_completions_are_not_trained_on(kit):
    """With a critic too; in the mini-batches, and in nothing else."""
    trainer = kit.ppo(sampler=kit.fixed_answers(6), mask_truncated_completions=True, num_mini_batches=1, max_steps=2)
    trainer.train()
    logs = kit.logs(trainer)
    assert all(log["completions/filtered_ratio"] == log["completions/clipped_ratio"] for log in logs)
    assert any(0 < log["completions/filtered_ratio"] < 1 and log["policy/approxkl_k3"] > 0 for log in logs)


def test_mini_batches_of_what_is_kept(kit):
    trainer = kit.ppo(num_ppo_epochs=3, num_mini_batches=4, per_device_train_batch_size=2)
    kept = np.array([True, False, True, True, False, True, True, False])
    members = trainer._members(8, kept)
    assert len(members) == 12  # as many as without the filter
    for passes in range(3):
        assert sorted(np.concatenate(members[4 * passes : 4 * passes + 4])) == [0, 2, 3, 5, 6]
    assert sorted({len(part) for part in members}) == [1, 2]
    few = np.arange(8) < 2
    assert sorted(map(len, trainer._members(8, few))) == [1] * 6  # none is empty
    assert trainer._members(8, np.zeros(8, dtype=bool)) == []


def test_a_phase_without_any_spread_changes_nothing(kit):
    trainer = kit.ppo(
        reward=lambda completions: [1.0] * len(completions), **{n: v for n, v in FILTERED.items() if n != "reward"}
    )
    start = kit.weights(trainer)
    trainer.train()
    kit.assert_same(kit.weights(trainer), start, rtol=0, atol=0)
    for log in kit.logs(trainer):
        assert log["loss"] == 0
        assert log["completions/filtered_ratio"] == 1
        assert not [name for name in log if name.startswith("policy/")]


def test_a_process_with_nothing_takes_part(kit):
    """A mini-batch of no completions has a loss of 0 with a gradient of 0, and weighs nothing in the metrics."""
    trainer = kit.ppo(**FILTERED, num_ppo_epochs=1, num_mini_batches=1, max_steps=1)
    outputs = []
    mini_batch = trainer._mini_batch
    trainer._mini_batch = lambda model, batch: (outputs.append(mini_batch(model, batch)), outputs[-1])[1]
    trainer._members = lambda count, kept: [np.zeros(0, dtype=np.int64)]
    start = kit.weights(trainer)
    trainer.train()
    (output,) = outputs
    assert float(output.loss) == 0
    assert all(float(metric.weight) == 0 for metric in output.metrics.values())
    kit.assert_same(kit.weights(trainer), start, rtol=0, atol=0)


def test_a_config_survives_json(kit):
    """What a run saved sets up the same run: resolved defaults are accepted as given ones."""
    from fastalign.trainers import PPOConfig

    for loss_type in POLICY_LOSSES:
        config = kit.ppo_config(loss_type=loss_type, **GROUPS[loss_type])
        fields = {name: json.loads(json.dumps(getattr(config, name))) for name in PPOConfig.__annotations__}
        assert {n: getattr(kit.ppo_config(**fields), n) for n in fields} == fields


def test_a_piece_of_gspo_alone(kit):
    """Loss of a batch with a sequence of one token, against the pure function."""
    from fastalign.data import CompletionCollator
    from fastalign.models.actor_critic import ActorCritic

    transformers.set_seed(0)
    examples = [
        {"input_ids": list(range(3, 3 + p + n)), "completion_mask": [False] * p + [True] * n}
        for p, n in ((5, 4), (3, 1), (2, 6))
    ]
    batch = CompletionCollator(0)(examples)
    n = len(batch["rows"])
    batch["old_logps"] = -4.1 + 0.3 * torch.randn(n, dtype=torch.float64)
    batch["advantages"] = torch.randn(n, dtype=torch.float64)
    args = kit.ppo_config(loss_type="gspo", num_generations=2, cliprange=0.2, cliprange_high=0.3, backend="torch")
    model = ActorCritic(kit.model(initializer_range=0.1).double())
    output = policy_value_loss(model, batch, args, tokens=n, sequences=3, penalty_coef=1.0, with_value=False)
    mask = batch["targets"] != -100
    logps = model.policy(input_ids=batch["input_ids"]).logits.log_softmax(-1)
    logps = logps.gather(-1, batch["targets"].clamp(min=0)[..., None])[..., 0]

    def spread(name):
        return torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, batch[name])

    ratio = [((logps - spread("old_logps"))[i][mask[i]]).mean().exp() for i in range(3)]
    expected = sum(
        -torch.minimum(r * a, r.clamp(0.8, 1.3) * a).mean()
        for r, a in zip(ratio, (spread("advantages")[i][mask[i]] for i in range(3)), strict=True)
    )
    torch.testing.assert_close(output.loss.double(), expected.detach() / 3, rtol=1e-6, atol=1e-7)
    assert float(output.metrics["val/ratio"].weight) == 3
