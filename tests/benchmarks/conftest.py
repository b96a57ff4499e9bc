"""The benchmarks' modules, imported as their scripts import each other."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="session")
def bench(repository: Path) -> Iterator[Callable[[str], ModuleType]]:
    """bench("cells.store") -> the module."""
    folder = str(repository / "benchmarks")
    sys.path.insert(0, folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sizes are tiny
    yield importlib.import_module
    torch.set_num_threads(threads)
    sys.path.remove(folder)
