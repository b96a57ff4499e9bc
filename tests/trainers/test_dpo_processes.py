"""Losses that look beyond their batch, in two processes with gloo: what one gives."""

import os
from pathlib import Path

import pytest
import torch

from fastalign.models.sharding import whole

RUNS = {
    "kto": {"loss_type": "kto"},
    "bco": {"loss_type": "bco"},
    "sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "token budget": {"max_tokens_per_batch": 150, "train_sampling_strategy": "random"},
    "tr-dpo": {"sync_ref_model": True, "ref_model_sync_steps": 2},
    "live, adapter": {
        "loss_type": "kto",
        "precompute_ref_log_probs": False,
        "use_peft": True,
        "lora_target_modules": ["q_proj"],
    },
    "fsdp2": {"fsdp": True},  # the last one: accelerate goes on sharding; tests/distributed has more
}
TIMES = {"tokens_per_second", "epoch"}


def rank() -> int:
    return int(os.environ["RANK"])


def train(kit, **settings):
    """What a run came to, in this process: three steps of eight, an evaluation whose last batch is filled up."""
    defaults = {
        "train_sampling_strategy": "sequential", "backend": "torch", "micro_batch_tokens": 64, "max_steps": 3,
        "per_device_eval_batch_size": 2, "save_strategy": "steps", "save_steps": 3,
    }  # fmt: skip
    unpaired = settings.get("loss_type") in ("kto", "bco")
    data = [kit.labelled(n, seed) if unpaired else kit.pairs(n, seed) for n, seed in ((24, 0), (7, 1))]
    trainer = kit.trainer(kit.model().double(), *data, **(defaults | settings))
    trainer.train()
    folder = Path(trainer.args.output_dir) / "checkpoint-3"
    kinds = {type(parameter).__name__ for parameter in trainer.model.parameters()}
    assert kinds == {"DTensor" if settings.get("fsdp") else "Parameter"}
    return {
        "weights": {name: whole(p) for name, p in kit.weights(trainer).items()}, "logs": kit.logs(trainer),
        "eval": trainer.evaluate(), "state": trainer.run_state(),
        "saved": sorted(path.name for path in folder.iterdir()),
    }  # fmt: skip


@pytest.fixture(scope="module")
def two(launch, tmp_path_factory):
    """All runs in two processes: by rank, in the order of RUNS."""
    folder = tmp_path_factory.mktemp("two")
    launch(Path(__file__).with_name("dpo_worker.py"), folder)
    return [torch.load(folder / f"rank_{r}.pt", weights_only=False) for r in range(2)]


@pytest.mark.parametrize("index", range(len(RUNS)), ids=list(RUNS))
def test_two_processes_give_what_one_gives(kit, two, index):
    settings = list(RUNS.values())[index]
    # as many pairs a step: twice the batch, or two batches
    doubled = {"gradient_accumulation_steps": 2} if "max_tokens_per_batch" in settings else {}
    whole_model = {"fsdp": None, "ddp_backend": None} if "fsdp" in settings else {}
    one = train(kit, **(settings | (doubled or {"per_device_train_batch_size": 8}) | whole_model))
    got, other = two[0][index], two[1][index]
    exact = {"rtol": 1e-9, "atol": 1e-11}
    float32 = {"rtol": 1e-5, "atol": 1e-7}  # adapters are in float32
    kit.assert_same(got["weights"], one["weights"], **(float32 if "adapter" in list(RUNS)[index] else exact))
    kit.assert_same(got["weights"], other["weights"], rtol=0, atol=0)
    assert len(got["logs"]) == len(one["logs"]) == 3
    for a, b in zip(got["logs"], one["logs"], strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - TIMES:
            assert a[name] == pytest.approx(b[name], rel=1e-6, abs=1e-9), name
    for name, value in one["eval"].items():
        if not any(part in name for part in ("runtime", "per_second", "epoch")):
            assert got["eval"][name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    if "reward_shift" in one["state"]:
        assert got["state"]["reward_shift"] == pytest.approx(one["state"]["reward_shift"], rel=1e-9)
        assert got["state"]["reward_shift"][1] + got["state"]["reward_shift"][3] == 24
    sharded = {"optimizer.bin", "pytorch_model_fsdp.bin"} if "fsdp" in settings else set()
    saved, expected = ({name for name in run["saved"] if "rng" not in name} for run in (got, one))
    assert saved - sharded == expected - ({"optimizer.pt"} if sharded else set())
    assert sharded <= saved
