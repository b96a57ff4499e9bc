"""Log-probs of a batch under a model, on the device: what a live reference and KTO's KL are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastalign.models import Head
from fastalign.models.layouts import plan_layout, run_layout
from fastalign.ops import linear_logps, sequence_logps
from fastalign.trainers.batches import Batch
from fastalign.trainers.config import TrainerConfig
from fastalign.trainers.layouts import row_targets


def batch_logps(model: nn.Module, batch: Batch, args: TrainerConfig, layout: str = "padded") -> Tensor:
    """(n,) float32 log-probs of a batch's targets, in the order of its rows. model: fused; one forward in `layout`."""

    def head_fn(hidden: Tensor, head: Head) -> Tensor:
        options: dict[str, Any] = {"backend": args.backend, "workspace_mb": args.workspace_mb, **head.options}
        rows = torch.arange(len(hidden))
        return linear_logps(hidden, head.weight, row_targets(batch, hidden.device), rows=rows, **options).logps

    return run_layout(model, batch, plan_layout(batch, layout), head_fn).float()


def sequence_sums(values: Tensor, batch: Batch) -> Tensor:
    """(n,) values at the rows to (S,) sums of each sequence."""
    return sequence_logps(values, cu_seqlens=torch.from_numpy(np.asarray(batch["cu_seqlens"])))


def host_rows(batch: Batch) -> Tensor:
    """(n,) int64 on the host: flat positions of the targets that count."""
    return torch.from_numpy(np.asarray(batch["rows"]))
