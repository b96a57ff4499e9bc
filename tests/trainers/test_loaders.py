"""Loaders are let go, and their workers obey the process they work for alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from peft import LoraConfig
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


# Two workers, an adapter with dropout, accumulation; and what puts batches together otherwise than by their number.
WORKERS = {
    "dataloader_num_workers": 2, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3,
    "optim": "adamw_torch", "learning_rate": 0.01, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0,
}  # fmt: skip
RUNS = {
    "dpo": lambda kit, rewards, lora: kit.trainer(
        kit.model(), kit.pairs(22), peft_config=lora, max_tokens_per_batch=150, **WORKERS
    ),
    "sft": lambda kit, rewards, lora: kit.sft(
        kit.model(), kit.sequences(60), peft_config=lora, packing=True, max_length=32, per_device_train_batch_size=2,
        **WORKERS,
    ),
    "reward": lambda kit, rewards, lora: rewards.trainer(
        rewards.model(), rewards.data("lists", 22), peft_config=lora, max_tokens_per_batch=100, **WORKERS
    ),
    "pro": lambda kit, rewards, lora: kit.pro(
        kit.model(), kit.lists(22), peft_config=lora, max_tokens_per_batch=200, micro_batch_tokens=60, **WORKERS
    ),
    "ppo": lambda kit, rewards, lora: kit.ppo(
        kit.model(initializer_range=0.05), train=kit.prompts(19), peft_config=lora, max_steps=5, save_steps=3,
        save_strategy="steps", dataloader_num_workers=2, gradient_accumulation_steps=2, per_device_train_batch_size=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["dpo", *(pytest.param(name, marks=pytest.mark.long) for name in list(RUNS)[1:])])
def test_a_run_with_workers_resumes_to_the_bit(kit, rewards, name):
    """From the middle of an epoch."""

    def make():
        lora = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_dropout=0.3)
        return RUNS[name](kit, rewards, lora)

    whole = make()
    whole.train()
    assert whole.state.global_step > 4
    resumed = make()
    resumed.train(resume_from_checkpoint=str(kit.folder / "out" / "checkpoint-3"))
    assert resumed.state.global_step == whole.state.global_step
    kit.assert_same(kit.weights(resumed), kit.weights(whole), rtol=0, atol=0)
    last, expected = kit.logs(resumed)[-1], kit.logs(whole)[-1]
    for key in expected.keys() - {"tokens_per_second", "eps"}:
        assert last[key] == expected[key], key
