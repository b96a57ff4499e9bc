"""One optimizer step of a run, recorded: what it allocates, when, and what it computes."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig

from fastalign.models.layouts import TokenLayout, plan_layout, run_layout
from fastalign.models.scalar import scalar_head
from fastalign.ops.schedule import Plan
from fastalign.planning.head import HeadSettings, PlannedHead
from fastalign.planning.models import ModelSettings, materialise, meta_model, nothing_packed, prepare
from fastalign.planning.recorder import BACKWARD, END_OF_PASS, FORWARD, KERNELS, WEIGHTS, Event, Recorder

Batch = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """A torch optimizer: its class and keyword arguments, and the norm that gradients are clipped to (0: not)."""

    cls: type[torch.optim.Optimizer]
    kwargs: dict[str, Any] = field(default_factory=dict)
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class StepRecord:
    """Events of the model's making, of a first step and of a later one, which ends as it began; names of storages.

    trainable, parameters   numbers
    flops       of the later step's passes, by phase: forward, backward (recomputed forwards included), head
    plans       of the head, one a pass
    tokens      of the passes: padded, real and computed
    narrow      16-bit matrix products of different shapes, by the phase that each was first in
    peaks       most bytes of tensors alive in each part of the later step, where it has parts
    """

    start: list[Event]
    first: list[Event]
    later: list[Event]
    names: list[str]
    parameters: int
    trainable: int
    flops: Counter[str]
    plans: list[Plan]
    tokens: dict[str, int]
    narrow: Counter[str] = field(default_factory=Counter)
    peaks: dict[str, int] = field(default_factory=dict)

    def events(self, steps: int) -> list[Event]:
        """Of a run of `steps` ≥ 2 steps: the later one repeated."""
        return [*self.start, *self.first, *self.later * (steps - 1)]


def record_step(
    config: PretrainedConfig,
    pieces: Sequence[Batch],
    *,
    model: ModelSettings,
    head: HeadSettings,
    optimizer: OptimizerSettings,
    autocast: torch.dtype | None = None,
) -> StepRecord:
    """Record steps whose passes are `pieces`, one after the other, on tensors without memory.

    pieces: padded batches as fastalign.data's collators make them, on the host.
    autocast: the dtype that passes compute in over wider weights.

    Raises ValueError: see `meta_model`; an optimizer that does not run without memory.
    """
    made = meta_model(config, model)
    with recording(head.device_type) as recorder:
        place(made, model, recorder)
        steps = Steps(made, model, recorder, PlannedHead(head, recorder), optimizer, autocast)
        return record_twice(steps, lambda: steps.run(pieces), count_tokens(pieces, model.layout))


@contextlib.contextmanager
def recording(device_type: str) -> Iterator[Recorder]:
    """Inside, tensors have no memory, and what they would take on "cpu" or "cuda" is recorded."""
    kernels = KERNELS if device_type == "cpu" else 0
    log = logging.getLogger("fastalign.models")  # which would tell of the kernels of a CPU
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Recorder(kernels) as recorder, torch.device("cpu"):
            yield recorder
    finally:
        log.setLevel(level)


def place(made: nn.Module, settings: ModelSettings, recorder: Recorder, name: str = WEIGHTS) -> None:
    """Give a meta model its fake weights, under a name, and prepare it as a trainer does."""
    with recorder.phase(name):
        materialise(made)
    if settings.adapter is not None and name == WEIGHTS:
        recorder.rename((p for p in made.parameters() if p.requires_grad), "adapter")
    prepare(made, settings)


def record_twice(steps: Steps, run: Callable[[], None], tokens: dict[str, int]) -> StepRecord:
    """The record of a first step and of a later one."""
    recorder = steps.recorder
    start = len(recorder.events)
    run()
    first = len(recorder.events)
    recorder.flops.clear()
    steps.planned.plans.clear()
    run()
    later = len(recorder.events)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in steps.model.parameters()]
    return StepRecord(
        start=recorder.events[:start], first=recorder.events[start:first], later=recorder.events[first:later],
        names=recorder.names, parameters=sum(size for size, _ in sizes),
        trainable=sum(size for size, trains in sizes if trains), flops=recorder.flops,
        plans=list(steps.planned.plans), tokens=tokens, narrow=Counter(recorder.narrow.values()),
    )  # fmt: skip


def count_tokens(pieces: Iterable[Batch], layout: str) -> dict[str, int]:
    """Tokens of the batches as they are padded, as they are, and as the layout computes them; and scored ones."""
    total: Counter[str] = Counter()
    for piece in pieces:
        planned = plan_layout(piece, layout)
        padded, real = piece["input_ids"].numel(), int(np.sum(piece["lengths"]))
        total.update(
            padded=padded,
            real=real,
            computed=padded if planned is None else planned.computed,
            scored=len(piece["rows"]),
        )
    return dict(total)


class Steps:
    """Runs optimizer steps as the trainers do."""

    def __init__(
        self, model: nn.Module, settings: ModelSettings, recorder: Recorder, planned: PlannedHead,
        optimizer: OptimizerSettings, autocast: torch.dtype | None,
    ) -> None:  # fmt: skip
        self.model, self.settings, self.recorder, self.planned = model, settings, recorder, planned
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.max_grad_norm = optimizer.max_grad_norm
        self.autocast = autocast
        self.optimizer = optimizer.cls(self.trainable, **optimizer.kwargs)

    def run(self, pieces: Sequence[Batch]) -> None:
        for piece in pieces:
            self._pass(piece)
        with self.recorder.phase("optimizer"):
            if self.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(self.trainable, self.max_grad_norm)
            try:
                self.optimizer.step()
            except (RuntimeError, TypeError, NotImplementedError) as error:
                name = type(self.optimizer).__name__
                raise ValueError(f"{name} does not run without memory, so it cannot be planned: {error}") from error
            self.optimizer.zero_grad()
        self.recorder.mark(END_OF_PASS)

    def _pass(self, piece: Batch) -> None:
        recorder, compute = self.recorder, contextlib.nullcontext()
        if self.autocast is not None:
            compute = torch.autocast("cpu", dtype=self.autocast)  # type: ignore[assignment]
        with recorder.phase("batch"):
            batch = on_device(piece)
        recorder.mark(FORWARD)
        with recorder.phase("forward"), compute, nothing_packed():
            loss = self.loss(batch, plan_layout(piece, self.settings.layout), largest_group(piece))
        recorder.mark(BACKWARD)
        with recorder.phase("backward"), nothing_packed():
            loss.backward()
        del loss
        recorder.rename((p.grad for p in self.trainable if p.grad is not None), "gradients")
        recorder.mark(END_OF_PASS)

    def loss(self, batch: Batch, layout: TokenLayout | None, group_rows: int) -> Tensor:
        """0-dim, of a pass. group_rows: scored rows of the largest group."""
        head_fn = scores_of(self.model) if self.settings.scalar else self.planned(group_rows)
        loss: Tensor = run_layout(self.model, batch, layout, head_fn)
        return loss


def scores_of(model: nn.Module) -> Callable[[Tensor, Any], Tensor]:
    """`head_fn` of a scalar model without numbers: from hidden (n, H) to the sum of its scores."""
    linear = scalar_head(model)

    def head_fn(hidden: Tensor, head: Any) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return nn.functional.linear(hidden.float(), linear.weight.float()).sum()

    return head_fn


def on_device(piece: Batch) -> dict[str, Any]:
    """A batch whose tensors have no memory."""
    return {
        name: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value
        for name, value in piece.items()
    }


def largest_group(piece: Batch) -> int:
    """Scored rows of the example that has most of them."""
    counts = np.diff(np.asarray(piece["cu_seqlens"]))
    return int(np.bincount(np.asarray(piece["groups"]), weights=counts).max(initial=1))
