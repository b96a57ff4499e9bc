"""PPO in two processes with gloo: what one gives, where completions do not depend on who samples them."""

import json
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

ALIKE = {
    "optim": "sgd", "learning_rate": 0.3, "backend": "torch", "train_sampling_strategy": "sequential",
    "num_mini_batches": 1, "per_device_eval_batch_size": 2, "micro_batch_tokens": 40, "fixed": True,
}  # fmt: skip
RUNS = {
    "critic, adapter, warm-up": {"lora": True, "critic_warmup_steps": 1, "max_steps": 4},
    "value head, controllers": {
        "value_head": True, "kl_controller": "adaptive", "target_kl": 0.1, "kl_horizon": 40, "normalize_scores": True,
        "policy_loss": "penalty", "whiten_rewards": True, "loss_aggregation": "sequence_mean",
    },
    "group": {
        "advantage_estimator": "group", "num_generations": 2, "max_steps": 2, "loss_aggregation": "constant",
        "missing_eos_penalty": 1.0, "kl_loss_coef": 0.1,
    },
    "sequences, filter": {
        "loss_type": "gspo", "num_generations": 2, "max_steps": 2, "filter_groups": True, "overlong_buffer": 3,
        "cliprange": 0.01, "train_rows": 8,
    },
    "few groups, filter": {  # of which a process may have none to train on
        "loss_type": "dapo", "num_generations": 2, "max_steps": 6, "filter_groups": True, "response_length": 2,
        "per_device_train_batch_size": 2,
    },
}  # fmt: skip
SAMPLED = {"fixed": False, "optim": "adamw_torch", "learning_rate": 0.01, "num_mini_batches": 2, "train_rows": 19}
TIMES = {"eps", "tokens_per_second", "epoch"}


def rank() -> int:
    return int(os.environ["RANK"])


def train(kit, *, lora=False, fixed=True, train_rows=16, **settings):
    """What a run came to, in this process."""
    sampler = kit.fixed_answers(settings.get("response_length", 6)) if fixed else None
    trainer = kit.ppo(
        kit.model(initializer_range=0.1).double(), train=kit.prompts(train_rows), evaluation=kit.prompts(5, seed=3),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "up_proj"]) if lora else None, sampler=sampler,
        **settings,
    )  # fmt: skip
    start = kit.weights(trainer)
    trainer.train()
    evaluated = trainer.evaluate()
    trainer.save_model()
    return {
        "weights": kit.weights(trainer), "start": start, "logs": kit.logs(trainer), "eval": evaluated,
        "state": trainer.run_state(), "saved": sorted(path.name for path in Path(trainer.args.output_dir).iterdir()),
    }  # fmt: skip


@pytest.fixture(scope="module")
def two(launch, tmp_path_factory):
    """All runs in two processes: by rank, in the order of RUNS, then the one that samples."""
    folder = tmp_path_factory.mktemp("two")
    runs = [ALIKE | settings for settings in (*RUNS.values(), SAMPLED)]
    launch(Path(__file__).with_name("ppo_worker.py"), folder, json.dumps(runs))
    return [torch.load(folder / f"rank_{r}.pt", weights_only=False) for r in range(2)]


@pytest.mark.parametrize("index", range(len(RUNS)), ids=list(RUNS))
def test_two_processes_give_what_one_gives(kit, two, index):
    """Weights, every logged metric, controllers, and an evaluation whose last batch is filled up."""
    settings = ALIKE | list(RUNS.values())[index]
    one = train(kit, **(settings | {"per_device_train_batch_size": 2 * settings.get("per_device_train_batch_size", 4)}))
    got = two[0][index]
    kit.assert_same(got["start"], one["start"], rtol=0, atol=0)
    kit.assert_same(got["weights"], one["weights"], rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(got["start"][name], weight) for name, weight in got["weights"].items())
    assert len(got["logs"]) == len(one["logs"]) == settings.get("max_steps", 3)
    for a, b in zip(got["logs"], one["logs"], strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - TIMES:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name
    # rewards are whitened over a batch of evaluation, which are others here
    of_a_batch = ["explained_variance"] if "whiten_rewards" in settings else []
    for name, value in one["eval"].items():
        if not any(part in name for part in ("runtime", "per_second", "epoch", *of_a_batch)):
            assert got["eval"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert got["state"]["episodes"] == one["state"]["episodes"]
    assert got["state"]["prompts_per_phase"] == one["state"]["prompts_per_phase"]
    for controller in ("kl_controller", "penalty_controller"):
        assert got["state"][controller]["coef"] == pytest.approx(one["state"][controller]["coef"], rel=1e-5)
    assert got["saved"] == one["saved"]


@pytest.mark.parametrize("index", range(len(RUNS) + 1), ids=[*RUNS, "sampled"])
def test_processes_end_with_the_same_weights(kit, two, index):
    kit.assert_same(two[0][index]["weights"], two[1][index]["weights"], rtol=0, atol=0)
    for a, b in zip(two[0][index]["logs"], two[1][index]["logs"], strict=True):
        assert {n: a[n] for n in a.keys() - TIMES} == {n: b[n] for n in b.keys() - TIMES}


def test_the_policy_waits_for_the_warm_up(two):
    """One step of four: afterwards its adapter has moved, and the critic all the time."""
    logs = two[0][0]["logs"]
    assert "policy/approxkl_avg" not in logs[0]
    assert logs[1]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert logs[3]["objective/kl"] != pytest.approx(0, abs=1e-5)


def test_the_filter_left_something_out(two):
    logs = two[0][list(RUNS).index("sequences, filter")]["logs"]
    assert any(0 < log["completions/filtered_ratio"] < 1 for log in logs)
    # of two groups one, which is all that one of the processes has
    assert {log["completions/filtered_ratio"] for log in two[0][list(RUNS).index("few groups, filter")]["logs"]} >= {
        0.5,
        1,
    }


def test_processes_sample_for_themselves(two):
    logs = two[0][-1]["logs"]
    assert logs[0]["episode"] == 16
    assert all(log["val/first_approxkl"] < 1e-6 for log in logs)
