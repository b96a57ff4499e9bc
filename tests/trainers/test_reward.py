"""RewardTrainer on a tiny model: every kind of judgement, what is trained, resumed and refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from fastalign.models import reward_normalization, score_sequences
from fastalign.trainers.reward import RewardTrainer

LORA = {"r": 4, "target_modules": ["q_proj", "up_proj"]}
LISTS = [{"prompt": "w3", "completions": [" w10", " w11", " w12"], "rank": [1, 2, 3]}]
KINDS = ["pairs", "margins", "lists", "scalar", "binary"]


# ---- the update


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_and_micro_batches_change_nothing(rewards, kit, kind):
    def run(**settings):
        trainer = rewards.trainer(rewards.model(), rewards.data(kind, 16), num_train_epochs=1, **settings)
        trainer.train()
        return kit.weights(trainer), kit.logs(trainer)

    whole = run(per_device_train_batch_size=8, micro_batch_tokens=0)
    for settings in (
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"per_device_train_batch_size": 8, "micro_batch_tokens": 40},
    ):
        weights, logs = run(**settings)
        kit.assert_same(weights, whole[0], rtol=1e-4, atol=1e-5)
        assert len(logs) == len(whole[1]) == 2
        for entry, expected in zip(logs, whole[1], strict=True):
            for name in expected.keys() - {"tokens_per_second", "epoch", "learning_rate"}:
                assert entry[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_resumed_training_is_the_uninterrupted_one(rewards, kit, kind, adapter):
    if adapter and kind not in ("pairs", "lists"):
        pytest.skip("the adapter does not see what the batch holds")

    def make():
        lora = LoraConfig(**LORA, lora_dropout=0.3) if adapter else None
        return rewards.trainer(
            rewards.model(), rewards.data(kind, 22), peft_config=lora, num_train_epochs=2, optim="adamw_torch",
            learning_rate=0.01, save_strategy="steps", save_steps=4, gradient_accumulation_steps=2, max_grad_norm=1.0,
        )  # fmt: skip

    whole = make()
    whole.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(rewards.folder / "out" / "checkpoint-4"))
    kit.assert_same(kit.weights(resumed), kit.weights(whole), rtol=0, atol=0)
    last, expected = kit.logs(resumed)[-1], kit.logs(whole)[-1]
    for name in expected.keys() - {"tokens_per_second"}:
        assert last[name] == expected[name], name


@pytest.mark.parametrize("kind", ["lists"])
def test_two_processes_give_what_one_gives(rewards, kit, kind, start, tmp_path):
    """Weights, logged metrics with extremes, normalisation, and an evaluation whose last batch is filled up."""
    settings = {
        "num_train_epochs": 2, "train_sampling_strategy": "sequential", "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2, "micro_batch_tokens": 64, "normalize_rewards": "mean_std",
    }  # fmt: skip
    folder = tmp_path / "two"
    folder.mkdir()
    workers = start(Path(__file__).with_name("worker.py"), folder, json.dumps(settings), kind)
    train, held_out = (rewards.data(kind, n, seed=seed) for n, seed in ((24, 0), (7, 1)))
    one = rewards.trainer(rewards.model().double(), train, held_out, **(settings | {"per_device_train_batch_size": 8}))
    one.train()
    metrics = one.evaluate()
    workers.wait()
    two = torch.load(folder / "result.pt")
    kit.assert_same(two["weights"], kit.weights(one), rtol=1e-5, atol=1e-6)
    for mine, expected in ((two["logs"], kit.logs(one)), ([two["eval"]], [metrics])):
        for a, b in zip(mine, expected, strict=True):
            for name in b.keys() - {"tokens_per_second", "epoch", "step", "learning_rate"}:
                if not name.endswith(("runtime", "per_second")):
                    assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name
    assert two["normalization"] == pytest.approx(tuple(reward_normalization(one.model)), rel=1e-4)


def test_padding_of_any_kind_changes_no_reward(rewards):
    """Rewards in a batch are those of each sequence by itself, also when sequences end with the pad token."""
    trainer = rewards.trainer(rewards.model(exact=True), rewards.pairs(8))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    with torch.no_grad():
        got = trainer.model.eval()(input_ids=batch["input_ids"], rows=batch["rows"])
    alone = [(ids[:length].tolist(), 1) for ids, length in zip(batch["input_ids"], batch["lengths"], strict=True)]
    np.testing.assert_allclose(got, [score_sequences(trainer.model, [s])[0] for s in alone], rtol=1e-6, atol=1e-7)


def test_it_learns_what_each_kind_of_judgement_says(rewards):
    """Good responses end with token 5: every kind of data teaches it, and the reward is about the label's."""
    rng = np.random.default_rng(0)

    def ids(last):
        return [*rng.integers(10, 61, rng.integers(1, 6)).tolist(), last]

    rows = {
        "pairs": [{"prompt_ids": ids(9), "chosen_ids": ids(5), "rejected_ids": ids(6)} for _ in range(64)],
        "lists": [
            {"prompt_ids": ids(9), "response_ids": [ids(7), ids(5), ids(6), ids(5)], "ranks": [3, 1, 2, 1]}
            for _ in range(32)
        ],
        "binary": [{"prompt_ids": ids(9), "completion_ids": ids(5 + i % 2), "label": i % 2 == 0} for i in range(64)],
        "scalar": [
            {"prompt_ids": ids(9), "completion_ids": ids(5 + i % 2), "label": (3.0, -1.0)[i % 2]} for i in range(64)
        ],
    }
    probe = [(ids(9) + ids(last), 1) for last in (5, 6) * 20]
    for kind, data in rows.items():
        trainer = rewards.trainer(
            rewards.model(initializer_range=0.1), Dataset.from_list(data), optim="adamw_torch", learning_rate=3e-3,
            num_train_epochs=6, per_device_train_batch_size=8,
        )  # fmt: skip
        trainer.train()
        scores = score_sequences(trainer.model, probe)
        good, bad = scores[0::2], scores[1::2]
        assert (good > bad).mean() > 0.95, kind
        if kind == "scalar":
            assert abs(good.mean() - 3) < 0.5
            assert abs(bad.mean() + 1) < 0.5
        assert trainer.state.log_history[-2]["loss"] < trainer.state.log_history[0]["loss"], kind


