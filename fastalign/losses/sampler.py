"""Correction for a sampler that is not quite the policy that is trained: truncated importance weights.

An engine with other kernels, another precision or older weights draws from another distribution than the one that
old_logps are of. Its samples stand for the trainer's when each token's policy loss is weighed by how much likelier the
trainer found it (F. Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training").
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.losses.masking import masked
from fastalign.losses.sequences import Sequences
from fastalign.types import Metric

SAMPLER_CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
"""Whether the weight is that of a token or of its whole sequence, and whether one above the cap becomes the cap or 0.
TRL's vllm_importance_sampling_mode."""


def check_sampler_options(sampler_correction: str, sampler_cap: float, has_sampler_logps: bool) -> None:
    """Raise ValueError for an option of the correction that cannot be honoured, naming it."""
    if sampler_correction not in SAMPLER_CORRECTIONS:
        raise ValueError(
            f"sampler_correction={sampler_correction!r}: accepted are {', '.join(map(repr, SAMPLER_CORRECTIONS))}"
        )
    if not sampler_cap >= 1:
        raise ValueError(
            f"sampler_cap={sampler_cap}: where sampler and trainer agree the weight is 1, so it is at least 1"
        )
    if not has_sampler_logps and (sampler_correction, sampler_cap) != ("token_truncate", 2.0):
        raise ValueError(
            f"sampler_correction={sampler_correction!r}, sampler_cap={sampler_cap} have no effect without "
            "sampler_logps, the log-probs of the tokens under the distribution that they were drawn from"
        )


@torch.no_grad()
def sampler_weights(
    old_logps: Tensor,
    sampler_logps: Tensor,
    mask: Tensor,
    *,
    sampler_correction: str = "token_truncate",
    sampler_cap: float = 2.0,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Metric]]:
    """Weights that make tokens of the sampler stand for the trainer's, without a gradient.

        token_*     w_t = exp(old_logps_t − sampler_logps_t)
        sequence_*  w = exp(Σ_t (old_logps_t − sampler_logps_t)), of every token of the sequence
        *_truncate  min(w, sampler_cap)          *_mask  w, or 0 where it exceeds sampler_cap

    Args:
        old_logps, sampler_logps: (B, T), or (N,) with cu_seqlens on the host; float, nats, of the sampled tokens under
            the trainer's policy at the time of the rollout and under the distribution that the sampler drew from.
        mask: bool, True where a token counts; what lies outside, NaN included, never enters.
    Returns:
        (weights, their shape, float32 or float64, 1 outside the mask; metrics `sampler_ratio`, the mean of w,
        `sampler_capped`, how many exceed the cap, both over tokens or sequences, and `sampler_ratio/max`. A maximum
        does not add up: merged, it is the mean of the batches' maxima, weighted by tokens or sequences.)
    Raises:
        ValueError: shapes, dtypes, devices or boundaries that do not fit.
    """
    old_logps = old_logps.to(torch.promote_types(old_logps.dtype, sampler_logps.dtype))
    given, mask = masked(old_logps, {"sampler_logps": sampler_logps}, mask, name="old_logps")
    difference = given["old_logps"] - given["sampler_logps"]
    dtype = difference.dtype
    shares, count = mask.to(dtype), mask.sum().to(dtype)
    if sampler_correction.startswith("sequence"):
        sequences = Sequences(mask, cu_seqlens, dtype=dtype)
        difference = sequences.spread(sequences.sums(difference))
        shares, count = sequences.shares(), sequences.count.to(dtype)
    ratio = difference.exp()
    over = ratio > sampler_cap
    weights = torch.where(over, sampler_cap if sampler_correction.endswith("truncate") else 0.0, ratio)
    largest = torch.where(mask, ratio, 0).amax() if ratio.numel() else ratio.new_zeros(())
    metrics = {
        "sampler_ratio": Metric(torch.where(mask, ratio * shares, 0).sum(), count),
        "sampler_ratio/max": Metric(largest * count, count),
        "sampler_capped": Metric((over * shares).sum(), count),
    }
    return torch.where(mask, weights, 1), metrics
