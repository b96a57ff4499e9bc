"""The guard of `fastalign.trainers.guards` in a trainer: what it is shown of a step, what follows from a bad one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from fastalign.trainers.batches import ROW_NUMBERS, Batch
from fastalign.trainers.guards import RECORD, BadStep, BadStepError, StepGuard, suspects
from fastalign.trainers.sharding import ShardingTrainer

logger = logging.get_logger(__name__)


class GuardedTrainer(ShardingTrainer):
    """A Trainer whose optimizer sees no step that `StepGuard` finds bad."""

    guard: StepGuard
    data_collator: Any
    _parts: list[tuple[list[int] | None, Tensor]]
    _norm: float | Tensor | None

    def _stand_guard(self) -> None:
        args = self.args
        self.guard = StepGuard(args.on_bad_step, args.grad_norm_limit, args.loss_spike)
        self._parts, self._norm = [], None
        if args.on_bad_step != "ignore":
            self.add_callback(_BeforeStep(self))

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: int | Tensor | None = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.show(inputs, loss)
        return loss

    def show(self, piece: Batch, loss: Tensor) -> None:
        """A piece of the step at hand, and its share of the loss."""
        if self.guard.action != "ignore" and self._counts:
            rows = piece.get(ROW_NUMBERS)
            self._parts.append((None if rows is None else np.asarray(rows).tolist(), loss.detach().float()))

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | Tensor | None = None) -> float | Tensor:
        self._norm = super()._get_grad_norm(model, grad_norm)
        return self._norm

    def admit(self, model: nn.Module) -> bool:
        """Whether the optimizer may take the step whose gradients are there; if it may not, they are gone.

        Raises BadStepError where a bad step ends the run.
        """
        parts, norm = self._parts, self._norm
        self._parts, self._norm = [], None
        if self.guard.action == "ignore":
            return True
        if norm is None:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
        loss, size = self._read(parts, norm)
        # with a scaler of float16 gradients infinite ones are ordinary: it leaves such steps out and scales less
        scaled = self.accelerator.scaler is not None
        reason = self.guard.judge(loss, None if scaled else size)
        if reason is None:
            return True
        bad = self._described(parts, reason, loss, size)
        path = Path(self.args.output_dir) / RECORD
        if self.is_world_process_zero():
            bad.write(path.parent)
        if self.guard.action == "stop":
            raise BadStepError(f"{bad}; {path} has the details, and the weights are those before the step")
        self.guard.skipped += 1
        logger.warning("%s; the step is left out, %d so far", bad, self.guard.skipped)
        for parameter in model.parameters():
            parameter.grad = None  # an optimizer passes over it: no moment moves and no weight decays
        return False

    def _read(self, parts: Sequence[tuple[Any, Tensor]], norm: float | Tensor) -> tuple[float, float]:
        """The loss of a step over all processes, and the norm of its gradient, which they share."""
        own = torch.stack([loss for _, loss in parts]).sum() if parts else torch.zeros((), device=self.args.device)
        loss = self._sum_over_processes(own.to(self.args.device)) / self.accelerator.num_processes
        full = getattr(norm, "full_tensor", None)  # of sharded gradients
        size = torch.as_tensor(norm if full is None else full(), device=self.args.device)
        found = torch.stack([loss.double(), size.double()]).tolist()
        return found[0], found[1]

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "sum") if self.accelerator.num_processes > 1 else tensor

    def _described(self, parts: Sequence[tuple[Any, Tensor]], reason: str, loss: float, norm: float) -> BadStep:
        """All processes take part: their rows are gathered."""
        own = [(self.args.process_index, rows, float(share)) for rows, share in parts]
        every = own if self.accelerator.num_processes == 1 else gather_object(own)
        known = [(process, rows, share) for process, rows, share in every if rows is not None]
        suspected = suspects(known)
        return BadStep(
            step=self.state.global_step + 1,
            reason=reason,
            action=self.guard.action,
            loss=loss,
            grad_norm=norm,
            rows=sorted({row for _, rows, _ in known for row in rows}) if known else None,
            suspects=sorted({row for rows in suspected.values() for row in rows}) if known else None,
            processes=suspected if known else None,
        )

    @contextlib.contextmanager
    def _numbering(self) -> Iterator[None]:
        """Data loaders made inside give batches their rows' numbers."""
        plain: Any = self.data_collator
        self.data_collator = _Numbering(plain)
        try:
            yield
        finally:
            self.data_collator = plain


class _BeforeStep(TrainerCallback):
    """Between gradients and optimizer."""

    def __init__(self, trainer: GuardedTrainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.admit(self._trainer.model)


class _Numbering:
    """A collator whose batches say which rows they are of, where examples do."""

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        self.collator = collator

    def __call__(self, examples: list[Any]) -> Any:
        batch = self.collator(examples)
        if isinstance(batch, dict) and all(isinstance(e, Mapping) and "row" in e for e in examples):
            batch[ROW_NUMBERS] = np.array([int(example["row"]) for example in examples])
        return batch
