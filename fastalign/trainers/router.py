"""The load-balancing loss of a mixture of experts beside a trainer's own."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.types import LossOutput, Metric


def with_router_loss(
    output: LossOutput, aux_loss: Tensor, coef: float, *, items: int, num_items: int | Tensor | None
) -> LossOutput:
    """`output` plus coef·aux_loss, weighted by the batch's share of the optimizer step's items; metric `aux_loss`.

    aux_loss: 0-dim, a mean over the tokens of this batch. items: those of this batch; num_items: of the step, None for
    this batch alone. Over the micro-batches of a step the weights add up to coef.
    """
    share = 1.0 if num_items is None else items / num_items
    count = torch.full_like(aux_loss.detach(), items)
    metrics = output.metrics | {"aux_loss": Metric(aux_loss.detach() * count, count)}
    return LossOutput(output.loss + coef * share * aux_loss.to(output.loss.device), metrics)
