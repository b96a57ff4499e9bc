"""Checkpoints that are written while training goes on: the same files, and nothing that goes wrong is forgotten."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from fastalign.trainers import checkpoints
from fastalign.trainers.async_saving import Background, HostCopies, deferred_files
from fastalign.trainers.checkpoint_files import MANIFEST, UNFINISHED, check
from fastalign.trainers.checkpoint_files import checkpoints as checkpoints_in
from fastalign.trainers.stopping import Terminated

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "optim": "adamw_torch", "async_save": True}
OF_THE_RUN = {MANIFEST, "trainer_state.json", "fastalign_state.json", "training_args.bin"}  # times and folders in them


def tr_dpo(kit, **settings):
    return kit.trainer(kit.model(tie_word_embeddings=True), kit.pairs(16), sync_ref_model=True, ref_model_sync_steps=1,
                       **(SAVING | settings))  # fmt: skip


def adapter(kit, **settings):
    return kit.trainer(kit.model(), kit.pairs(16), peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
                       **(SAVING | settings))  # fmt: skip


def ppo(kit, **settings):
    return kit.ppo(**(SAVING | settings))


RUNS = {
    tr_dpo: {"model.safetensors", "optimizer.pt", "reference.safetensors"},
    adapter: {"adapter_model.safetensors", "optimizer.pt"},
    ppo: {"model.safetensors", "critic/model.safetensors", "optimizer.pt"},
}


def slowed(monkeypatch, trainer) -> list[set[str]]:
    """Let training go on by a step before anything is written; returns what is left to write then."""
    original, left = checkpoints._complete, []

    def complete(files, staged, final, *args):
        left.append({str(Path(write.args[1]).relative_to(staged)) for write in files[1::2]})  # it looks before each
        step, deadline = trainer.state.global_step, time.monotonic() + 1
        while trainer.state.global_step < min(step + 1, 5) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)  # the optimizer has moved them
        original(files, staged, final, *args)

    monkeypatch.setattr(checkpoints, "_complete", complete)
    return left


@pytest.mark.parametrize("make", RUNS, ids=lambda make: make.__name__)
def test_the_files_are_those_of_a_run_that_waits(kit, monkeypatch, make):
    with monkeypatch.context() as patch:
        trainer = make(kit)
        left = slowed(patch, trainer)
        trainer.train()
    assert all(RUNS[make] <= names for names in left)
    waiting = make(kit, async_save=False, output_dir=str(kit.folder / "waiting"))
    waiting.train()
    kit.assert_same(kit.weights(trainer), kit.weights(waiting), rtol=0, atol=0)
    ours, theirs = (checkpoints_in(kit.folder / name) for name in ("out", "waiting"))
    for found in (ours, theirs):
        assert [folder.name for folder in found] == [f"checkpoint-{step}" for step in (2, 4, 5)]
    for own, other in zip(ours, theirs, strict=True):
        check(own)
        files = {path.relative_to(own) for path in own.rglob("*") if path.is_file()}
        assert files == {path.relative_to(other) for path in other.rglob("*") if path.is_file()}
        for file in files:
            assert file.name in OF_THE_RUN or (own / file).read_bytes() == (other / file).read_bytes(), file
    assert not hasattr(torch.save, "__wrapped__")  # it is as it was


def test_a_run_goes_on_from_one(kit):
    tr_dpo(kit).train()
    resumed, whole = tr_dpo(kit), tr_dpo(kit, output_dir=str(kit.folder / "whole"), async_save=False)
    resumed.train(resume_from_checkpoint=str(kit.folder / "out" / "checkpoint-2"))
    whole.train()
    kit.assert_same(kit.weights(resumed), kit.weights(whole), rtol=0, atol=0)


def failing(monkeypatch, step: int, error: Exception) -> None:
    original = torch.save

    def save(content, path, *args, **kwargs):
        if f"checkpoint-{step}/optimizer" in str(path):
            raise error
        return original(content, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)


@pytest.mark.parametrize(("bad", "raised_at"), [(4, 5), (5, 5)], ids=["at the next one", "at the end"])
def test_what_went_wrong_is_raised(kit, monkeypatch, bad, raised_at):
    failing(monkeypatch, bad, OSError(28, "No space left on device"))
    trainer = adapter(kit)
    with pytest.raises(OSError, match=rf"checkpoint-{bad} could not be written .*the checkpoints before it are whole"):
        trainer.train()
    assert trainer.state.global_step == raised_at
    there = checkpoints_in(kit.folder / "out")
    assert [folder.name for folder in there] == [f"checkpoint-{step}" for step in (2, 4) if step < bad]
    assert not (kit.folder / "out" / UNFINISHED).exists()


class RaiseAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            raise RuntimeError("a run that fails")


@pytest.mark.parametrize("bad", [None, 2])
def test_a_run_that_fails_waits_for_what_is_written(kit, monkeypatch, bad):
    if bad:
        failing(monkeypatch, bad, OSError(28, "No space left on device"))
    trainer = adapter(kit, callbacks=[RaiseAt(2)])
    slowed(monkeypatch, trainer)
    with pytest.raises(RuntimeError, match="a run that fails") as caught:
        trainer.train()
    assert [folder.name for folder in checkpoints_in(kit.folder / "out")] == ([] if bad else ["checkpoint-2"])
    notes = getattr(caught.value, "__notes__", [])
    assert any("checkpoint-2 could not be written" in note for note in notes) == bool(bad)


class SignalAt(TrainerCallback):
    def __init__(self, times: int = 1) -> None:
        self.times = times

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 2:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_ends_with_the_checkpoint_in_place(kit, monkeypatch, python_signals):
    trainer = adapter(kit, callbacks=[SignalAt()])
    slowed(monkeypatch, trainer)
    with pytest.raises(Terminated):
        trainer.train()
    there = checkpoints_in(kit.folder / "out")
    assert [folder.name for folder in there] == ["checkpoint-2", "checkpoint-3"]
    check(there[-1])
    assert not (kit.folder / "out" / UNFINISHED).exists()


def test_a_second_one_does_not_wait_for_the_files(kit, monkeypatch, python_signals):
    trainer = adapter(kit, callbacks=[SignalAt(2)])
    with monkeypatch.context() as patch:
        slowed(patch, trainer)
        with pytest.raises(Terminated):
            trainer.train()
    assert trainer.state.global_step == 2
    assert not checkpoints_in(kit.folder / "out")
    trainer.remove_callback(SignalAt)
    trainer.train()  # goes on all the same, once the thread has seen that nobody waits
    assert [folder.name for folder in checkpoints_in(kit.folder / "out")][-1] == "checkpoint-5"


def test_the_best_one_is_in_place_when_it_is_loaded(kit, monkeypatch):
    trainer = kit.trainer(
        kit.model(), kit.pairs(16), kit.pairs(8, seed=1), eval_strategy="steps", eval_steps=2, save_total_limit=1,
        load_best_model_at_end=True, metric_for_best_model="rewards/margins", greater_is_better=False,
        **(SAVING | {"learning_rate": 1.0, "max_steps": 4}),
    )  # fmt: skip
    slowed(monkeypatch, trainer)
    trainer.train()
    (best,) = checkpoints_in(kit.folder / "out")
    assert str(best) == trainer.state.best_model_checkpoint
    saved = safetensors.torch.load_file(best / "model.safetensors")
    kit.assert_same({name: p for name, p in kit.weights(trainer).items() if name in saved}, saved, rtol=0, atol=0)


def test_other_threads_and_what_holds_no_tensors_are_left_alone(tmp_path):
    ours, theirs = {"x": torch.ones(2)}, {"x": torch.zeros(2)}
    with deferred_files(HostCopies().take) as writes:
        thread = threading.Thread(target=torch.save, args=(theirs, tmp_path / "theirs"))
        thread.start()
        thread.join()
        torch.save({"a": 1}, tmp_path / "numbers")
        torch.save(ours, tmp_path / "ours")
        safetensors.torch.save_file(ours, tmp_path / "tensors")
        ours["x"].zero_()
    assert {path.name for path in tmp_path.iterdir()} == {"theirs", "numbers"}
    for write in writes:
        write()
    assert torch.load(tmp_path / "ours")["x"].tolist() == [1, 1]
    assert safetensors.torch.load_file(tmp_path / "tensors")["x"].tolist() == [1, 1]


def test_copies_keep_their_memory_and_what_is_one_stays_one():
    copies, weight = HostCopies(), torch.arange(6.0)
    content = {"a": weight, "b": weight[2:4], "c": [weight.view(2, 3)]}
    first = copies.take(content)
    assert len({x.untyped_storage().data_ptr() for x in (first["a"], first["b"], first["c"][0])}) == 1
    assert first["a"].data_ptr() != weight.data_ptr()
    weight += 1
    second = copies.take(content)
    assert second["a"].data_ptr() == first["a"].data_ptr()
    assert second["b"].tolist() == [3.0, 4.0]


def test_of_what_was_gathered_the_rest_is_copied():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    copies, gathered = HostCopies(), torch.ones(3)
    step = optimizer.state[model.weight]["step"]
    with copies.of_gathered(model, optimizer):
        taken = copies.take({"gathered": gathered, "weight": model.weight.detach(), "step": step, "lr": 0.1})
    assert taken["gathered"] is gathered
    assert taken["lr"] == 0.1
    for name, live in (("weight", model.weight), ("step", step)):
        assert taken[name].data_ptr() != live.data_ptr()
        assert torch.equal(taken[name], live)


def test_work_in_the_background_is_waited_for_once():
    background, done = Background(), []
    assert background.wait() is None
    background.start(lambda: done.append(1))
    assert background.wait() is None
    assert done == [1]

    def bad():
        raise OSError("it does not work")

    background.start(bad)
    assert isinstance(background.wait(), OSError)
    assert background.wait() is None


@pytest.mark.long
@pytest.mark.parametrize("save", ["torch.save(x, folder / 'x')", "safetensors.torch.save_file(x, folder / 'x')"])
def test_a_process_that_is_told_twice_ends_properly(tmp_path, save):
    """In the middle of a file: the interpreter would abort under a thread that does not end."""
    program = f"""
import sys, pathlib, safetensors.torch, torch
from fastalign.trainers.async_saving import Background
folder, x = pathlib.Path(sys.argv[1]), {{"x": torch.ones(1 << 24)}}
background = Background()
background.start(lambda: [{save}, background.look(), (folder / "more").touch()])
background.give_up()
sys.exit(143)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (143, "")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_pushing_checkpoints_is_refused(kit):
    with pytest.raises(ValueError, match=r"async_save=True with hub_strategy=.*accepted is 'end'"):
        kit.config(async_save=True, push_to_hub=True, hub_strategy="checkpoint")
