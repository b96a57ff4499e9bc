"""kill -9 and SIGTERM while a run trains and saves: it goes on from the last whole checkpoint to the same weights."""

from __future__ import annotations

import os
import random
import runpy
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastalign.trainers.checkpoint_files import UNFINISHED, check, checkpoints

WORKER = Path(__file__).with_name("checkpoint_worker.py")


class Run:
    """Processes that train in one folder, one after the other."""

    def __init__(self, forks, folder: Path, max_steps: int, loader_workers: int = 0) -> None:
        self.forks, self.folder, self.max_steps, self.loader_workers = forks, folder, max_steps, loader_workers
        folder.mkdir()
        self.out, self.result, self.errors = folder / "out", folder / "result.safetensors", folder / "errors"

    def start(self):
        names = {
            "output_dir": str(self.out), "result_path": str(self.result), "errors_path": str(self.errors),
            "max_steps": self.max_steps, "resume": True, "loader_workers": self.loader_workers,
        }  # fmt: skip
        process = self.forks.Process(target=runpy.run_path, args=(str(WORKER),), kwargs={"init_globals": names})
        process.start()
        return process

    def wait(self, process) -> int:
        process.join(300)
        assert process.exitcode is not None, "it hangs"
        return process.exitcode

    def finish(self) -> dict[str, torch.Tensor]:
        assert self.wait(self.start()) == 0, self.errors.read_text()[-3000:]
        return load_file(self.result)

    def step(self) -> int:
        """Of the last checkpoint, 0 without any."""
        return max((int(folder.name.split("-")[1]) for folder in checkpoints(self.out)), default=0)


def wait_for(condition, process, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while process.is_alive() and not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def kill_one(run: Run, rng: random.Random, tally) -> bool | None:
    """A run is begun, goes on from the last checkpoint, and dies after its next one: was it saving? None: it ended."""
    before, process = run.step(), run.start()
    wait_for(lambda: run.step() > before, process)
    if rng.random() < 0.7:  # in the middle of a checkpoint, else anywhere
        wait_for(lambda: (run.out / UNFINISHED).exists(), process)
    time.sleep(rng.uniform(0, 0.04))
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    died = run.wait(process) == -signal.SIGKILL
    assert died or process.exitcode == 0, run.errors.read_text()[-3000:]
    tally["kills survived"] += died
    for folder in checkpoints(run.out):
        check(folder)  # whatever is called a checkpoint is one
    lost = run.step() < before
    tally["numbers lost"] += lost
    assert not lost
    return (run.out / UNFINISHED).exists() if died else None


def killed_again_and_again(forks, root: Path, tally, *, kills: int, saving: int, seed: int) -> None:
    """One run after another, until so many processes have died at work, and so many of them in a checkpoint.

    On a busy machine a process may be done before it is killed: that is the end of its run, and another one begins.
    """
    rng, max_steps = random.Random(seed), 2 * min(kills, 20) + 4
    whole = Run(forks, root / "whole", max_steps).finish()
    left, rounds = [kills, saving], 0
    while max(left) > 0:
        assert rounds <= kills
        run, died = Run(forks, root / f"killed-{rounds}", max_steps), True
        while died and max(left) > 0:
            in_checkpoint = kill_one(run, rng, tally)
            died = in_checkpoint is not None
            left = [left[0] - died, left[1] - bool(in_checkpoint)]
        killed = run.finish()
        different = [name for name in whole if not torch.equal(whole[name], killed[name])]
        tally["numbers lost"] += len(different)
        assert different == []
        assert len(checkpoints(run.out)) == 2  # save_total_limit
        rounds += 1


def test_killed_while_it_saves(forks, tmp_path, tally):
    killed_again_and_again(forks, tmp_path, tally, kills=3, saving=1, seed=0)


@pytest.mark.long
def test_killed_a_hundred_times_while_it_saves(forks, tmp_path, tally):
    killed_again_and_again(forks, tmp_path, tally, kills=100, saving=30, seed=1)


@pytest.mark.parametrize(
    ("workers", "number", "status"),
    [(0, signal.SIGTERM, 143), (2, signal.SIGTERM, 143), (2, signal.SIGINT, 130)],
    ids=["SIGTERM", "SIGTERM to a group", "Ctrl-C to a group"],
)  # fmt: skip
def test_what_is_told_to_stop_saves_and_exits(forks, tmp_path, tally, workers, number, status):
    """Terminals and launchers tell a whole group: the run, and the workers of its data loader."""
    run = Run(forks, tmp_path / "told", max_steps=400, loader_workers=workers)
    process = run.start()
    wait_for(lambda: run.step() >= 2, process)
    (os.killpg if workers else os.kill)(process.pid, number)
    assert run.wait(process) == status, run.errors.read_text()[-3000:]
    tally["kills survived"] += 1
    said = run.errors.read_text()
    assert said.count("stopping after this step and its checkpoint") == 1
    assert "Traceback" not in said
    assert not run.result.exists()
    assert 2 <= run.step() < 400
    assert not (run.out / UNFINISHED).exists()
    for folder in checkpoints(run.out):
        check(folder)
    if workers:
        deadline = time.monotonic() + 20
        while not is_gone(process.pid):
            assert time.monotonic() < deadline, "a worker goes on alone"
            time.sleep(0.01)


def is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False
