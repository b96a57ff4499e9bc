"""FSDP2 and ZeRO-3 in processes with gloo: what one process gives, and parameters that are sharded indeed."""

import importlib
import json
import math
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

STEPS = 20
ZERO_CONFIG = Path(__file__).parents[2] / "examples/accelerate/zero3.json"
LORA = {"peft_config": {"r": 4, "target_modules": ["q_proj", "up_proj"]}}
RUNS = {
    "sft": {
        "trainer": "sft", "double": True, "max_steps": 4, "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
    },
    "dpo": {"trainer": "dpo", "max_steps": STEPS},
    "dpo, adapter on the head": {"trainer": "dpo", "peft_config": {"r": 4, "target_modules": ["q_proj", "lm_head"]}},
    "kto, live, adapter": {"trainer": "dpo", "loss_type": "kto", "precompute_ref_log_probs": False, **LORA},
    "pro": {"trainer": "pro", "double": True},
    "reward": {"trainer": "reward", "max_steps": STEPS, "normalize_rewards": "mean_std"},
    "ppo": {"trainer": "ppo", "max_steps": STEPS},
    "ppo, value head, adapter": {"trainer": "ppo", "value_head": True, **LORA},
}  # fmt: skip
MORE = {
    "dpo, tied": {
        "trainer": "dpo", "double": True, "model": {"tie_word_embeddings": True}, "loss_type": ["sigmoid", "sft"],
    },
    "tr-dpo": {"trainer": "dpo", "double": True, "sync_ref_model": True, "ref_model_sync_steps": 2},
    "reward, adapter": {"trainer": "reward", **LORA},
    "ppo, groups": {
        "trainer": "ppo", "double": True, "loss_type": "dapo", "num_generations": 2, "filter_groups": True,
    },
}  # fmt: skip
FOUR = {"dpo, four": {"trainer": "dpo", "max_steps": STEPS, "per_device_train_batch_size": 2}}
ZERO = {
    f"zero, {name}": {key: value for key, value in (RUNS | MORE)[name].items() if key != "double"}
    for name in ("sft", "dpo", "dpo, tied", "pro", "reward, adapter")
} | {"zero, live, adapter": {"trainer": "dpo", "precompute_ref_log_probs": False, **LORA}}
TIMES = {"tokens_per_second", "epoch", "eps"}

pytestmark = pytest.mark.long  # processes that import everything: a minute of two cores


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


def whole_weights_of(trainer):
    if trainer.is_deepspeed_enabled:
        with importlib.import_module("deepspeed").zero.GatheredParameters(list(trainer.model.parameters())):
            return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    weights = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in trainer.model.named_parameters()}
    return {name: p.detach().clone() for name, p in weights.items()}


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
    kinds = {"partitioned" if hasattr(p, "ds_id") else type(p).__name__ for p in trainer.model.parameters()}
    return {
        "weights": whole_weights_of(trainer), "logs": kit.logs(trainer),
        "eval": evaluated, "state": trainer.run_state(), "kinds": kinds,
        "saved": {str(path.relative_to(out)): load_file(path) for path in out.rglob("*.safetensors")},
    }  # fmt: skip


def resume(kit, conftest, **settings):
    """Weights of an uninterrupted run, and of one that goes on from a checkpoint of it."""
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "max_grad_norm": 1.0}
    first, again = (build(kit, conftest, **(saving | settings)) for _ in range(2))
    first.train()
    again.train(resume_from_checkpoint=str(Path(first.args.output_dir) / "checkpoint-2"))
    return {"weights": [whole_weights_of(trainer) for trainer in (first, again)]}


def evaluate(kit, conftest, **settings):
    """Evaluations before and after training, the latter of data whose reference is the policy in training."""
    trainer = build(kit, conftest, per_device_eval_batch_size=2, max_steps=2, **settings)
    before = trainer.evaluate()
    trainer.train()
    return {"before": before, "new data": trainer.evaluate(kit.pairs(9, 2))}


def sample(kit, conftest, **settings):
    """PPO on completions that each process samples for itself, from whole weights."""
    trainer = kit.ppo(kit.model(initializer_range=0.1), train=kit.prompts(19), **settings)
    trainer.train()
    return {"weights": whole_weights_of(trainer), "logs": kit.logs(trainer)}


