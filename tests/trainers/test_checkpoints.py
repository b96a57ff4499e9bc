"""What trainers save is whole or not there; what they resume from is what was saved."""

from __future__ import annotations

import errno
import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from fastalign.trainers import checkpoint_files
from fastalign.trainers.checkpoint_files import MANIFEST, UNFINISHED, CheckpointError, check, checkpoints


def make(kit, **settings):
    defaults = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "optim": "adamw_torch"}
    return kit.trainer(kit.model(), kit.pairs(16), **(defaults | settings))


def names(kit) -> list[str]:
    return sorted(path.name for path in (kit.folder / "out").iterdir() if path.is_dir())


def test_a_checkpoint_is_sealed_with_everything_in_it(kit):
    make(kit, sync_ref_model=True, ref_model_sync_steps=1, max_steps=1).train()
    assert names(kit) == ["checkpoint-1"]
    folder = kit.folder / "out" / "checkpoint-1"
    check(folder)
    listed = json.loads((folder / MANIFEST).read_text())["content"]["files"]
    assert set(listed) == {p.name for p in folder.iterdir()} - {MANIFEST}
    assert {"reference.safetensors", "fastalign_state.json", "optimizer.pt", "rng_state.pth"} <= set(listed)


def test_old_ones_go_after_the_new_one_is_there(kit, monkeypatch):
    seen = []
    original = checkpoint_files.prune

    def prune(root, limit, keep):
        for folder in checkpoints(root):
            check(folder)
        seen.append([folder.name for folder in checkpoints(root)])
        original(root, limit, keep)

    monkeypatch.setattr("fastalign.trainers.checkpoints.prune", prune)
    make(kit, save_total_limit=1).train()
    assert seen == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"], ["checkpoint-2", "checkpoint-3"]]
    assert names(kit) == ["checkpoint-3"]


def test_the_best_one_is_kept_and_named_where_it_is(kit):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1}
    model = kit.model()
    # a learning rate that makes everything worse after the first step
    trainer = kit.trainer(
        model, kit.pairs(16), kit.pairs(8, seed=1), save_strategy="steps", save_steps=1, max_steps=4,
        metric_for_best_model="rewards/margins", greater_is_better=False, learning_rate=1.0, **settings,
    )  # fmt: skip
    trainer.train()
    best = kit.folder / "out" / f"checkpoint-{trainer.state.best_global_step}"
    assert trainer.state.best_model_checkpoint == str(best)
    state = json.loads((best / TRAINER_STATE_NAME).read_text())
    assert state["best_model_checkpoint"] == str(best)
    check(best)
    assert names(kit) == [best.name]


def test_what_dies_while_it_saves_leaves_the_last_one(kit, monkeypatch):
    """Everything transformers writes is there but not all of ours: the next run goes on from the one before."""
    trainer = make(kit)
    original = trainer.write_run_files

    def write(folder):
        if trainer.state.global_step == 2:
            raise SystemError("the process dies")
        original(folder)

    trainer.write_run_files = write
    with monkeypatch.context() as patch:
        patch.setattr("fastalign.trainers.checkpoints.clear_unfinished", lambda root: None)  # the dead clear nothing
        with pytest.raises(SystemError):
            trainer.train()
    assert names(kit) == [UNFINISHED, "checkpoint-1"]
    assert (kit.folder / "out" / UNFINISHED / "checkpoint-2" / "model.safetensors").is_file()
    resumed = make(kit)
    resumed.train(resume_from_checkpoint=True)
    assert names(kit) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    whole = make(kit, output_dir=str(kit.folder / "whole"))
    whole.train()
    kit.assert_same(kit.weights(resumed), kit.weights(whole), rtol=0, atol=0)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), None], ids=["system", "torch"])
def test_a_full_disk_is_named_and_costs_no_other_checkpoint(kit, monkeypatch, error):
    trainer = make(kit)
    original = torch.save

    def save(content, path, *args, **kwargs):
        if "checkpoint-2" in str(path):
            if error is not None:
                raise error
            return original(content, "/dev/full", *args, **kwargs)
        return original(content, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    message = r"checkpoint-2 could not be written \(.*\); the checkpoints before it are whole"
    with pytest.raises(OSError, match=message) as caught:
        trainer.train()
    assert caught.value.errno == (errno.EIO if error is None else errno.ENOSPC)  # torch does not tell
    assert names(kit) == ["checkpoint-1"]  # and no remains, which would fill the disk
    check(kit.folder / "out" / "checkpoint-1")


def test_an_error_of_a_program_stays_what_it_is(kit, monkeypatch):
    def broken(*args):
        raise TypeError("a bug")

    monkeypatch.setattr(Trainer, "_save_rng_state", broken)
    with pytest.raises(TypeError, match="a bug"):
        make(kit).train()


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_damaged_ones_are_refused_or_passed_over(kit, caplog):
    whole = make(kit)
    whole.train()
    out = kit.folder / "out"
    flip(out / "checkpoint-3" / "model.safetensors")
    with open(out / "checkpoint-2" / "optimizer.pt", "r+b") as file:
        file.truncate(100)
    with pytest.raises(CheckpointError, match=r"checkpoint-3 is damaged: the checksum of model\.safetensors"):
        make(kit).train(resume_from_checkpoint=str(out / "checkpoint-3"))
    with pytest.raises(CheckpointError, match=r"checkpoint-2 is damaged: optimizer\.pt has 100 bytes"):
        make(kit).train(resume_from_checkpoint=str(out / "checkpoint-2"))
    resumed = make(kit)
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        resumed.train(resume_from_checkpoint=True)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    kit.assert_same(kit.weights(resumed), kit.weights(whole), rtol=0, atol=0)
    warnings = [record.getMessage() for record in caplog.records if "going on from checkpoint-1" in record.getMessage()]
    assert ["checkpoint-3 is damaged" in warnings[0], "checkpoint-2 is damaged" in warnings[1]] == [True, True]
    assert [check(folder) for folder in checkpoints(out)] == [None] * 3  # done again, both are whole


def test_pushed_is_what_is_in_place(kit, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append((folder, check(Path(folder))))
    )
    trainer = make(kit, max_steps=2)
    trainer.args.push_to_hub = True
    monkeypatch.setattr(trainer, "_finish_current_push", lambda: None)
    trainer.train()
    assert pushed == [(str(kit.folder / "out" / f"checkpoint-{step}"), None) for step in (1, 2)]
