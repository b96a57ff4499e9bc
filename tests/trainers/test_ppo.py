"""PPOTrainer as a whole: how work is split changes nothing, metrics, evaluation, precision, memory."""

import math
import time

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastalign.trainers import PPOTrainer

TIMES = {"eps", "tokens_per_second", "epoch"}
WHOLE = {
    "per_device_train_batch_size": 8, "micro_batch_tokens": 0, "optim": "sgd", "learning_rate": 0.3,
    "backend": "torch", "response_length": 5, "max_grad_norm": 1.0,
}  # fmt: skip


def run(kit, train=None, evaluation=None, **settings):
    """Three phases of 16 completions in float64."""
    trainer = kit.ppo(kit.model().double(), train=train, evaluation=evaluation, **(WHOLE | settings))
    trainer.train()
    return kit.weights(trainer), kit.logs(trainer)


@pytest.fixture
def whole(kit):
    return run(kit)


@pytest.mark.parametrize(
    "split",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "micro_batch_tokens": 32},
        {"micro_batch_tokens": 1},
        {"micro_batch_tokens": 40, "pad_to_multiple_of": 8},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"schedule": "deferred"},
        {"workspace_mb": 0.01},
        {"token_metrics": False},
        {"dataloader_num_workers": 2},
    ],
    ids=lambda split: "-".join(f"{name}={value}" for name, value in split.items()),
)
def test_the_split_of_a_phase_changes_nothing(kit, whole, split):
    weights, logs = run(kit, **split)
    kit.assert_same(weights, whole[0], rtol=1e-6, atol=1e-8)  # values are float32 on their way to the advantages
    assert len(logs) == len(whole[1]) == 3
    for got, expected in zip(logs, whole[1], strict=True):
        assert expected.keys() - got.keys() <= {"policy/entropy_avg"}
        for name in (expected.keys() & got.keys()) - TIMES - {"padding_waste", "sharing_ratio"}:
            assert got[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_aggregation": "sequence_mean", "policy_loss": "penalty"},
        {"advantage_estimator": "group", "num_generations": 4, "loss_aggregation": "constant"},
        {"value_head": True, "entropy_coef": 0.1},
    ],
    ids=["penalty", "group", "value head"],
)
def test_accumulation_of_other_variants(kit, settings):
    expected = run(kit, **settings)
    got = run(kit, per_device_train_batch_size=1, gradient_accumulation_steps=8, micro_batch_tokens=20, **settings)
    kit.assert_same(got[0], expected[0], rtol=1e-5, atol=1e-7)
    for a, b in zip(got[1], expected[1], strict=True):
        for name in a.keys() - TIMES - {"sharing_ratio"}:  # a prompt's completions may not fit into one piece
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name


def test_names_that_dashboards_know(kit):
    """TRL's, of notes on its PPOTrainer, and what was asked for beside them."""
    (first, *_) = run(kit)[1]
    names = """objective/kl objective/entropy objective/non_score_reward objective/rlhf_reward objective/scores
        policy/approxkl_avg policy/clipfrac_avg policy/entropy_avg loss/policy_avg loss/value_avg val/clipfrac_avg
        val/ratio val/ratio_var val/num_eos_tokens val/explained_variance episode eps lr learning_rate grad_norm loss
        num_tokens objective/kl_coef completions/mean_length completions/clipped_ratio"""
    assert set(names.split()) <= first.keys()
    assert first["episode"] == 16
    assert first["lr"] == first["learning_rate"] == 0.3
    assert first["eps"] > 0


def test_metrics_are_those_of_the_completions(kit):
    """Recomputed from the completions themselves, by hand."""
    seen = {}
    trainer = kit.ppo(
        kit.model(initializer_range=0.02), num_generations=2, missing_eos_penalty=2.0, response_length=12, max_steps=1
    )
    collect = trainer.collector.collect

    def spy(*args, **kwargs):
        seen["batch"], seen["experience"] = collect(*args, **kwargs)
        return seen["batch"], seen["experience"]

    original = trainer.collector.sampler.generate

    def generate(prompts, **kwargs):
        seen["prompts"], seen["completions"] = prompts, original(prompts, **kwargs)
        return seen["completions"]

    trainer.collector.collect, trainer.collector.sampler.generate = spy, generate
    trainer.train()
    (log,) = kit.logs(trainer)
    completions = seen["completions"]
    assert len(completions) == 2 * len(seen["prompts"]) == 8
    scores = np.array([ids.count(5) - 0.05 * len(ids) for ids in (c.ids for c in completions)])
    unfinished = np.array([not c.finished for c in completions])
    assert 0 < unfinished.sum() < 8
    assert log["objective/scores"] == pytest.approx(scores.mean(), rel=1e-5)
    assert log["objective/scores_std"] == pytest.approx(scores.std(), rel=1e-5)
    assert log["objective/rlhf_reward"] == pytest.approx((scores - 2.0 * unfinished).mean(), rel=1e-5)
    assert log["completions/clipped_ratio"] == pytest.approx(unfinished.mean())
    assert log["val/num_eos_tokens"] == (~unfinished).sum()
    assert log["completions/mean_length"] == pytest.approx(np.mean([len(c.ids) for c in completions]))
    own = sum(float(c.logps.sum()) for c in completions)
    assert log["objective/entropy"] == pytest.approx(-own / 8, rel=1e-4)
    assert log["objective/kl"] == log["objective/kl_k3"] == 0  # the policy is still the reference
    batch = seen["batch"]
    values, returns = batch["old_values"].double(), batch["returns"].double()
    explained = 1 - (returns - values).var() / returns.var()
    assert log["val/explained_variance"] == pytest.approx(float(explained), abs=1e-4)
    starts = batch["cu_seqlens"]
    for i, completion in enumerate(completions):  # λ-returns with γ = 1: the last one is the score at the last token
        expected = scores[i] - 2.0 * unfinished[i]
        assert float(returns[starts[i + 1] - 1]) == pytest.approx(expected, rel=1e-4)
        assert starts[i + 1] - starts[i] == len(completion.ids)


