"""Before the first step: a policy that is its own reference must give the cached log-probs, and their loss."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from fastalign.losses import dpo_loss
from fastalign.models import Head
from fastalign.models.inference import evaluating
from fastalign.ops import linear_logps
from fastalign.trainers.batches import Batch, num_examples
from fastalign.trainers.reference import ReferenceMismatchError, compare_logps

logger = logging.getLogger(__name__)


def check_start(
    model: nn.Module, batch: Batch, examples: Dataset, dtype: torch.dtype, *, autocast: AbstractContextManager[Any],
    loss_fn: Callable[[nn.Module, Batch], Tensor], options: dict[str, Any],
) -> float:  # fmt: skip
    """Compare a policy with its own cached log-probs on a few pairs; returns the loss on them (log 2 for "sigmoid").

    model: fused, not wrapped. batch: collated examples. dtype: that of the computation. loss_fn(model, batch): the
    training loss. options: beta, loss_type, label_smoothing, length_alpha. Raises ReferenceMismatchError where
    log-probs or loss differ.
    """
    rows = torch.from_numpy(batch["rows"])

    def score(hidden: Tensor, head: Head) -> Tensor:
        targets = batch["targets"].to(hidden.device)
        return linear_logps(hidden, head.weight, targets, rows=rows, **head.options).logps.flatten()[rows]

    with torch.no_grad(), evaluating(model), autocast:
        fresh = model(input_ids=batch["input_ids"], head_fn=score).float().cpu().numpy()
        loss = float(loss_fn(model, batch))
    pairs, cuts = num_examples(batch), batch["cu_seqlens"][1:-1]
    turns = np.arange(2 * pairs).reshape(2, pairs).T.flatten()  # chosen, rejected, chosen, ...
    fresh_parts, cached_parts = (np.split(x, cuts) for x in (fresh, batch["ref_per_token_logps"].cpu().numpy()))
    worst = compare_logps(
        [fresh_parts[i] for i in turns],
        [cached_parts[i] for i in turns],
        dtype,
        "the policy, which is the reference",
        examples,
    )
    expected = loss_at_reference(batch, options)
    tolerance = (0.01 if dtype == torch.float32 else 0.1) * max(1.0, 10 * options["beta"]) * max(1.0, abs(expected))
    if not abs(loss - expected) <= tolerance:
        raise ReferenceMismatchError(
            f"before training the loss on {pairs} pairs is {loss:.6f}, and with the policy as its own reference it "
            f"must be {expected:.6f} (within {tolerance:g})"
        )
    logger.info(
        "before training: loss %.6f on %d pairs, %.6f where policy and reference agree; log-probs %.1e nats apart",
        loss, pairs, expected, worst,
    )  # fmt: skip
    return loss


def loss_at_reference(batch: Batch, options: dict[str, Any]) -> float:
    """The loss of a batch whose policy is the reference: log 2 for "sigmoid" without length_alpha."""
    chosen, rejected = batch["ref_logps"].cpu().chunk(2)
    lengths = torch.from_numpy(np.diff(batch["cu_seqlens"])).chunk(2)
    same = (chosen, rejected, chosen, rejected)
    return float(dpo_loss(*same, chosen_lengths=lengths[0], rejected_lengths=lengths[1], **options).loss)