SCENES = {
    "resume dpo": (resume, {"trainer": "dpo"}),
    "resume ppo": (resume, {"trainer": "ppo"}),
    "evaluate": (evaluate, {"trainer": "dpo", **LORA}),
    "bf16": (train, {"trainer": "dpo", "bf16": True, "max_steps": 2}),
    "sample": (sample, {"num_generations": 2, "vf_coef": 0.2}),
}


def launched(launch, folder: Path, names, processes: int = 2, given=None):
    given = json.dumps({"fsdp": True, "ddp_backend": "gloo"} if given is None else given)
    launch(Path(__file__).with_name("sharded_worker.py"), folder, given, *names, processes=processes)
    return [torch.load(folder / f"rank_{r}.pt", weights_only=False) for r in range(processes)]


@pytest.fixture(scope="module")
def two(launch, tmp_path_factory):
    return launched(
        launch, tmp_path_factory.mktemp("fsdp"), [*RUNS, *(name for name in SCENES if name != "resume ppo")]
    )


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_give_what_one_gives(kit, conftest, two, name):
    assert_like_one(kit, conftest, RUNS[name], [results[name] for results in two])


@pytest.mark.long
def test_more_runs_in_two_processes(kit, conftest, launch, tmp_path):
    (tmp_path / "more").mkdir()
    more = launched(launch, tmp_path / "more", [*MORE, "resume ppo"])
    for name, settings in MORE.items():
        kit.folder = tmp_path / name
        assert_like_one(kit, conftest, settings, [results[name] for results in more])
    for results in more:
        kit.assert_same(*results["resume ppo"]["weights"], rtol=0, atol=0)


@pytest.mark.long
def test_four_processes_give_what_one_gives(kit, conftest, launch, tmp_path):
    four = launched(launch, tmp_path / "four", FOUR, 4)
    for name, settings in FOUR.items():
        assert_like_one(kit, conftest, settings, [results[name] for results in four])


@pytest.fixture(scope="module")
def zero(launch, tmp_path_factory):
    pytest.importorskip("deepspeed")
    config = json.loads(ZERO_CONFIG.read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # else such small ones stay whole
    given = {"deepspeed": config | {"zero_allow_untested_optimizer": True}, "use_cpu": False}
    return launched(launch, tmp_path_factory.mktemp("zero"), [*ZERO, "resume dpo"], given=given)


@pytest.mark.parametrize("name", ZERO)
def test_zero_gives_what_one_process_gives(kit, conftest, zero, name):
    assert_like_one(kit, conftest, ZERO[name], [results[name] for results in zero], kind="partitioned")


def test_a_run_resumed_with_zero_is_the_uninterrupted_one(kit, zero):
    for results in zero:
        kit.assert_same(*results["resume dpo"]["weights"], rtol=0, atol=0)


def test_a_resumed_run_is_the_uninterrupted_one(kit, two):
    for results in two:
        kit.assert_same(*results["resume dpo"]["weights"], rtol=0, atol=0)


def test_evaluations_before_and_after_training(kit, conftest, two):
    one = evaluate(kit, conftest, **(SCENES["evaluate"][1] | {"per_device_train_batch_size": 8}))
    for results in two:
        for when, metrics in one.items():
            for key, value in metrics.items():
                if not any(part in key for part in ("time", "per_second", "epoch")):
                    assert results["evaluate"][when][key] == pytest.approx(value, rel=1e-4, abs=1e-5), (when, key)


def test_bf16_is_autocast_as_where_the_reference_was_scored(two):
    for results in two:
        assert results["bf16"]["logs"][0]["loss"] == pytest.approx(math.log(2), abs=1e-3)


def test_processes_sample_for_themselves(kit, two):
    first, second = (results["sample"] for results in two)
    kit.assert_same(first["weights"], second["weights"], rtol=0, atol=0)
    assert all(log["val/first_approxkl"] < 1e-6 for log in first["logs"])
    assert all(log["sampling/sampling_logp_difference/max"] < 1e-4 for log in first["logs"])


def assert_like_one(kit, conftest, settings, got_by_rank, kind="DTensor"):
    one = train(kit, conftest, **(settings | {"per_device_train_batch_size": 8}))
    got, other = got_by_rank[0], got_by_rank[-1]
    assert got["kinds"] == {kind}
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
