"""A progress bar with the time left, on a terminal; lines in the log, elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

_LOG_SECONDS = 30.0

Advance = Callable[[int, int], None]


@contextmanager
def track(tokens: int, title: str, shown: bool = True) -> Iterator[Advance]:
    """Yields advance(tokens, rows), to be called with what was done; the work is measured in tokens."""
    console = Console(stderr=True)
    if not shown or not tokens:
        yield lambda tokens, rows: None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
            TextColumn("{task.fields[rows]:,} rows"), TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(), TextColumn("<"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(title, total=tokens, rows=0, rate="")
            start, rows_done, tokens_done = time.monotonic(), 0, 0

            def advance(tokens: int, rows: int) -> None:
                nonlocal rows_done, tokens_done
                rows_done, tokens_done = rows_done + rows, tokens_done + tokens
                rate = tokens_done / max(time.monotonic() - start, 1e-9)
                progress.update(task, advance=tokens, rows=rows_done, rate=f"{rate:,.0f} tokens/s")

            yield advance
    else:
        yield _log_lines(tokens, title)


def _log_lines(total: int, title: str) -> Advance:
    start = logged = time.monotonic()
    tokens_done = rows_done = 0

    def advance(tokens: int, rows: int) -> None:
        nonlocal logged, tokens_done, rows_done
        tokens_done, rows_done = tokens_done + tokens, rows_done + rows
        now = time.monotonic()
        if now - logged >= _LOG_SECONDS:
            logged = now
            rate = tokens_done / (now - start)
            left = (total - tokens_done) / rate
            logger.info(
                "%s: %d rows, %.0f%%, %.0f tokens/s, %.0f s left",
                title,
                rows_done,
                100 * tokens_done / total,
                rate,
                left,
            )

    return advance
