"""A step that cannot be trusted: a loss or a gradient that is not finite, or far from what it was. It is stopped at,
or left out, before the optimizer sees it, and the rows it came from are written down.

    step is bad   the loss or the gradient's norm is nan or infinite; or the norm is above `grad_norm_limit`; or the
                  loss is above  median + loss_spike·max(1.4826·MAD, 0.01·|median|)  of the last steps that were good
                  (of 100, once there are 20)

The judgement is made from numbers of all processes, so that all of them take the same decision. It costs one transfer
to the host a step, as transformers' own look for a loss that is not a number does.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECORD = "bad_steps.jsonl"
ACTIONS = ("stop", "skip", "ignore")

_WINDOW, _ENOUGH = 100, 20
_NORMAL = 1.4826  # a median absolute deviation of a normal distribution times this is its standard deviation


class BadStepError(RuntimeError):
    """A step was bad and the run is to stop; its weights are those before the step."""


@dataclass
class StepGuard:
    """Judges the steps of a run.

    action            "stop": `BadStepError`; "skip": the step is left out; "ignore": nothing is looked at
    grad_norm_limit   a gradient's norm above it (before clipping) is bad; None: any finite one is good
    loss_spike        how many deviations above its recent median a loss may be; None: any finite one is good

    Raises ValueError for settings that cannot be.
    """

    action: str = "stop"
    grad_norm_limit: float | None = None
    loss_spike: float | None = None
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    skipped: int = 0

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"on_bad_step must be one of {', '.join(ACTIONS)}, got {self.action!r}")
        for name in ("grad_norm_limit", "loss_spike"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a positive number, got {value}")
            if value is not None and self.action == "ignore":
                raise ValueError(f"{name}={value} needs on_bad_step='stop' or 'skip', got 'ignore'")

    def judge(self, loss: float, grad_norm: float | None) -> str | None:
        """Why a step is bad, None for a good one, whose loss is remembered. grad_norm: None where it is not looked at
        (a scaler of float16 gradients does that itself)."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if grad_norm is not None and not math.isfinite(grad_norm):
            return f"the norm of the gradient is {grad_norm}"
        if grad_norm is not None and self.grad_norm_limit is not None and grad_norm > self.grad_norm_limit:
            return f"the norm of the gradient is {grad_norm:g}, grad_norm_limit={self.grad_norm_limit:g}"
        if self.loss_spike is not None and len(self.losses) >= _ENOUGH:
            middle = statistics.median(self.losses)
            spread = max(_NORMAL * statistics.median(abs(value - middle) for value in self.losses), 0.01 * abs(middle))
            if loss > middle + self.loss_spike * spread:
                return (
                    f"the loss is {loss:g}, that of the last {len(self.losses)} steps {middle:g} ± {spread:g}, "
                    f"loss_spike={self.loss_spike:g}"
                )
        self.losses.append(loss)
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to judge as this one would."""
        return {"losses": list(self.losses), "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses = deque(state["losses"], maxlen=_WINDOW)
        self.skipped = int(state["skipped"])


@dataclass(frozen=True)
class BadStep:
    """What is written down of a bad step: one line of JSON in `bad_steps.jsonl`.

    rows: the data set's rows of the step, of all processes; suspects: those of the parts of it whose loss is not finite
    or is the largest; processes: the suspects by the number of the process that had them. None where the data have no
    row numbers.
    """

    step: int
    reason: str
    action: str
    loss: float
    grad_norm: float | None
    rows: list[int] | None
    suspects: list[int] | None
    processes: dict[int, list[int]] | None = None

    def write(self, folder: Path) -> Path:
        """Append to the record in a folder; returns its path."""
        path = folder / RECORD
        folder.mkdir(parents=True, exist_ok=True)
        facts = {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value  # JSON knows no nan
            for name, value in vars(self).items()
        }
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")
        return path

    def __str__(self) -> str:
        rows = self.suspects if self.suspects is not None else []
        shown = ", ".join(map(str, rows[:8])) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        numbers = sorted(self.processes or {})
        where = f" in process {', '.join(map(str, numbers))}" if numbers and numbers != [0] else ""
        return f"step {self.step}: {self.reason}" + (f"; rows {shown}{where}" if rows else "")


def suspects(parts: list[tuple[int, list[int], float]]) -> dict[int, list[int]]:
    """Of (process, rows, loss) parts of a step, the rows of those whose loss is not finite, or else of the largest one,
    by process."""
    wrong = [part for part in parts if not math.isfinite(part[2])]
    if not wrong and parts:
        wrong = [max(parts, key=lambda part: part[2])]
    found: dict[int, set[int]] = {}
    for process, rows, _ in wrong:
        found.setdefault(process, set()).update(rows)
    return {process: sorted(rows) for process, rows in sorted(found.items())}
