"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import socket
import tempfile
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]

# Triton reads TRITON_INTERPRET when a kernel is decorated, so interpreted kernels need a process of their own:
# TRITON_INTERPRET=1 pytest tests/kernels/interpreted
# Without it the same tests compile the kernels, for which they need a GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure(config: pytest.Config) -> None:
    from hypothesis import settings

    # A shared machine makes wall-clock deadlines flaky; in CI the same examples run every time.
    settings.register_profile("fastalign", deadline=None, derandomize="CI" in os.environ)
    settings.load_profile("fastalign")

    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a download
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "PYTEST_XDIST_WORKER" in os.environ:  # one core a worker: threads of two workers would fight for the same cores
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        import torch

        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not INTERPRETED and item.path.parent == REPOSITORY / "tests/kernels/interpreted":
            item.add_marker(pytest.mark.gpu)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_items:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """data/, models/ and golden/: real preferences, small checkpoints, figures of a peer. Not in the repository."""
    path = Path(os.environ.get("FASTALIGN_DATA") or REPOSITORY.parent / "shared")
    missing = [name for name in ("data", "models", "golden") if not (path / name).is_dir()]
    if missing:
        pytest.skip(
            f"{path} has no {', '.join(missing)}; set FASTALIGN_DATA to the folder of data/, models/ and golden/"
        )
    return path


@pytest.fixture(scope="session")
def forks() -> ForkServerContext:
    """Processes that start in milliseconds: their server has imported the trainers, and runs nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastalign.trainers", "fastalign.cli.dpo"])
    warm = context.Process(target=exec, args=("import fastalign.trainers", {}))
    warm.start()
    warm.join()
    assert warm.exitcode == 0
    return context


@pytest.fixture(scope="session")
def launch(forks):
    """launch(script, *arguments, processes=2): a script in so many processes at once, as torchrun starts them.

    Returns what each wrote to stdout. folder: that they work in; environment: variables beside this process's.
    """

    def launch(script: Path, *arguments: object, **given: Any) -> list[str]:
        return Processes(forks, script, *arguments, **given).wait()

    return launch


@pytest.fixture(scope="session")
def start(forks):
    """start(script, *arguments, processes=2): as `launch`, but what it returns has to be waited for: .wait()."""
    return functools.partial(Processes, forks)


class Processes:
    """A script in several processes, one core each. `wait`: whatever fails or hangs ends all of them."""

    def __init__(
        self, forks: ForkServerContext, script: Path, *arguments: object, processes: int = 2,
        folder: Path | None = None, environment: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        env = dict(os.environ) | (environment or {}) | {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name, f"{rank}.out") for rank in range(processes)]
        self._errors = [path.with_suffix(".err") for path in self._outputs]
        self._workers = []
        for rank, (output, errors) in enumerate(zip(self._outputs, self._errors, strict=True)):
            given = {
                "argv": [str(script), *map(str, arguments)], "output_path": str(output), "errors_path": str(errors),
                "folder": str(folder or Path.cwd()),
                "environment": env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            }  # fmt: skip
            target = str(REPOSITORY / "tests/forked.py")
            worker = forks.Process(target=runpy.run_path, args=(target,), kwargs={"init_globals": given})
            worker.start()
            self._workers.append(worker)

    def wait(self, timeout: float = 300) -> list[str]:
        """What each wrote to stdout. Raises AssertionError with what the first process to fail wrote last."""
        deadline = time.monotonic() + timeout
        try:
            while any(worker.is_alive() for worker in self._workers) and time.monotonic() < deadline:
                if any(worker.exitcode for worker in self._workers):
                    break
                multiprocessing.connection.wait([w.sentinel for w in self._workers if w.is_alive()], timeout=1)
            codes = [worker.exitcode for worker in self._workers]
            if any(code != 0 for code in codes):
                failed = next((rank for rank, code in enumerate(codes) if code), None)
                first = codes.index(None) if failed is None else failed
                words = self._errors[first].read_text(errors="replace")[-4000:]
                raise AssertionError(f"process {first} failed or hung ({codes}): {words}")
            return [path.read_text() for path in self._outputs]
        finally:
            for worker in self._workers:
                worker.kill()
                worker.join()
            self._folder.cleanup()


@pytest.fixture
def python_signals():
    """Python's own handlers, which a process started in the background of a script does not have for Ctrl-C."""
    ordinary = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    former = {number: signal.signal(number, handler) for number, handler in ordinary.items()}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)
