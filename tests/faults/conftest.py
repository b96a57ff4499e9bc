"""Counts what the tests of this folder injected and what came of it; the last lines of a run say so."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from multiprocessing.context import ForkServerContext

import pytest

COUNTS: Counter[str] = Counter()
NAMES = ("kills survived", "corruptions found", "disks filled", "bad inputs refused", "numbers lost")


@pytest.fixture(scope="session")
def tally() -> Counter[str]:
    """tally["kills survived"] += 1; names as in NAMES, others come after them."""
    return COUNTS


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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not COUNTS:
        return
    names = [*(name for name in NAMES if COUNTS[name] or name == "numbers lost"), *sorted(COUNTS.keys() - set(NAMES))]
    terminalreporter.section("faults injected")
    terminalreporter.write_line(", ".join(f"{name}: {COUNTS[name]}" for name in names))