def test_metrics_cover_every_phase_since_the_last_log(kit, whole):
    _, logs = run(kit, logging_steps=3)
    for name in ("objective/scores", "objective/kl", "val/ratio_var"):
        assert logs[0][name] == pytest.approx(np.mean([entry[name] for entry in whole[1]]), rel=1e-4)
    assert logs[0]["episode"] == 48
    assert logs[0]["num_tokens"] == whole[1][-1]["num_tokens"]


@pytest.mark.parametrize("method", ["ppo", "dpo"])
def test_throughput_leaves_out_evaluations_and_nothing_else(kit, method):
    """An evaluation in the middle of a log interval: its time does not count, the steps before it do."""
    settings = {"logging_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    if method == "ppo":
        trainer = kit.ppo(evaluation=kit.prompts(3, seed=3), **settings)
    else:
        trainer = kit.trainer(kit.model(), kit.pairs(16), kit.pairs(4, seed=1), **settings)
    step, own, seconds = trainer.training_step, trainer._own_examples, []

    def slow_step(*args, **kwargs):
        start = time.perf_counter()
        time.sleep(0.1)
        loss = step(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return loss

    def slow_evaluation(examples):
        time.sleep(0.5)
        return own(examples)

    trainer.training_step, trainer._own_examples = slow_step, slow_evaluation
    trainer.train()
    (log,) = kit.logs(trainer)
    # the clock starts inside the first step, behind its sleep
    assert log["tokens_per_second"] == pytest.approx(log["num_tokens"] / (sum(seconds) - 0.1), rel=0.2)


def test_total_episodes_say_when_to_stop(kit):
    trainer = kit.ppo(total_episodes=40, train=kit.prompts(12))  # 8, 4, 8, 4, 8, 4, ...
    trainer.train()
    assert trainer.state.global_step == 7
    assert kit.logs(trainer)[-1]["episode"] == 44  # 40 lie inside the seventh phase
    assert kit.ppo(total_episodes=40, train=kit.prompts(12), dataloader_drop_last=True).args.max_steps == 5


def test_evaluation_does_not_disturb_training(kit, whole):
    weights, logs = run(kit, evaluation=kit.prompts(5, seed=3), eval_strategy="steps", eval_steps=1, eval_on_start=True)
    kit.assert_same(weights, whole[0], rtol=0, atol=0)
    for a, b in zip(logs, whole[1], strict=True):
        assert {name: a[name] for name in a.keys() - TIMES} == {name: b[name] for name in b.keys() - TIMES}


def test_evaluation_is_repeatable_and_by_name(kit):
    trainer = kit.ppo(evaluation={"a": kit.prompts(5, seed=3), "b": kit.prompts(3, seed=4)}, normalize_scores=True)
    first = trainer.evaluate()
    assert first["eval_a_objective/kl"] == 0
    assert first["eval_a_objective/scores"] == trainer.evaluate("a", metric_key_prefix="x")["x_objective/scores"]
    trainer.train()
    moments = trainer.run.moments.state_dict()
    later = trainer.evaluate()
    assert later["eval_a_objective/kl"] != 0
    assert trainer.run.moments.state_dict() == moments  # they normalise, and learn nothing
    own = trainer.evaluate(kit.prompts(5, seed=3))
    assert own["eval_objective/scores"] == later["eval_a_objective/scores"]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_evaluation_does_not_depend_on_its_batches(kit, size):
    """Where completions do not: every completion counts once, deviation and standard error included."""
    trainer = kit.ppo(
        sampler=kit.fixed_answers(6), evaluation=kit.prompts(7, seed=3), per_device_eval_batch_size=size,
        num_generations=2, reward=[wished, wished], reward_weights=[1.0, 1.0],
    )  # fmt: skip
    got = trainer.evaluate()
    answers = kit.fixed_answers(6).generate(trainer.eval_dataset.dataset["prompt_ids"], num_samples=2, seed=0)
    scores = 2 * np.array([wished([answer.ids])[0] for answer in answers])
    assert got["eval_objective/scores"] == pytest.approx(scores.mean(), rel=1e-5)
    assert got["eval_objective/scores_std"] == pytest.approx(scores.std(), rel=1e-5)
    assert got["eval_objective/scores_se"] == pytest.approx(scores.std(ddof=1) / math.sqrt(14), rel=1e-5)
    assert got["eval_rewards/wished_2/std"] == pytest.approx(scores.std() / 2, rel=1e-5)
    assert got["eval_completions/mean_length"] == pytest.approx(np.mean([len(answer.ids) for answer in answers]))


def wished(completion_ids):
    return [ids.count(5) - 0.05 * len(ids) for ids in completion_ids]


def test_the_sampler_gets_the_weights_before_it_samples(kit):
    """In every phase and every evaluation: an engine of its own has others until then."""
    trainer = kit.ppo(evaluation=kit.prompts(4, seed=3), max_steps=2)
    calls, sampler = [], trainer.collector.sampler
    original = sampler.generate
    sampler.sync = lambda model: calls.append(("sync", model is trainer.actor_critic.policy))
    sampler.generate = lambda *args, **kwargs: (calls.append("generate"), original(*args, **kwargs))[1]
    trainer.train()
    trainer.evaluate()
    assert calls == [("sync", True), "generate"] * 3


def test_bfloat16_autocast_over_float32_weights(kit, caplog):
    trainer = kit.ppo(kit.model(initializer_range=0.02), bf16=True, response_length=8)
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    for log in kit.logs(trainer):
        assert log["val/first_approxkl"] < 1e-4
        assert math.isfinite(log["loss"])
    assert "off 1" not in caplog.text
    exact = kit.ppo(kit.model(initializer_range=0.02), response_length=8)
    exact.train()
    assert kit.logs(trainer)[0]["objective/scores"] != 0
    assert kit.logs(trainer)[0]["loss/value_avg"] == pytest.approx(kit.logs(exact)[0]["loss/value_avg"], rel=0.5)


def test_modes_are_as_before_and_dropout_is_off(kit):
    trainer = kit.ppo(kit.model(attention_dropout=0.5))
    modes = []
    original = trainer.collector.sampler.generate

    def generate(*args, **kwargs):
        modes.append({module.training for module in trainer.actor_critic.modules()})
        return original(*args, **kwargs)

    trainer.collector.sampler.generate = generate
    trainer.train()
    assert modes[1:] == [{True}] * 2  # the sampler itself switches to evaluation and back
    assert all(log["val/first_approxkl"] < 1e-9 for log in kit.logs(trainer))


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gives."""

    def __init__(self):
        super().__init__()
        self.numel, self.where = 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.numel() > self.numel:
                self.numel, self.where = tensor.numel(), f"{func} {tuple(tensor.shape)}"
        return out


@pytest.mark.parametrize(
    "settings",
    [{"policy_loss": "clip"}, {"policy_loss": "penalty"}, {"loss_type": "gspo", "num_generations": 4}],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_no_logits_of_a_rollout_ever_exist(kit, settings):
    vocabulary, length, completions = 4096, 24, 16
    model = kit.model(vocab_size=vocabulary, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    trainer = kit.ppo(
        model, per_device_train_batch_size=8, response_length=length, max_steps=1, workspace_mb=0.5,
        micro_batch_tokens=0, backend="torch", num_ppo_epochs=1, **settings,
    )  # fmt: skip
    with Largest() as largest:
        trainer.train()
    assert kit.logs(trainer)[0]["completions/mean_length"] > length / 2
    # scores of one step of sampling, and the workspace of the head; the tokens' logits would be ten times that
    allowed = max(completions * vocabulary, 2**19 // 4, vocabulary * 8)
    assert largest.numel <= 1.5 * allowed, largest.where
    assert 8 * length * vocabulary > 5 * allowed


def test_what_has_no_meaning_is_refused(kit):
    trainer = kit.ppo()
    with pytest.raises(ValueError, match="no predictions"):
        trainer.predict(kit.prompts(2))
    for method in (trainer.compute_loss, trainer.prediction_step):
        with pytest.raises(ValueError, match="a batch of prompts has no loss"):
            method(trainer.model, {})
    with pytest.raises(ValueError, match="args must be a PPOConfig, got NoneType"):
        PPOTrainer()
