"""micro_batch_tokens="auto": a trainer's passes as large as the plan of its steps allows."""

from __future__ import annotations

import torch

from fastalign.planning import auto_micro_batch_tokens, memory_budget
from fastalign.trainers.base import FusedTrainer
from fastalign.trainers.run_plan import trainer_plan


def choose_size(trainer: FusedTrainer) -> tuple[int, int]:
    """(micro_batch_tokens, bytes of the budget that they were planned for).

    All processes of a run choose the same, from its settings, its data's lengths and its budget: nothing is measured.

    Raises ValueError: a model or an optimizer that cannot be planned, no budget, or one that the smallest pass exceeds.
    """
    try:
        plan = trainer_plan(trainer)
        budget = memory_budget(plan.device_type, trainer.args.memory_gb, _device_bytes(trainer))
        tokens, _ = auto_micro_batch_tokens(plan.plan, budget, largest=plan.batch_tokens)
    except ValueError as error:
        raise ValueError(f"micro_batch_tokens='auto': {error}") from error
    return tokens, budget


def _device_bytes(trainer: FusedTrainer) -> int | None:
    """All memory of the smallest GPU among the processes'."""
    device = trainer.args.device
    if device.type != "cuda":
        return None
    total = torch.tensor([torch.cuda.mem_get_info(device)[1]], device=device)
    return int(trainer.accelerator.gather(total).min())
