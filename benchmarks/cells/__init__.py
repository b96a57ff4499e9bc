"""The suite's cells. A kind of cells is a module here with `cells(device, small)` and `run(cell, tell, skip)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]
Tell = Callable[[str], None]  # which provider is at work, so that its end is put down to it


@dataclass(frozen=True)
class Cell:
    """One question, answered by rows that are measured together.

    module: what answers it. name: its key in the results. tier: the lowest comes first. settings: the module's own.
    seconds, gib: estimates of device time and device memory.
    """

    module: str
    name: str
    tier: int
    seconds: float
    gib: float
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def kind(self) -> str:
        return self.module.rpartition(".")[2]


class Fatal(Exception):
    """The device takes no more work of this process."""


def short(error: BaseException | str) -> str:
    """An error in a line that fits a table."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    return lines[0][:200]


def protected(call: Callable[[], Any]) -> str | None:
    """The error of a call, shortened; None where it went well. Memory of a call that ran out of it is given back."""
    import gc

    import torch

    try:
        call()
    except torch.OutOfMemoryError:
        error = "out of memory"
    except Exception as found:
        error = short(found)
        if "CUDA error" in str(found) or type(found).__name__ == "AcceleratorError":
            raise Fatal(error) from found
    else:
        return None
    if error == "out of memory" or torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
    return error
