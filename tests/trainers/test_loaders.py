"""Loaders are let go, and their workers obey the process they work for alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from torch.utils.data import DataLoader

from fastalign.trainers.loaders import obeying


def test_evaluations_leave_no_loader_behind(kit):
    trainer = kit.sft(evaluation=kit.sequences(4, seed=1), max_steps=1)
    trainer.train()
    before = len(trainer.accelerator._dataloaders)
    for _ in range(3):
        trainer.evaluate()
        trainer.evaluate(kit.sequences(4, seed=2))
    assert len(trainer.accelerator._dataloaders) == before == 1


def own_pid(examples: list[int]) -> int:
    return os.getpid()


def started(worker: int) -> None:
    assert worker in (0, 1)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="who sent a signal is not known here")
def test_workers_end_when_their_process_says_so(python_signals):
    loader = DataLoader(range(400), batch_size=1, collate_fn=own_pid, num_workers=2, worker_init_fn=obeying(started))
    batches = iter(loader)
    workers = {next(batches) for _ in range(10)}
    assert len(workers) == 2
    for name in ("TERM", "INT"):  # of another process, as of whoever ends a group
        subprocess.run(["kill", f"-{name}", *map(str, workers)], check=True)
    time.sleep(0.1)
    assert {next(batches) for _ in range(200)} == workers
    for worker in multiprocessing.active_children():
        if worker.pid in workers:
            worker.terminate()  # as a loader ends those that do not answer
            worker.join(20)
            assert worker.exitcode == 0
            workers.remove(worker.pid)
    assert not workers


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_without_a_parent_there_is_nobody_to_obey():
    """In a process that multiprocessing has not made, the rest is done all the same."""
    seen = []
    before = signal.getsignal(signal.SIGINT)
    try:
        obeying(seen.append)(3)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [3]
