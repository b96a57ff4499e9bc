"""Rewards of whole sequences: a scalar model read at each sequence's last token, and what its scores are measured from.

Bradley–Terry determines a reward up to a constant, so a trained model may be given the mean of its scores on a
reference set (arXiv 2403.17031), and their standard deviation. They are one entry of its config.json,

    "fastalign_reward_normalization": {"mean": 0.7, "std": null}

so that they live as long as the model does. `score_sequences` applies them; plain transformers does not know them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from fastalign.models.batches import plan_batches
from fastalign.models.inference import inference
from fastalign.models.scalar import base_scalar_model, fuse_scalar_head, is_scalar_fused, unfuse_scalar_head

NORMALIZATION_KEY = "fastalign_reward_normalization"
DEFAULT_BATCH_TOKENS = 8192


class RewardNormalization(NamedTuple):
    """reward = (score − mean) / std;  std None divides by nothing."""

    mean: float
    std: float | None = None

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        shifted = scores.astype(np.float64) - self.mean
        return (shifted if self.std is None else shifted / self.std).astype(np.float32)


def reward_normalization(model: nn.Module) -> RewardNormalization | None:
    """What the model's config says, or None. Raises ValueError for an entry that is not of the documented form."""
    entry = getattr(base_scalar_model(model).config, NORMALIZATION_KEY, None)
    if entry is None:
        return None
    try:
        return _checked(RewardNormalization(**entry))
    except TypeError:
        raise ValueError(f'{NORMALIZATION_KEY}={entry!r} in the config; accepted is {{"mean", "std"}}') from None


def set_reward_normalization(model: nn.Module, normalization: RewardNormalization | None) -> None:
    """Write mean and standard deviation to the model's config, to be saved with it; None removes them.

    Raises ValueError for a mean that is not finite and a standard deviation that is not positive.
    """
    config = base_scalar_model(model).config
    if normalization is not None:
        setattr(config, NORMALIZATION_KEY, _checked(normalization)._asdict())
    elif hasattr(config, NORMALIZATION_KEY):
        delattr(config, NORMALIZATION_KEY)


def _checked(given: RewardNormalization) -> RewardNormalization:
    if not math.isfinite(given.mean):
        raise ValueError(f"the mean of the rewards is {given.mean}: it must be finite")
    if given.std is not None and not 0 < given.std < math.inf:
        raise ValueError(f"the standard deviation of the rewards is {given.std}: it must be positive and finite")
    return given


def score_sequences(
    model: nn.Module,
    sequences: Sequence[tuple[Sequence[int], int]],
    *,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    autocast: torch.dtype | None = None,
    normalise: bool = True,
) -> np.ndarray:
    """Rewards (S,) float32 of token sequences, each read at its last token, whatever token that is.

    model: a scalar model (bare or PEFT-wrapped) on its device; it is left as it was, modes and random state included.
    sequences: (token ids, where the completion starts) each, as everywhere in fastalign; the start plays no part here.
    batch_tokens: padded tokens of one forward; a longer sequence is a batch of its own. autocast: a dtype to compute
    in, or None for the weights' own. normalise: apply `reward_normalization`, where there is one.

    Raises ValueError: an empty sequence (by its position), a model that `fuse_scalar_head` refuses.
    """
    lengths = np.array([len(ids) for ids, _ in sequences], np.int64)
    if len(empty := np.flatnonzero(lengths == 0)):
        raise ValueError(f"sequence {empty[0]} has no tokens, so there is no token to read a reward at")
    scores = np.zeros(len(sequences), np.float32)
    base = base_scalar_model(model)
    device = base.get_input_embeddings().weight.device
    fused_here = not is_scalar_fused(base)
    with inference(model, device, autocast=autocast):
        fuse_scalar_head(model)
        try:
            for batch in plan_batches(lengths, batch_tokens):
                ids, rows = _padded([sequences[i][0] for i in batch])
                scores[batch] = model(input_ids=ids.to(device), rows=rows).cpu().numpy()
        finally:
            if fused_here:
                unfuse_scalar_head(model)
    normalization = reward_normalization(model) if normalise else None
    return scores if normalization is None else normalization(scores)


def _padded(sequences: list[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, T), padded on the right with token 0, which no real token sees; flat indices (B,) of the last tokens."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = torch.as_tensor(sequence)
    return ids, torch.tensor([b * width + len(sequence) - 1 for b, sequence in enumerate(sequences)])
