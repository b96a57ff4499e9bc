"""SIGTERM, Ctrl-C and kill -9 to some of several processes: nothing hangs, and what was saved is gone on from."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import TrainerCallback

from fastalign.trainers.checkpoint_files import UNFINISHED, check, checkpoints

HERE = Path(__file__)
ENDLESS = 100_000

pytestmark = pytest.mark.long  # half a minute each


class Begun(TrainerCallback):
    """Says in a file that so many steps are done."""

    def __init__(self, file: Path, steps: int) -> None:
        self.file, self.steps = file, steps

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.steps:
            self.file.touch()


def run(kit, conftest, folder, max_steps=ENDLESS, resume=False, **settings) -> int:
    """A run that ends when it is told to; the step it came to."""
    kit.folder = folder = Path(folder)
    defaults = {
        "max_steps": max_steps, "num_train_epochs": 1, "save_strategy": "steps", "save_steps": ENDLESS,
        "optim": "adamw_torch", "per_device_train_batch_size": 2, "ddp_backend": "gloo", "logging_steps": 10,
        "lr_scheduler_type": "constant", "learning_rate": 1e-3,
    }  # fmt: skip
    begun = Begun(folder / f"begun_{os.environ['RANK']}", 3)
    trainer = kit.trainer(kit.model(), kit.pairs(32), callbacks=[begun], **(defaults | settings))
    trainer.train(resume_from_checkpoint=resume)
    return trainer.state.global_step


def wait_until(condition, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def both_begun(folder: Path) -> bool:
    return all((folder / f"begun_{rank}").exists() for rank in range(2))


def only_checkpoint(folder: Path) -> int:
    """The step of the one checkpoint there is, which is whole."""
    (found,) = checkpoints(folder / "out")
    check(found)
    assert not (folder / "out" / UNFINISHED).exists()
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in found.iterdir()}
    return int(found.name.split("-")[1])


def goes_on(processes, folder: Path, step: int, **settings) -> None:
    arguments = {"folder": folder, "resume": True, "max_steps": step + 2, **settings}
    assert processes.results([(HERE, "run", arguments)]) == [[step + 2]] * 2


@pytest.mark.parametrize("settings", [{}, {"fsdp": True}], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("told", [[1], [0, 1]], ids=["one of them", "both"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"])
def test_all_save_once_and_exit(processes, tmp_path, settings, told, number, code):
    started = processes.start([(HERE, "run", {"folder": tmp_path, **settings})])
    wait_until(lambda: both_begun(tmp_path) or not all(p.is_alive() for p in started))
    for rank in told:
        os.kill(started[rank].pid, number)
    assert processes.wait(started, 120) == [code, code], processes.errors()
    step = only_checkpoint(tmp_path)
    assert 3 <= step < ENDLESS
    goes_on(processes, tmp_path, step, **settings)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"])
def test_torchrun_is_told_and_its_processes_save(processes, tmp_path, number, code):
    """torchrun hands the signal on, and waits for 30 seconds before it kills."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        HERE.with_name("stopping_worker.py"), tmp_path, json.dumps({"folder": str(tmp_path)}),
    ]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(tmp_path / "errors", "w") as errors:
        parent = subprocess.Popen(
            list(map(str, command)), env=env, stdout=subprocess.DEVNULL, stderr=errors,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored in the background
        )  # fmt: skip
        try:
            wait_until(lambda: both_begun(tmp_path) or parent.poll() is not None)
            parent.send_signal(number)
            parent.wait(60)
        finally:
            parent.kill()
    text = (tmp_path / "errors").read_text()[-3000:]
    ends = [(tmp_path / f"exit_{rank}") for rank in range(2)]
    assert all(end.exists() for end in ends), text
    found = [tuple(map(int, end.read_text().split())) for end in ends]
    assert [exit_code for exit_code, _ in found] == [code, code], text
    assert parent.returncode != 0
    for _, pid in found:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    goes_on(processes, tmp_path, only_checkpoint(tmp_path))


@pytest.mark.parametrize("settings", [{}, {"fsdp": True}], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("killed", [0, 1])
def test_one_is_killed_while_they_save(processes, tmp_path, settings, killed):
    """The other one does not wait for it for ever, and what was saved before is what the run goes on from."""
    saving = {"save_steps": 2, "save_total_limit": 2, **settings}
    started = processes.start([(HERE, "run", {"folder": tmp_path, **saving})])
    out = tmp_path / "out"
    wait_until(lambda: len(checkpoints(out)) == 2 or not all(p.is_alive() for p in started))
    before = int(checkpoints(out)[-1].name.split("-")[1])
    wait_until(lambda: (out / UNFINISHED).exists() or not all(p.is_alive() for p in started))
    started[killed].kill()
    codes = processes.wait(started, 120)
    assert codes[killed] == -signal.SIGKILL, processes.errors()
    assert codes[1 - killed] not in (0, None), processes.errors()
    whole = checkpoints(out)
    for folder in whole:
        check(folder)
    last = int(whole[-1].name.split("-")[1])
    assert last >= before
    goes_on(processes, tmp_path, last, **saving)
