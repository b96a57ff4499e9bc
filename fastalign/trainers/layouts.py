"""Which token layout a run takes, and what becomes of its tokens: see `fastalign.models.layouts`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastalign.models import disable_segments, enable_segments
from fastalign.models.attention import uses_segments
from fastalign.trainers.batches import Batch
from fastalign.trainers.config import TrainerConfig

logger = logging.getLogger(__name__)


def choose_layout(
    models: Sequence[nn.Module], args: TrainerConfig, *, counts_tokens: bool = False, only_padded: str = ""
) -> str:
    """The layout that args.token_layout asks for: "padded", "packed" or "shared"; models are prepared for it.

    models: those that run in the layout. counts_tokens: their loss counts every token (a router's), so that none may be
    left out and none shared. only_padded: why this run cannot have another layout, if so.

    Raises ValueError for a layout that is asked for by name and cannot be had.
    """
    wanted = args.token_layout
    if wanted == "padded":
        return wanted
    if wanted == "shared" and counts_tokens:
        raise ValueError(
            "token_layout='shared': the router's loss counts every token of every sequence, so none may be computed "
            "once for several; accepted are 'packed' and 'padded', or router_aux_loss_coef=0"
        )
    if not only_padded and wanted == "auto" and args.pad_to_multiple_of is not None:
        only_padded = f"pad_to_multiple_of={args.pad_to_multiple_of}"
    if only_padded:
        if wanted != "auto":
            raise ValueError(f"token_layout={wanted!r}: {only_padded}; accepted are 'auto' and 'padded'")
        logger.info("token layout: padded, because of %s", only_padded)
        return "padded"
    try:
        prepare_layout(models)
    except ValueError as error:
        if wanted != "auto":
            raise ValueError(f"token_layout={wanted!r}: {error}") from error
        logger.info("token layout: padded, because %s", error)
        return "padded"
    if wanted == "auto":
        wanted = "packed" if counts_tokens else "shared"
        logger.info("token layout: %s%s", wanted, ", as the router's loss counts every token" if counts_tokens else "")
    return wanted


def prepare_layout(models: Sequence[nn.Module]) -> None:
    """Let models take packed and shared batches, all of them or none: ValueError where one cannot."""
    fresh = [model for model in models if not uses_segments(model)]
    for number, model in enumerate(fresh):
        try:
            enable_segments(model)
        except ValueError:
            for done in fresh[:number]:
                disable_segments(done)
            raise


def scored_rows(batch: Batch, device: torch.device) -> dict[str, Any]:
    """How the hidden states (n, H) of a batch's rows go into a fused loss: targets (n,), rows, cu_seqlens."""
    return {
        "targets": row_targets(batch, device),
        "rows": torch.arange(len(batch["rows"])),  # on the host: all of them, which need not be found
        "cu_seqlens": torch.from_numpy(np.asarray(batch["cu_seqlens"])),
    }


def row_targets(batch: Batch, device: torch.device) -> Tensor:
    """(n,) int64, on `device`: the targets that count, in the order of the rows."""
    targets = batch["targets"]
    rows = torch.from_numpy(np.asarray(batch["rows"]))
    return targets.flatten().index_select(0, rows.to(targets.device, non_blocking=True)).to(device)


class TokenCounter:
    """What became of tokens: how many were seen, and of those that were trained on how many there are, how many went
    through the model for them, and how much of that was padding."""

    def __init__(self) -> None:
        self._counts = np.zeros(4)

    def add(self, useful: int, computed: int, padding: int, *, seen: int | None = None) -> None:
        """seen: by default the useful ones; another number where tokens are trained on several times."""
        self._counts += (useful if seen is None else seen, useful, computed, padding)

    def take(self) -> np.ndarray:
        """(4,) float64, since this was last asked."""
        counts, self._counts = self._counts, np.zeros(4)
        return counts


def throughput(counts: Sequence[float], seconds: float | None) -> dict[str, float]:
    """What is logged of a TokenCounter's counts, summed over processes.

    tokens_per_second   useful tokens: of the sequences as they are, without padding
    padding_waste       share of the computed tokens that is padding
    sharing_ratio       useful tokens for each computed one that is no padding: above 1 where prompts are shared
    """
    seen, useful, computed, padding = counts
    found = {} if seconds is None else {"tokens_per_second": seen / seconds}
    if computed > padding:
        found |= {"padding_waste": padding / computed, "sharing_ratio": useful / (computed - padding)}
    return found
