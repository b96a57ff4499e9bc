"""The fused head as its planner describes it: a function of hidden states that allocates what the real one does.

The real head runs inside custom operators and on host arrays, which tensors without memory do not reach. Its plan
(`fastalign.ops.plan`) says exactly what it takes, and when: workspace, gradients, float32 accumulators, what is kept
from forward to backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastalign.models import Head
from fastalign.ops.schedule import DEFAULT_WORKSPACE_MB, Kernels, Plan, plan
from fastalign.planning.recorder import Recorder


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """How the loss runs the head.

    streamed        whether the loss is a sum over groups; by_token: groups are single tokens instead of examples
    device_type     "cpu" or "cuda", of the run that is planned
    workspace_mb    None: the default of the device
    schedule, workspace_mb as in fastalign.linear_logps
    """

    device_type: str
    streamed: bool = True
    by_token: bool = False
    workspace_mb: float | None = None
    schedule: str = "auto"


class Workspace:
    """The workspace of a process. On the CPU it waits for the next call."""

    def __init__(self, device_type: str) -> None:
        self._keeps = device_type == "cpu"
        self._idle: Tensor | None = None

    def take(self, size: int) -> None:
        """Take it, and give it back as the engine does."""
        if self._idle is None or not self._idle.nbytes // 2 <= size <= self._idle.nbytes:
            self._idle = None
            self._idle = torch.empty(max(size, 1), dtype=torch.uint8)
        if not self._keeps or size > DEFAULT_WORKSPACE_MB["cpu"] * 2**20:
            self._idle = None


class PlannedHead:
    """`head_fn` of a fused model: from hidden (n, H) to a 0-dim loss. `plans` are those of the calls so far."""

    def __init__(self, settings: HeadSettings, recorder: Recorder, workspace: Workspace | None = None) -> None:
        self.settings, self.recorder = settings, recorder
        self.plans: list[Plan] = []
        self.workspace = workspace or Workspace(settings.device_type)

    def __call__(self, group_rows: int) -> Callable[[Tensor, Head], Tensor]:
        """group_rows: scored rows of the largest group."""

        def head_fn(hidden: Tensor, head: Head) -> Tensor:
            found = self.plan(hidden, head, group_rows)
            self.plans.append(found)
            loss = _PlannedLoss.apply(hidden, head.weight, head.bias, found, self)
            assert isinstance(loss, Tensor)
            return loss

        return head_fn

    def plan(self, hidden: Tensor, head: Head, group_rows: int) -> Plan:
        settings = self.settings
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        needs = [
            torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, head.weight, head.bias)
        ]
        megabytes = settings.workspace_mb
        served = settings.device_type != "cpu" and dtype == head.weight.dtype and dtype.itemsize == 2
        return plan(
            hidden.shape[0], hidden.shape[1], head.weight.shape[0], dtype=dtype, weight_dtype=head.weight.dtype,
            device_type=settings.device_type, needs=(needs[0], needs[1], needs[2]),
            group_rows=(1 if settings.by_token else group_rows) if settings.streamed else None,
            workspace_bytes=None if megabytes is None else int(megabytes * 2**20), schedule=settings.schedule,
            kernels=Kernels(forward=True, exponentials=True) if served else None,
        )  # fmt: skip

    def count(self, found: Plan, gemms: float, hidden_size: int, vocab: int) -> None:
        self.recorder.flops["head"] += int(gemms * 2 * found.n * hidden_size * vocab)


class _PlannedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, found: Plan, owner: PlannedHead
    ) -> Tensor:
        shapes = [(t.shape, t.dtype) if t is not None and n else None for t, n in zip(
            (hidden, weight, bias), ctx.needs_input_grad, strict=False)]  # fmt: skip
        ctx.found, ctx.owner, ctx.shapes, ctx.kept = found, owner, shapes, []
        with owner.recorder.phase("head"):
            owner.count(found, found.gemms, weight.shape[1], weight.shape[0])
            if found.schedule == "streamed":
                ctx.kept = _gradients(shapes, torch.float32 if found.accumulator_bytes else None)
            elif found.overlaid_rows:
                ctx.kept = _gradients([None, shapes[1], None], None)
            if found.saved_bytes:
                ctx.saved = torch.empty(found.saved_bytes, dtype=torch.uint8)
            owner.workspace.take(found.workspace_bytes)
        return torch.zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        found, owner, shapes = ctx.found, ctx.owner, ctx.shapes
        with owner.recorder.phase("head"):
            grads, ctx.kept = ctx.kept, None
            if found.schedule != "streamed":
                if not found.overlaid_rows:
                    grads = _gradients(shapes, None)
                else:
                    grads = [
                        grads[1] if i == 1 else g for i, g in enumerate(_gradients([shapes[0], None, shapes[2]], None))
                    ]
                accumulators = torch.empty(max(found.accumulator_bytes, 1), dtype=torch.uint8)
                if found.schedule != "frozen":
                    owner.workspace.take(found.workspace_bytes)
                del accumulators
            ctx.saved = None
            results = []
            for number, shape in enumerate(shapes):
                grad, grads[number] = grads[number], None
                results.append(None if shape is None else grad.to(shape[1]))
                del grad
        return (*results, None, None)


def _gradients(shapes: list[Any], dtype: torch.dtype | None) -> list[Tensor | None]:
    """Buffers of the shapes, at least `dtype` wide where one is given."""
    return [
        None if shape is None
        else torch.empty(shape[0], dtype=shape[1] if dtype is None else torch.promote_types(shape[1], dtype))
        for shape in shapes
    ]  # fmt: skip
