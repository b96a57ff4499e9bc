"""Counts what the tests of this folder injected and what came of it; the last lines of a run say so."""

from __future__ import annotations

from collections import Counter

import pytest

COUNTS: Counter[str] = Counter()
NAMES = ("kills survived", "corruptions found", "disks filled", "bad inputs refused", "numbers lost")


@pytest.fixture(scope="session")
def tally() -> Counter[str]:
    """tally["kills survived"] += 1; names as in NAMES, others come after them."""
    return COUNTS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not COUNTS:
        return
    names = [*(name for name in NAMES if COUNTS[name] or name == "numbers lost"), *sorted(COUNTS.keys() - set(NAMES))]
    terminalreporter.section("faults injected")
    terminalreporter.write_line(", ".join(f"{name}: {COUNTS[name]}" for name in names))
