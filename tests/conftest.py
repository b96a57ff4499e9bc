"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
def launch():
    """launch(script, *arguments, processes=2): a script in so many processes at once, as torchrun starts them."""
    return launch_processes


def launch_processes(script: Path, *arguments: object, processes: int = 2, timeout: float = 300) -> None:
    """One core each. Whatever fails or hangs ends all of them; the error is what the first one to fail wrote last."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, str(script), *map(str, arguments)]
    with contextlib.ExitStack() as stack:
        # files, not pipes: a full pipe would stop a process while another one is waited for
        errors = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(processes)]
        workers = [
            subprocess.Popen(
                command, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.DEVNULL, stderr=errors[r]
            )
            for r in range(processes)
        ]
        stack.callback(lambda: [worker.kill() for worker in workers])
        deadline = time.monotonic() + timeout
        while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
            if any(worker.poll() for worker in workers):
                break
            time.sleep(0.1)
        codes = [worker.poll() for worker in workers]
        if any(code != 0 for code in codes):
            first = next((rank for rank, code in enumerate(codes) if code), codes.index(None) if None in codes else 0)
            errors[first].seek(0)
            raise AssertionError(f"process {first} failed or hung ({codes}): {errors[first].read()[-4000:]}")


@pytest.fixture
def python_signals():
    """Python's own handlers, which a process started in the background of a script does not have for Ctrl-C."""
    ordinary = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    former = {number: signal.signal(number, handler) for number, handler in ordinary.items()}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)