def test_centring_pulls_the_sum_of_a_pairs_rewards_to_zero(rewards):
    def mean_reward(**settings):
        trainer = rewards.trainer(
            rewards.model(), rewards.pairs(32), num_train_epochs=10, learning_rate=0.01, **settings
        )
        trainer.train()
        return abs(trainer.evaluate(rewards.pairs(32))["eval_mean_reward"])

    assert mean_reward(center_rewards_coefficient=1.0) < 0.5 * mean_reward()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_autocast_over_float32_weights(rewards, kit, checkpointing):
    def run(**settings):
        trainer = rewards.trainer(
            rewards.model(), rewards.pairs(16), num_train_epochs=2, learning_rate=0.002,
            gradient_checkpointing=checkpointing, normalize_rewards="mean", **settings,
        )  # fmt: skip
        trainer.train()
        return trainer

    exact, mixed = run(), run(bf16=True)
    assert {p.dtype for p in mixed.model.parameters()} == {torch.float32}
    for a, b in zip(kit.logs(mixed), kit.logs(exact), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=0.05)
        assert a["loss"] != b["loss"]
    # the mean is that of rewards as they are computed in training
    sequences = mixed._reference_sequences()
    assert abs(score_sequences(mixed.model, sequences, autocast=torch.bfloat16).mean()) < 1e-5


# ---- what trains


def test_frozen_backbone_keeps_its_bits(rewards, kit):
    model = rewards.model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    needed = []
    model.model.register_forward_hook(lambda module, args, out: needed.append(out.last_hidden_state.requires_grad))
    trainer = rewards.trainer(
        model, rewards.pairs(16), num_train_epochs=2, freeze_backbone=True, optim="adamw_torch", weight_decay=0.1
    )
    trainer.train()
    assert set(kit.weights(trainer)) == {"score.weight"}
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name != "score.weight"), name
    assert not any(needed)
    assert sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"]) == 32


@pytest.mark.parametrize("checkpointing", [{}, {"use_reentrant": False}, {"use_reentrant": True}])
def test_lora_trains_adapter_and_head(rewards, kit, checkpointing):
    given = LoraConfig(**LORA)
    model = rewards.model()
    trunk = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    trainer = rewards.trainer(
        model, rewards.pairs(8), peft_config=given, max_steps=3, gradient_checkpointing=bool(checkpointing),
        gradient_checkpointing_kwargs=checkpointing or None,
    )  # fmt: skip
    assert given.modules_to_save is None  # the caller's config is left alone
    before = kit.weights(trainer)
    trainer.train()
    after = kit.weights(trainer)
    assert any("score.modules_to_save" in name for name in after)
    assert all("lora_" in name or "score.modules_to_save" in name for name in after)
    assert all(not torch.equal(before[name], after[name]) for name in after if "lora_A" not in name)
    for name, parameter in trainer.model.get_base_model().model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, trunk[name.replace("base_layer.", "")]), name


def test_head_is_the_same_for_the_same_seed(rewards, kit):
    kit.model().save_pretrained(rewards.folder / "causal")
    heads = []
    for seed in (3, 3, 4):
        trainer = rewards.trainer(str(rewards.folder / "causal"), rewards.pairs(4), seed=seed)
        heads.append(trainer.model.score.weight.detach().clone())
        torch.rand(3)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


# ---- refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": []}, "no row is left to train on: list has no rows"),
        (
            {"train": [{"prompt": "w3", "completion": "w4"}]},
            "no judgement: chosen and rejected, or prompt and completions",
        ),
        ({"train": None}, "no data: give train_dataset"),
        ({"center_rewards_coefficient": 0.1, "train": LISTS}, "centres pairs; the train data are lists"),
        ({"peft_config": LoraConfig(task_type="CAUSAL_LM")}, "task_type of peft_config is CAUSAL_LM; a reward model's"),
        ({"peft_config": LoraConfig(), "freeze_backbone": True}, "choose one"),
        ({"reward_reference": LISTS}, "reward_reference has no effect"),
        ({"peft_config": LoraConfig(target_modules=["score"])}, "target_modules"),  # PEFT's word
    ],
)
def test_what_cannot_be_done_is_refused(rewards, settings, message):
    settings = {"train": rewards.pairs(4)} | settings
    with pytest.raises(ValueError, match=message):
        rewards.trainer(rewards.model(), settings.pop("train"), **settings)


def test_models_that_are_no_reward_models_are_refused(rewards, kit):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no score or classifier"):
        rewards.trainer(kit.model(), rewards.pairs(4))
    with pytest.raises(ValueError, match="3 outputs"):
        rewards.trainer(rewards.model(num_labels=3), rewards.pairs(4))
    with pytest.raises(ValueError, match="compute_metrics"):
        RewardTrainer(rewards.model(), rewards.config(), compute_metrics=print)
    with pytest.raises(ValueError, match="args must be a RewardConfig"):
        RewardTrainer(rewards.model(), kit.config())
