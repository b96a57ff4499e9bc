"""The trainers' kit of models, data and trainers; processes that call functions of a test's file."""

import importlib.util
import runpy
import socket
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("worker.py")
spec = importlib.util.spec_from_file_location("kit", Path(__file__).parents[1] / "trainers/conftest.py")
trainers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(trainers)


@pytest.fixture
def kit(tmp_path):
    return trainers.Kit(tmp_path, trainers.make_tokenizer())


@pytest.fixture(scope="session")
def conftest():
    return trainers


class Processes:
    """Several processes with gloo, forked: `start` them, or take their `results`."""

    def __init__(self, forks: ForkServerContext, folder: Path) -> None:
        self.forks, self.folder, self._number = forks, folder, 0

    def start(self, calls: list[tuple[Path, str, dict[str, Any]]], processes: int = 2) -> list[BaseProcess]:
        """calls: functions, by file and name, and their arguments beside kit and conftest; one after the other."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._number += 1
        self.own = self.folder / f"processes-{self._number}"
        self.own.mkdir(parents=True)
        started = []
        for rank in range(processes):
            place = {
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes), "RANK": str(rank), "LOCAL_RANK": str(rank),
            }  # fmt: skip
            names = {"place": place, "folder": str(self.own), "calls": calls}
            process = self.forks.Process(
                target=runpy.run_path, args=(str(WORKER),), kwargs={"init_globals": names}, daemon=True
            )
            process.start()
            started.append(process)
        return started

    def wait(self, started: list[BaseProcess], seconds: float = 300) -> list[int]:
        """Exit codes. Whatever hangs is killed and named."""
        for process in started:
            process.join(seconds)
        hung = [rank for rank, process in enumerate(started) if process.exitcode is None]
        for process in started:
            process.kill()
            process.join()
        assert not hung, f"processes {hung} hang; {self.errors()}"
        return [int(process.exitcode) for process in started]

    def errors(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text()[-3000:]}" for path in sorted(self.own.glob("errors_*")))

    def results(self, calls: list[tuple[Path, str, dict[str, Any]]], processes: int = 2) -> list[list[Any]]:
        """What the calls gave, by process."""
        codes = self.wait(self.start(calls, processes))
        assert codes == [0] * processes, self.errors()
        return [torch.load(self.own / f"rank_{rank}.pt", weights_only=False) for rank in range(processes)]


@pytest.fixture(scope="module")
def processes(forks, tmp_path_factory):
    return Processes(forks, tmp_path_factory.mktemp("processes"))
