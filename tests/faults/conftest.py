"""Counts what was injected and what came of it, here and in tests/fuzz; the last lines of a run say so."""

from __future__ import annotations

from collections import Counter

import pytest

COUNTS: Counter[str] = Counter()  # of the test that runs
NAMES = ("kills survived", "corruptions found", "disks filled", "bad inputs refused", "numbers lost")


@pytest.fixture(scope="session")
def tally() -> Counter[str]:
    """tally["kills survived"] += 1; a name of NAMES."""
    return COUNTS


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Counts travel with a test's reports, from the processes of pytest-xdist too."""
    item.user_properties.extend(COUNTS.items())
    COUNTS.clear()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "teardown":
                found.update({name: count for name, count in report.user_properties if name in NAMES})
    if found:
        shown = [name for name in NAMES if found[name] or name == "numbers lost"]
        terminalreporter.section("faults injected")
        terminalreporter.write_line(", ".join(f"{name}: {found[name]}" for name in shown))
