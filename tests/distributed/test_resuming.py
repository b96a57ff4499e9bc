"""Runs of several processes that stop and go on, with as many processes or others, with FSDP2 and without."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch.distributed as dist

from fastalign.trainers.checkpoint_files import CheckpointError, check, checkpoints

HERE = Path(__file__)
spec = importlib.util.spec_from_file_location("sharded", HERE.with_name("test_sharded.py"))
sharded = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sharded)

pytestmark = pytest.mark.long  # some twenty short runs

SAVING = {
    "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2,
    "adam_epsilon": 1e-3, "weight_decay": 0.1, "max_grad_norm": 1.0, "per_device_train_batch_size": 8,
    "num_train_epochs": 9, "micro_batch_tokens": 64,
}  # fmt: skip
CASES = {
    "sft": {"trainer": "sft", "double": True},
    "dpo, tied": {"trainer": "dpo", "double": True, "model": {"tie_word_embeddings": True}},
    "dpo, adapter": {"trainer": "dpo", **sharded.LORA},
    "tr-dpo": {"trainer": "dpo", "double": True, "sync_ref_model": True, "ref_model_sync_steps": 1},
    "reward": {"trainer": "reward", "normalize_rewards": "mean_std"},
    "ppo, value head": {"trainer": "ppo", "double": True, "value_head": True, "optim": "adamw_torch"},
    "ppo, critic, adapter": {"trainer": "ppo", **sharded.LORA},
}  # fmt: skip
FSDP = {"fsdp": True, "ddp_backend": "gloo"}
DDP = {"ddp_backend": "gloo"}
SPREAD = {"fsdp": FSDP, "ddp": DDP}


def build(kit, conftest, folder, name, processes, **settings):
    kit.folder = Path(folder) / name
    batch = {"per_device_train_batch_size": SAVING["per_device_train_batch_size"] // processes}
    return sharded.build(kit, conftest, **(SAVING | CASES[name] | batch | settings))


def train(kit, conftest, folder, name, processes, **settings):
    """A whole run, which saves at steps 2 and 4."""
    trainer = build(kit, conftest, folder, name, processes, **settings)
    trainer.train()
    return {"weights": sharded.whole_weights_of(trainer), "state": trainer.run_state()}


def resume(kit, conftest, folder, name, processes, source, **settings):
    """The second half of a run, from the checkpoint of another one."""
    trainer = build(kit, conftest, folder, name, processes, **settings)
    trainer.train(resume_from_checkpoint=str(Path(source) / name / "out" / "checkpoint-2"))
    return {"weights": sharded.whole_weights_of(trainer), "state": trainer.run_state()}


def refuse(kit, conftest, folder, name, processes, damaged, **settings):
    """What each process says of a checkpoint that is damaged, and where it goes on from when none is named."""
    out = Path(folder) / name / "out"
    trainer = build(kit, conftest, folder, name, processes, output_dir=str(out), **settings)
    if dist.get_rank() == 0:
        file = out / "checkpoint-4" / damaged
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 8
        file.write_bytes(content)
    dist.barrier()
    said = []
    for wanted in (str(out / "checkpoint-4"), str(out / "checkpoint-5")):
        try:
            trainer.train(resume_from_checkpoint=wanted)
        except CheckpointError as error:
            said.append(str(error))
    trainer.train(resume_from_checkpoint=True)
    return {"said": said, "weights": sharded.whole_weights_of(trainer)}


@pytest.fixture(scope="module")
def one(tmp_path_factory, conftest):
    """In one process: the folder of the checkpoints, and what each run came to."""
    folder = tmp_path_factory.mktemp("one")
    kit = conftest.Kit(folder, conftest.make_tokenizer())
    return folder, {name: train(kit, conftest, folder, name, 1) for name in CASES}


@pytest.fixture(scope="module", params=SPREAD)
def two(request, processes, tmp_path_factory, one):
    """In two: the same, and runs that went on from their own checkpoints and from those of one process."""
    folder, settings = tmp_path_factory.mktemp(request.param), SPREAD[request.param]
    calls = []
    for name in CASES:
        common = {"name": name, "processes": 2, **settings}
        calls.append((HERE, "train", common | {"folder": folder}))
        calls.append((HERE, "resume", common | {"folder": folder / "own", "source": folder}))
        calls.append((HERE, "resume", common | {"folder": folder / "from one", "source": one[0]}))
    by_rank = processes.results(calls)
    found = [[results[i : i + 3] for i in range(0, len(results), 3)] for results in by_rank]
    return folder, request.param, [dict(zip(CASES, triples, strict=True)) for triples in found]


def assert_alike(kit, got, expected, name):
    """To rounding: of float64 weights, or of an adapter's in float32."""
    double = CASES[name].get("double", False)
    kit.assert_same(got["weights"], expected["weights"], rtol=1e-6 if double else 1e-4, atol=1e-8 if double else 2e-6)
    for key in ("num_tokens", "reference", "episodes"):
        assert got["state"].get(key) == expected["state"].get(key), key


@pytest.mark.parametrize("name", CASES)
def test_with_as_many_processes_it_is_the_uninterrupted_run(kit, two, name):
    for results in two[2]:
        whole, own, _ = results[name]
        kit.assert_same(own["weights"], whole["weights"], rtol=0, atol=0)
        assert own["state"] == whole["state"]


@pytest.mark.parametrize("name", CASES)
def test_from_one_process_to_two(kit, one, two, name):
    for results in two[2]:
        assert_alike(kit, results[name][2], one[1][name], name)


@pytest.mark.parametrize("name", CASES)
def test_from_two_processes_to_one(kit, conftest, two, name, tmp_path):
    assert_alike(kit, resume(kit, conftest, tmp_path, name, 1, two[0]), two[2][0][name][0], name)


def test_from_two_processes_to_four(kit, two, processes, tmp_path):
    settings = {"processes": 4, "source": two[0], **SPREAD[two[1]]}
    calls = [(HERE, "resume", settings | {"folder": tmp_path, "name": name}) for name in CASES]
    for results in processes.results(calls, 4):
        for name, got in zip(CASES, results, strict=True):
            assert_alike(kit, got, two[2][0][name][0], name)


@pytest.mark.parametrize("name", ["dpo, tied"])
def test_all_processes_find_the_same_damage(kit, two, processes, name):
    """None of them hangs, waiting for one that has refused; without a name they go on from the one before."""
    folder, spread, results = two
    damaged = "optimizer.bin" if spread == "fsdp" else "optimizer.pt"
    arguments = {"folder": folder, "name": name, "processes": 2, "damaged": damaged, **SPREAD[spread]}
    for (got,) in processes.results([(HERE, "refuse", arguments)]):
        assert f"checkpoint-4 is damaged: the checksum of {damaged}" in got["said"][0]
        assert "checkpoint-5 is no folder" in got["said"][1]
        kit.assert_same(got["weights"], results[0][name][0]["weights"], rtol=0, atol=0)
    for checkpoint in checkpoints(folder / name / "out"):
        check(checkpoint)
