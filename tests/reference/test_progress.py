from __future__ import annotations

import io
import logging
import time

import pytest
from rich.console import Console

from fastalign.reference import progress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_lines_in_the_log_with_the_time_left(clock, monkeypatch, caplog):
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=io.StringIO(), force_terminal=False))
    with caplog.at_level(logging.INFO, progress.__name__), progress.track(1000, "log-probs") as advance:
        for _ in range(8):
            clock[0] += 10
            advance(100, 2)
    assert [record.getMessage() for record in caplog.records] == [
        "log-probs: 6 rows, 30%, 10 tokens/s, 70 s left",
        "log-probs: 12 rows, 60%, 10 tokens/s, 40 s left",
    ]


def test_a_bar_on_a_terminal(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=150))
    with progress.track(1000, "log-probs") as advance:
        advance(500, 1234)
        advance(500, 1)
    shown = screen.getvalue()
    assert "log-probs" in shown
    assert "1,235 rows" in shown
    assert "100%" in shown
    assert "tokens/s" in shown


def test_nothing_when_not_wanted(monkeypatch, caplog, clock):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=screen, force_terminal=True))
    with caplog.at_level(logging.INFO), progress.track(10, "log-probs", shown=False) as advance:
        clock[0] += 100
        advance(10, 1)
    assert screen.getvalue() == ""
    assert caplog.records == []
