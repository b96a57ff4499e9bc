"""micro_batch_tokens="auto": trainers choose what plans say, and training with it is training with the number."""

from __future__ import annotations

import json

import numpy as np
import pytest
from datasets import Dataset
from peft import LoraConfig

from fastalign.trainers import SFTConfig, SFTTrainer, auto_size
from fastalign.trainers.run_plan import run_plan, trainer_plan

AUTO = {"micro_batch_tokens": "auto"}


@pytest.fixture
def make(kit, rewards):
    """Trainers by name, whose batches are several passes of 256 tokens."""
    rng = np.random.default_rng(0)
    ids = [[rng.integers(3, 60, n).tolist() for n in (20, 40, 30)] for _ in range(12)]
    pairs = Dataset.from_list([dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), x, strict=True)) for x in ids])
    sequences = Dataset.from_list(
        [{"input_ids": x[0] + x[1] + x[2], "completion_mask": [False] + [True] * 89} for x in ids]
    )
    batch = {"per_device_train_batch_size": 6, "num_train_epochs": 1}

    def dpo(**given):
        lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.2)
        return kit.trainer(kit.model(), pairs, peft_config=lora, **(batch | given))

    def ppo(**given):
        own = {"per_device_train_batch_size": 8, "num_mini_batches": 1, "response_length": 40, "max_steps": 2}
        return kit.ppo(train=kit.prompts(16), num_generations=2, **(own | given))

    return {
        "dpo": dpo,
        "ppo": ppo,
        "sft": lambda **given: kit.sft(kit.model(), sequences, **(batch | given)),
        "reward": lambda **given: rewards.trainer(rewards.model(), pairs, **(batch | given)),
        "pro": lambda **given: kit.pro(kit.model(), pairs, **(batch | given)),
    }


def budget_between(trainer, tokens: int) -> float:
    """GiB that a pass of so many tokens does not take up, and one of twice as many exceeds."""
    plan = trainer_plan(trainer)
    low, high = plan.plan(tokens).peak_bytes, plan.plan(2 * tokens).peak_bytes
    assert low < high
    return (low + high) / 2 / 2**30


@pytest.mark.parametrize("name", ["dpo", pytest.param("ppo", marks=pytest.mark.long)])
def test_training_is_that_with_the_number(name, make, kit):
    memory = budget_between(make[name](), 256)
    runs = []
    for settings in ({"micro_batch_tokens": 256}, AUTO | {"memory_gb": memory}):
        trainer = make[name](**settings)
        assert trainer.micro_batch_tokens == 256
        trainer.train()  # right away: dropout and shuffling draw from the generator as the constructor left it
        runs.append((kit.weights(trainer), kit.logs(trainer)))
    kit.assert_same(runs[0][0], runs[1][0], rtol=0, atol=0)
    timed = ("tokens_per_second", "eps")
    logs = [[{k: v for k, v in entry.items() if k not in timed} for entry in entries] for _, entries in runs]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("name", ["dpo", "sft", "reward", "pro", "ppo"])
def test_every_trainer_plans_for_the_models_that_it_holds(name, make):
    trainer = make[name](token_layout="packed")
    made = trainer_plan(trainer)
    plan = made.plan(64)
    both = trainer.model.parameters()
    sizes = [(p.numel(), p.requires_grad) for p in both]
    assert plan.parameters == sum(size for size, _ in sizes)
    assert plan.trainable == sum(size for size, trains in sizes if trains)
    assert plan.layout == "packed"
    assert plan.passes > 1
    assert ("adapter" in plan.parts) == (name == "dpo")
    assert ("reference" in plan.parts) == ("critic" in plan.parts) == (name == "ppo")


def test_a_config_of_the_same_model_has_the_same_plan(make, kit):
    trainer = make["sft"]()
    trainer.save_model(str(kit.folder / "saved"))
    args = trainer.args
    args.model_name_or_path = str(kit.folder / "saved")
    by_name = run_plan(args, data=(trainer.train_dataset, trainer._examples)).plan(256)
    assert by_name == trainer_plan(trainer).plan(256)


def test_a_part_of_the_model_that_does_not_train(kit, make):
    model = kit.model()
    model.model.layers[0].requires_grad_(False)
    trainer = kit.sft(model, kit.sequences(4))
    expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainer_plan(trainer).plan(256).trainable == expected


def test_a_resumed_run_keeps_its_choice(make, kit, monkeypatch):
    """Of the same budget, whatever a newer plan would choose; with another budget it chooses again."""
    chosen = []

    def choose(trainer):
        return chosen[-1]

    monkeypatch.setattr(auto_size, "choose_size", choose)
    chosen.append((256, 10**9))
    first = make["sft"](**AUTO, memory_gb=1, save_strategy="steps", save_steps=1)
    first.train()
    checkpoint = kit.folder / "out" / "checkpoint-1"
    assert json.loads((checkpoint / "fastalign_state.json").read_text())["chosen_size"] == [256, 10**9]
    for now, expected in (((512, 10**9), 256), ((512, 2 * 10**9), 512)):
        chosen.append(now)
        resumed = make["sft"](**AUTO, memory_gb=1)
        assert resumed.micro_batch_tokens == 512
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert resumed.micro_batch_tokens == expected
        kit.assert_same(kit.weights(resumed), kit.weights(first), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (AUTO, "micro_batch_tokens='auto' needs memory_gb on the CPU"),
        (AUTO | {"memory_gb": 0}, "memory_gb=0: it must be positive"),
        ({"memory_gb": 2}, "memory_gb=2 has no effect without micro_batch_tokens='auto'"),
        ({"micro_batch_tokens": "many"}, "micro_batch_tokens='many': accepted are a whole number"),
        ({"micro_batch_tokens": -1}, "micro_batch_tokens=-1: accepted"),
        ({"micro_batch_tokens": 2.5}, r"micro_batch_tokens=2\.5: accepted"),
        ({"micro_batch_tokens": True}, "micro_batch_tokens=True: accepted"),
        (AUTO | {"memory_gb": 2, "loss_type": "aot"}, "micro_batch_tokens='auto': loss_type='aot' sorts"),
    ],
)
def test_settings_that_cannot_be_honoured(given, message, kit):
    with pytest.raises(ValueError, match=message):
        kit.config(**given)


@pytest.mark.parametrize(("given", "expected"), [("512", 512), ("none", None), ("0", 0)])
def test_numbers_as_text(given, expected, kit):
    assert kit.config(micro_batch_tokens=given).micro_batch_tokens == expected


def test_what_cannot_be_sized_is_refused_by_name(make, kit):
    with pytest.raises(ValueError, match=r"micro_batch_tokens='auto': a pass of .* takes .* and the budget is"):
        make["sft"](**AUTO, memory_gb=1e-4)


def test_without_data_to_train_on_the_default_holds(kit):
    args = SFTConfig(str(kit.folder / "out"), use_cpu=True, report_to="none", memory_gb=1, **AUTO)
    trainer = SFTTrainer(kit.model(), args, eval_dataset=kit.sequences(4), processing_class=kit.tokenizer)
    assert trainer.micro_batch_tokens == 1024
    with pytest.raises(ValueError, match="there is no train_dataset to plan for"):
        trainer_plan(trainer)
