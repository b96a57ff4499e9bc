"""Rewards of whole sequences: a scalar model read at each sequence's last token, and what its scores are measured from.

Bradley–Terry determines a reward up to a constant, so a trained model may be given the mean of its scores on a
reference set (arXiv 2403.17031), and their standard deviation. They are one entry of its config.json,

    "fastalign_reward_normalization": {"mean": 0.7, "std": null}

so that they live as long as the model does. `score_sequences` applies them; plain transformers does not know them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from fastalign.models.batches import plan_scoring, prompt_number, shared_prefixes
from fastalign.models.inference import inference
from fastalign.models.layouts import plan_layout, run_layout
from fastalign.models.packing import packable
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
    token_layout: str = "shared",
) -> np.ndarray:
    """Rewards (S,) float32 of token sequences, each read at its last token, whatever token that is.

    model: a scalar model (bare or PEFT-wrapped) on its device; it is left as it was, modes and random state included.
    sequences: (token ids, where the completion starts) each, as everywhere in fastalign; the start says which of them
        have a prompt in common, and changes no reward.
    batch_tokens: computed tokens of one forward; a longer sequence is a batch of its own. autocast: a dtype to compute
    in, or None for the weights' own. normalise: apply `reward_normalization`, where there is one. token_layout:
    "shared" (sequences of one prompt that follow each other share it), "packed" or "padded"; see
    `fastalign.models.layouts`. Models that take no packed batch get padded ones.

    Raises ValueError: an empty sequence (by its position), a model that `fuse_scalar_head` refuses.
    """
    lengths = np.array([len(ids) for ids, _ in sequences], np.int64)
    if len(empty := np.flatnonzero(lengths == 0)):
        raise ValueError(f"sequence {empty[0]} has no tokens, so there is no token to read a reward at")
    starts = np.clip(np.array([start for _, start in sequences], np.int64), 0, lengths)
    prompts = np.array([prompt_number(ids[:n]) for (ids, _), n in zip(sequences, starts.tolist(), strict=True)])
    scores = np.zeros(len(sequences), np.float32)
    base = base_scalar_model(model)
    device = base.get_input_embeddings().weight.device
    fused_here = not is_scalar_fused(base)
    with inference(model, device, autocast=autocast):
        fuse_scalar_head(model)
        try:
            with packable(model, token_layout) as layout:
                for part in plan_scoring(lengths, lengths - starts, prompts, batch_tokens, layout):
                    batch = _batch([sequences[i][0] for i in part], starts[part], device)
                    scores[part] = run_layout(model, batch, plan_layout(batch, layout)).cpu().numpy()
        finally:
            if fused_here:
                unfuse_scalar_head(model)
    normalization = reward_normalization(model) if normalise else None
    return scores if normalization is None else normalization(scores)


def _batch(sequences: list[Sequence[int]], starts: np.ndarray, device: torch.device) -> dict[str, Any]:
    """As collators make them: ids (S, T) padded on the right with 0, which no real token sees; rows, the last ones."""
    lengths = np.array([len(sequence) for sequence in sequences])
    width = int(lengths.max())
    ids = np.zeros((len(lengths), width), np.int64)
    ids[np.arange(width) < lengths[:, None]] = np.concatenate([np.asarray(sequence) for sequence in sequences])
    groups, prefixes = shared_prefixes(ids, lengths, starts.tolist())
    return {
        "input_ids": torch.from_numpy(ids).to(device), "rows": np.arange(len(lengths)) * width + lengths - 1,
        "lengths": lengths, "groups": groups, "prefix_lengths": prefixes,
    }  # fmt: skip
