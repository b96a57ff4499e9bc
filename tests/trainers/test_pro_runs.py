"""Equality of PRO's runs: how a batch is split, over processes too, changes nothing, nor does an interruption."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

EXACT = {"rtol": 1e-9, "atol": 1e-11}  # float64: what is left is the order of sums
LORA = {"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
VARIANTS = {
    "tempered": {"reward_temperatures": True, "beta": 0.7},
    "relative": {"reference_free": False, "beta": 0.5},
}


def run(kit, **settings):
    """Two epochs over 22 lists in 8-list steps, without shuffling, in float64."""
    defaults = {
        "num_train_epochs": 2, "train_sampling_strategy": "sequential", "backend": "torch", "reward_temperatures": True,
    }  # fmt: skip
    trainer = kit.pro(kit.exact_model(), kit.lists(22, scores=True), **(defaults | settings))
    trainer.train()
    return kit.weights(trainer), kit.logs(trainer)


@pytest.mark.parametrize("variant", ["tempered", "relative"])
def test_the_split_of_a_batch_changes_nothing(kit, variant):
    whole = run(kit, per_device_train_batch_size=8, micro_batch_tokens=0, **VARIANTS[variant])
    for split in (
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "micro_batch_tokens": 100},
        {"per_device_train_batch_size": 8, "micro_batch_tokens": 1},
        {"per_device_train_batch_size": 8, "pad_to_multiple_of": 64, "workspace_mb": 0.05},
        {"per_device_train_batch_size": 8, "schedule": "deferred", "gradient_checkpointing": True},
    ):
        weights, logs = run(kit, **VARIANTS[variant], **split)
        kit.assert_same(weights, whole[0], **EXACT)
        assert len(logs) == len(whole[1]) == 6
        for got, expected in zip(logs, whole[1], strict=True):
            counts = {"padding_waste", "sharing_ratio"} if "pad_to_multiple_of" in split else set()
            for name in expected.keys() - {"tokens_per_second", "epoch", "learning_rate", "grad_norm"} - counts:
                assert got[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-9), (split, name)


def test_two_processes_give_what_one_gives(kit, start, tmp_path):
    settings = {
        "num_train_epochs": 2, "train_sampling_strategy": "sequential", "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2, "micro_batch_tokens": 64, "backend": "torch", "reference_free": False,
        "reward_temperatures": True, "sft_coef": 0.1,
    }  # fmt: skip
    folder = tmp_path / "two"
    folder.mkdir()
    workers = start(Path(__file__).with_name("worker.py"), folder, json.dumps(settings), "pro")
    data = kit.lists(24, scores=True), kit.lists(7, seed=1, scores=True)
    one = kit.pro(kit.model().double(), *data, **(settings | {"per_device_train_batch_size": 8}))
    one.train()
    metrics = one.evaluate()
    workers.wait()
    two = torch.load(folder / "result.pt")
    kit.assert_same(two["weights"], kit.weights(one), **EXACT)
    for mine, expected in ((two["logs"], kit.logs(one)), ([two["eval"]], [metrics])):
        for a, b in zip(mine, expected, strict=True):
            for name in b.keys() - {"tokens_per_second", "epoch", "step", "learning_rate", "grad_norm"}:
                if not name.endswith(("runtime", "per_second")):
                    assert a[name] == pytest.approx(b[name], rel=1e-6, abs=1e-9), name
    assert metrics["eval_accuracy_se"] > 0


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_resumed_training_is_the_uninterrupted_one(kit, adapter):
    def make():
        lora = LoraConfig(**LORA, lora_dropout=0.3) if adapter else None  # dropout: the random state must come back too
        return kit.pro(
            kit.model(), kit.lists(22), peft_config=lora, num_train_epochs=2, optim="adamw_torch", learning_rate=0.01,
            save_strategy="steps", save_steps=4, gradient_accumulation_steps=2, max_grad_norm=1.0,
            reference_free=not adapter,
        )  # fmt: skip

    whole = make()
    whole.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(kit.folder / "out" / "checkpoint-4"))
    kit.assert_same(kit.weights(resumed), kit.weights(whole), rtol=0, atol=0)
    last, expected = kit.logs(resumed)[-1], kit.logs(whole)[-1]
    for name in expected.keys() - {"tokens_per_second"}:
        assert last[name] == expected[name], name


def test_a_checkpoint_of_another_reference_is_refused(kit):
    settings = {"save_strategy": "steps", "save_steps": 1}
    kit.pro(reference_free=False, max_steps=1, **settings).train()
    checkpoint = str(kit.folder / "out" / "checkpoint-1")
    with pytest.raises(ValueError, match=r"trained against reference .* this trainer has no reference"):
        kit.pro(max_steps=2).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="trained against reference"):
        kit.pro(kit.model(seed=5), max_steps=2, reference_free=False).train(resume_from_checkpoint=checkpoint)
