"""Log-probs of a batch under a model, on the device: what a live reference and KTO's KL are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastalign.models import Head
from fastalign.ops import linear_logps
from fastalign.trainers.batches import Batch
from fastalign.trainers.config import TrainerConfig


def batch_logps(model: nn.Module, batch: Batch, args: TrainerConfig) -> Tensor:
    """(S, T) float32 log-probs of a padded batch's targets, 0 where there is none. model: fused; one forward."""
    rows = host_rows(batch)

    def head_fn(hidden: Tensor, head: Head) -> Tensor:
        targets = batch["targets"].to(hidden.device)
        options: dict[str, Any] = {"backend": args.backend, "workspace_mb": args.workspace_mb, **head.options}
        return linear_logps(hidden, head.weight, targets, rows=rows, **options).logps

    return model(input_ids=batch["input_ids"], head_fn=head_fn).float()


def host_rows(batch: Batch) -> Tensor:
    """(n,) int64 on the host: flat positions of the targets that count."""
    return torch.from_numpy(np.asarray(batch["rows"]))


def at_rows(values: Tensor, batch: Batch) -> Tensor:
    """(S, T) to (n,): the values where targets count, in the order of the rows."""
    return values.flatten().index_select(0, host_rows(batch).to(values.device, non_blocking=True))


def from_rows(values: Tensor, batch: Batch) -> Tensor:
    """(n,) to (S, T): the inverse of `at_rows`, 0 elsewhere."""
    flat = values.new_zeros(batch["targets"].numel())
    flat = flat.index_copy(0, host_rows(batch).to(values.device, non_blocking=True), values)
    return flat.view(batch["targets"].shape)
