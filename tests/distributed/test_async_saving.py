"""Checkpoints of several processes that are written while training goes on."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastalign.trainers import checkpoints as saving
from fastalign.trainers.checkpoint_files import MANIFEST, UNFINISHED, check, checkpoints


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HERE = Path(__file__)
resuming, stopping = load("test_resuming"), load("test_stopping")
OF_THE_RUN = {MANIFEST, "trainer_state.json", "fastalign_state.json", "training_args.bin"}  # times and folders in them

pytestmark = pytest.mark.long


def train(kit, conftest, folder, name, **settings):
    """A run whose checkpoints are begun to be written when some steps are over."""
    original = saving._complete

    def complete(*args):
        time.sleep(0.2)
        original(*args)

    saving._complete = complete
    try:
        return resuming.train(kit, conftest, folder, name, 2, **settings)
    finally:
        saving._complete = original


def fail(kit, conftest, folder, name, **settings):
    """What each process says when the first one cannot write its second checkpoint, or the last."""
    original, said = torch.save, []

    def save(content, path, *args, **kwargs):
        if "checkpoint-4/optimizer" in str(path):
            raise OSError(28, "No space left on device")
        return original(content, path, *args, **kwargs)

    torch.save = save
    try:
        for steps in (6, 4):
            try:
                resuming.train(kit, conftest, Path(folder) / str(steps), name, 2, max_steps=steps, **settings)
            except OSError as error:
                said.append(str(error))
    finally:
        torch.save = original
    return said


@pytest.mark.parametrize("spread", resuming.SPREAD)
def test_the_files_are_those_of_a_run_that_waits(kit, processes, tmp_path, spread):
    settings, names = resuming.SPREAD[spread], ("dpo, tied", "tr-dpo", "ppo, critic, adapter")
    calls = []
    for name in names:
        common = {"name": name, **settings}
        calls.append((HERE, "train", common | {"folder": tmp_path / "sync"}))
        calls.append((HERE, "train", common | {"folder": tmp_path / "async", "async_save": True}))
    for results in processes.results(calls):
        for i in range(0, len(results), 2):
            kit.assert_same(results[i]["weights"], results[i + 1]["weights"], rtol=0, atol=0)
    for name in names:
        sync, later = (checkpoints(tmp_path / form / name / "out") for form in ("sync", "async"))
        assert [folder.name for folder in sync] == [folder.name for folder in later] == ["checkpoint-2", "checkpoint-4"]
        for own, other in zip(later, sync, strict=True):
            check(own)
            files = {path.relative_to(own) for path in own.rglob("*") if path.is_file()}
            assert files == {path.relative_to(other) for path in other.rglob("*") if path.is_file()}
            for file in files:
                same = (own / file).read_bytes() == (other / file).read_bytes()
                assert file.name in OF_THE_RUN or same, (name, file)


@pytest.mark.parametrize("spread", resuming.SPREAD)
def test_what_went_wrong_is_raised_in_all_processes(processes, tmp_path, spread):
    settings = resuming.SPREAD[spread] | {"folder": tmp_path, "name": "dpo, tied", "async_save": True}
    for (said,) in processes.results([(HERE, "fail", settings)]):
        assert len(said) == 2
        assert all("checkpoint-4 could not be written" in text for text in said)
    for steps in ("6", "4"):
        assert [f.name for f in checkpoints(tmp_path / steps / "dpo, tied" / "out")] == ["checkpoint-2"]


@pytest.mark.parametrize("settings", [{}, {"fsdp": True}], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("killed", [0, 1])
def test_one_is_killed_while_they_save(processes, tmp_path, settings, killed):
    stopping.test_one_is_killed_while_they_save(processes, tmp_path, settings | {"async_save": True}, killed)


@pytest.mark.parametrize("settings", [{}, {"fsdp": True}], ids=["ddp", "fsdp"])
def test_sigterm_to_one_of_them(processes, tmp_path, settings):
    settings = settings | {"async_save": True}
    stopping.test_all_save_once_and_exit(processes, tmp_path, settings, [1], signal.SIGTERM, 143)


def keep(kit, conftest, folder, result, max_steps):
    """One process, killed again and again: a run that saves after every step, in the background."""
    os.fsync = lambda descriptor: None  # a kill is no power cut
    there = bool(checkpoints(Path(folder) / "out"))
    settings = {"save_steps": 1, "save_total_limit": 2, "async_save": True, "ddp_backend": None}
    stopping.run(kit, conftest, folder, max_steps, there, **settings)
    (last,) = [f for f in checkpoints(Path(folder) / "out") if f.name == f"checkpoint-{max_steps}"]
    shutil.copy(last / "model.safetensors", result)


@pytest.mark.parametrize("kills", [12])
def test_killed_while_it_writes_in_the_background(processes, tmp_path, kills):
    rng, folder = random.Random(0), tmp_path / "killed"
    out, steps, caught = folder / "out", 3 * kills, 0
    arguments = {"folder": folder, "result": tmp_path / "killed.safetensors", "max_steps": steps}

    def step() -> int:
        return max((int(found.name.split("-")[1]) for found in checkpoints(out)), default=0)

    for _ in range(kills):
        before = step()
        (process,) = processes.start([(HERE, "keep", arguments)], 1)
        stopping.wait_until(lambda before=before, p=process: step() > before or not p.is_alive())
        stopping.wait_until(lambda p=process: (out / UNFINISHED).exists() or not p.is_alive())
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.join()
        caught += (out / UNFINISHED).exists()
        for found in checkpoints(out):
            check(found)
        assert step() >= before
    assert caught >= kills // 4
    assert processes.wait(processes.start([(HERE, "keep", arguments)], 1)) == [0], processes.errors()
    whole = {"folder": tmp_path / "whole", "result": tmp_path / "whole.safetensors", "max_steps": steps}
    processes.results([(HERE, "keep", whole)], 1)
    killed, uninterrupted = (load_file(tmp_path / f"{name}.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(killed[name], uninterrupted[name]) for name in uninterrupted)
