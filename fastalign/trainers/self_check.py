"""Before the first step: a policy that is its own reference must give the reference's log-probs, and their loss."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from fastalign.losses import dpo_loss, kto_loss, tail_mask, wpo_weights
from fastalign.models import Head
from fastalign.models.inference import evaluating
from fastalign.ops import linear_logps
from fastalign.trainers.batches import Batch
from fastalign.trainers.dpo_config import DPOConfig
from fastalign.trainers.loading import autocast_dtype
from fastalign.trainers.log_probs import host_rows
from fastalign.trainers.reference import Layout, ReferenceMismatchError, compare_logps
from fastalign.types import LossOutput

logger = logging.getLogger(__name__)


def check_start(
    model: nn.Module, parts: Sequence[Batch], examples: Dataset, layout: Layout, args: DPOConfig, *,
    autocast: AbstractContextManager[Any], loss_fn: Callable[[], LossOutput],
) -> float:  # fmt: skip
    """Compare a policy with its own log-probs as the reference, on a few examples; returns the loss on them.

    model: fused, not wrapped. parts: the collated examples, with reference log-probs; where they have mismatched
    responses, the batch of these too. loss_fn(): the training loss of the first part. Raises ReferenceMismatchError
    where log-probs or loss differ.
    """
    dtype = autocast_dtype(args) or next(p.dtype for p in model.parameters() if p.is_floating_point())
    with torch.no_grad(), evaluating(model), autocast:
        scored = [_score(model, part) for part in parts]
        loss = float(loss_fn().loss)
    cached = [part["ref_per_token_logps"].cpu().numpy() for part in parts]
    worst = compare_logps(
        _by_example([logps for logps, _ in scored], parts, examples),
        _by_example(cached, parts, examples),
        dtype,
        "the policy, which is the reference",
        examples,
        layout,
    )
    expected = loss_at_reference(parts[0], args, scored[0][1])
    tolerance = (0.01 if dtype == torch.float32 else 0.1) * max(1.0, 10 * args.beta) * max(1.0, abs(expected))
    if not abs(loss - expected) <= tolerance:
        raise ReferenceMismatchError(
            f"before training the loss on {len(examples)} {layout.unit}s is {loss:.6f}, and with the policy as its own "
            f"reference it must be {expected:.6f} (within {tolerance:g})"
        )
    logger.info(
        "before training: loss %.6f on %d %ss, %.6f where policy and reference agree; log-probs %.1e nats apart",
        loss, len(examples), layout.unit, expected, worst,
    )  # fmt: skip
    return loss


def loss_at_reference(batch: Batch, args: DPOConfig, log_sum_sq_probs: np.ndarray) -> float:
    """The loss of a batch whose policy is the reference: log 2 for "sigmoid" without length_alpha.

    log_sum_sq_probs: (n,) in the order of the rows, which WPO's weights need.
    """
    options, sums = args.loss_options(), batch["ref_logps"].cpu()
    if not args.on_pairs:
        kl = torch.zeros(()) if args.needs_kl else None  # of equal distributions
        return float(kto_loss(sums, sums, batch["labels"].cpu(), kl=kl, **options).loss)
    chosen, rejected = sums.chunk(2)
    cu_seqlens = torch.from_numpy(np.asarray(batch["cu_seqlens"]))
    lengths, logps = cu_seqlens.diff(), batch["ref_per_token_logps"].cpu()
    same = (chosen, rejected) * 2
    if args.ld_alpha is not None:
        options["tail_logps"] = _sums(logps * tail_mask(cu_seqlens), lengths).chunk(2) * 2
    if args.use_weighting:
        means = _sums(logps - torch.from_numpy(log_sum_sq_probs), lengths) / lengths
        options["weights"] = wpo_weights(*means.chunk(2))
    n_chosen, n_rejected = lengths.chunk(2)
    return float(dpo_loss(*same, chosen_lengths=n_chosen, rejected_lengths=n_rejected, **options).loss)


def _score(model: nn.Module, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs and log_sum_sq_probs, (n,) each, in the order of the rows."""
    rows = host_rows(batch)

    def head_fn(hidden: Tensor, head: Head) -> Tensor:
        targets = batch["targets"].to(hidden.device)
        out = linear_logps(hidden, head.weight, targets, rows=rows, log_sum_sq_probs=True, **head.options)
        assert out.log_sum_sq_probs is not None
        return torch.stack([values.flatten()[rows] for values in (out.logps, out.log_sum_sq_probs)])

    logps, log_sum_sq_probs = model(input_ids=batch["input_ids"], head_fn=head_fn).float().cpu().numpy()
    return logps, log_sum_sq_probs


def _by_example(values: Sequence[np.ndarray], parts: Sequence[Batch], examples: Dataset) -> list[np.ndarray]:
    """Values of the parts' rows, sequence by sequence: all of the first example, of the second, ..."""
    count = len(examples)
    sequences = [np.split(v, part["cu_seqlens"][1:-1]) for v, part in zip(values, parts, strict=True)]
    columns = [part[start : start + count] for part in sequences for start in range(0, len(part), count)]
    return [column[i] for i in range(count) for column in columns]


def _sums(values: Tensor, lengths: Tensor) -> Tensor:
    """(n,) values to the sum of each of the consecutive sequences."""
    return torch.stack([part.sum() for part in values.split(lengths.tolist())])
