"""FSDP2 in several processes with gloo: what one process gives, and parameters that are sharded indeed."""

import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

STEPS = 20
LORA = {"peft_config": {"r": 4, "target_modules": ["q_proj", "up_proj"]}}
RUNS = {
    "sft": {
        "trainer": "sft", "double": True, "max_steps": 4, "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
    },
    "dpo": {"trainer": "dpo", "max_steps": STEPS},
    "dpo, tied": {
        "trainer": "dpo", "double": True, "model": {"tie_word_embeddings": True}, "loss_type": ["sigmoid", "sft"],
    },
    "dpo, adapter on the head": {"trainer": "dpo", "peft_config": {"r": 4, "target_modules": ["q_proj", "lm_head"]}},
    "kto, live, adapter": {"trainer": "dpo", "loss_type": "kto", "precompute_ref_log_probs": False, **LORA},
    "tr-dpo": {"trainer": "dpo", "double": True, "sync_ref_model": True, "ref_model_sync_steps": 2},
    "pro": {"trainer": "pro", "double": True},
    "reward": {"trainer": "reward", "max_steps": STEPS, "normalize_rewards": "mean_std"},
    "reward, adapter": {"trainer": "reward", **LORA},
    "ppo": {"trainer": "ppo", "max_steps": STEPS},
    "ppo, value head, adapter": {"trainer": "ppo", "value_head": True, **LORA},
    "ppo, groups": {
        "trainer": "ppo", "double": True, "loss_type": "dapo", "num_generations": 2, "filter_groups": True,
    },
}  # fmt: skip
TIMES = {"tokens_per_second", "epoch", "eps"}


def rank() -> int:
    return int(os.environ["RANK"])


def build(kit, conftest, trainer, model=None, peft_config=None, double=False, **settings):
    adapter = None if peft_config is None else LoraConfig(**peft_config)
    policy = kit.model(**(model or {}))
    policy = policy.double() if double else policy
    if trainer == "sft":
        return kit.sft(policy, kit.sequences(48), kit.sequences(7, 1), peft_config=adapter, **settings)
    if trainer == "dpo":
        data = kit.labelled if settings.get("loss_type") == "kto" else kit.pairs
        return kit.trainer(policy, data(48), data(7, 1), peft_config=adapter, **settings)
    if trainer == "pro":
        return kit.pro(policy, kit.lists(24), kit.lists(7, 1), peft_config=adapter, **settings)
    if trainer == "reward":
        rewards = conftest.RewardKit(kit)
        return rewards.trainer(rewards.model(), kit.pairs(48), kit.pairs(7, 1), peft_config=adapter, **settings)
    assert trainer == "ppo"
    sampled = {"num_mini_batches": 1, "response_length": 6, "optim": "sgd", "learning_rate": 0.05}
    policy = kit.model(initializer_range=0.1)
    return kit.ppo(
        policy.double() if double else policy, train=kit.prompts(16), evaluation=kit.prompts(5, seed=3),
        sampler=kit.fixed_answers(6), peft_config=adapter, **(sampled | settings),
    )  # fmt: skip


def train(kit, conftest, **settings):
    """What a run came to, in this process: its steps, an evaluation whose last batch is filled up, a saved model."""
    defaults = {
        "train_sampling_strategy": "sequential", "micro_batch_tokens": 64, "max_steps": 3,
        "per_device_eval_batch_size": 2, "max_grad_norm": 1.0,
    }  # fmt: skip
    trainer = build(kit, conftest, **(defaults | settings))
    trainer.train()
    evaluated = trainer.evaluate()
    trainer.save_model()
    out = Path(trainer.args.output_dir)
    kinds = {type(p).__name__ for p in trainer.model.parameters()}
    weights = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in trainer.model.named_parameters()}
    return {
        "weights": {name: p.detach().clone() for name, p in weights.items()}, "logs": kit.logs(trainer),
        "eval": evaluated, "state": trainer.run_state(), "kinds": kinds,
        "saved": {str(path.relative_to(out)): load_file(path) for path in out.rglob("*.safetensors")},
    }  # fmt: skip


@pytest.fixture(scope="module")
def two(launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    launch(Path(__file__).with_name("fsdp_worker.py"), folder, *RUNS)
    return [torch.load(folder / f"rank_{r}.pt", weights_only=False) for r in range(2)]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_give_what_one_gives(kit, conftest, two, name):
    settings = RUNS[name]
    one = train(kit, conftest, **(settings | {"per_device_train_batch_size": 8}))
    got, other = two[0][name], two[1][name]
    assert got["kinds"] == {"DTensor"}
    exact = settings.get("double", False)
    close = {"rtol": 1e-5 if exact else 1e-4, "atol": 1e-7 if exact else 1e-5}
    kit.assert_same(got["weights"], one["weights"], **close)
    kit.assert_same(got["weights"], other["weights"], rtol=0, atol=0)
    assert len(got["logs"]) == len(one["logs"]) == settings.get("max_steps", 3)
    for a, b in zip(got["logs"], one["logs"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a.keys() == b.keys()
        for key in a.keys() - TIMES:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), key
    for key, value in one["eval"].items():
        if not any(part in key for part in ("runtime", "per_second", "epoch")):
            assert got["eval"][key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    assert got["saved"].keys() == one["saved"].keys()
    for file in one["saved"]:
        kit.assert_same(got["saved"][file], one["saved"][file], **close)
