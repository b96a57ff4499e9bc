"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import os
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
