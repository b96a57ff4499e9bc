"""What the terminal shows while the demonstration works: one bar a phase, and no one else's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging

Step = Callable[[str], None]
"""Called after each step, with what is to stand beside the bar."""


@contextmanager
def step_bar(console: Console, name: str, steps: int) -> Iterator[Step]:
    """A bar of `steps` steps with the time left, gone when it is done. Nothing is shown where there is no terminal."""
    columns = (
        TextColumn(f"{name:10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=steps, note="")
        yield lambda note: progress.update(task, advance=1, note=note)


@contextmanager
def no_library_bars() -> Iterator[None]:
    """Without transformers' bars for loading and saving, which take no time with a model this small."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
