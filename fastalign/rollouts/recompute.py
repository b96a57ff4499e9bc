"""Log-probs of sampled tokens as the trainer computes them, and how far the sampler's own are from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from fastalign.reference import ModelScorer, TokenScores, TokenSequence
from fastalign.rollouts.types import Completion, check_prompts

DEFAULT_BATCH_TOKENS = 16_384


def score_completions(
    model: nn.Module, prompts: Sequence[Sequence[int]], completions: Sequence[Completion], *, temperature: float = 1.0,
    entropy: bool = False, batch_tokens: int = DEFAULT_BATCH_TOKENS, autocast: torch.dtype | None = None,
    backend: str = "auto", progress: bool = False,
) -> list[TokenScores]:  # fmt: skip
    """Log-probs (and entropies) of the sampled tokens under `model` as it stands, in the order of `completions`.

    logps[t] = log softmax(logits_t / temperature)[ids[t]],  float32 (len(ids),) of each completion

    One forward a batch, the head in tiles: no [tokens, vocabulary] matrix, no gradient. The model may be wrapped (DDP,
    FSDP, torch.compile) and in training: it comes back as it was, and no random number is drawn. Active adapters of
    a PeftModel count; those of a reference are the business of `fastalign.reference.score`.

    prompts (P), completions (P · num_samples), prompt-major: as `Sampler.generate` takes and gives them.
    temperature: the sampling temperature. entropy: also of the distribution that each token was drawn from, nats.
    batch_tokens: padded tokens of one forward; completions are sorted by length. autocast: compute in this dtype as the
        update does. backend: of `linear_logps`.
    Raises ValueError: counts that do not fit, an empty prompt or completion, an id outside the vocabulary, a model
        whose head cannot be fused.
    """
    checked = check_prompts(prompts, 1)
    num_samples, left = divmod(len(completions), len(checked)) if checked else (0, len(completions))
    if left or (checked and not num_samples):
        raise ValueError(
            f"{len(completions)} completions do not divide among {len(checked)} prompts: each prompt needs the same "
            "number of them, those of prompt 0 first"
        )
    sequences = []
    for position, completion in enumerate(completions):
        if not completion.ids:
            raise ValueError(f"completion {position} is empty: it has no token to score")
        prompt = checked[position // num_samples]
        sequences.append(TokenSequence(prompt + completion.ids, len(prompt)))
    if not sequences:
        return []
    scorer = ModelScorer(
        model, keep_adapters=True, temperature=temperature, autocast=autocast, entropy=entropy, backend=backend
    )
    return scorer.score_all(sequences, batch_tokens=batch_tokens, progress=progress)


def sampler_gap(completions: Sequence[Completion], logps: Sequence[np.ndarray]) -> dict[str, float]:
    """How far the sampler's log-probs are from the recomputed ones, over all tokens of all completions.

    sampling/sampling_logp_difference/{mean,max}: of |logps − sampler's|
    sampling/importance_sampling_ratio/{min,mean,max}: of exp(logps − sampler's), per token, without a cap

    logps: float32 (len(ids),) of each completion, as of `score_completions`. With options that are not pure
    (`SamplingOptions.is_pure`) the two are log-probs of different distributions, and the gap is not rounding alone.
    Under several processes gather the completions and log-probs first: a mean of means is not the mean.
    Raises ValueError: no completions, completions without log-probs, lengths that differ.
    """
    if not completions or len(completions) != len(logps):
        raise ValueError(f"expected log-probs of each completion, got {len(logps)} for {len(completions)} completions")
    differences = []
    for position, (completion, row) in enumerate(zip(completions, logps, strict=True)):
        if completion.logps is None:
            raise ValueError(f"completion {position} has no log-probs of its sampler to compare with")
        if np.shape(row) != np.shape(completion.logps):
            raise ValueError(
                f"completion {position}: {np.shape(completion.logps)} log-probs of the sampler, {np.shape(row)} "
                "recomputed"
            )
        differences.append(np.asarray(row, np.float64) - np.asarray(completion.logps, np.float64))
    difference = np.concatenate(differences)
    with np.errstate(over="ignore"):
        ratio = np.exp(difference)
    return {
        "sampling/sampling_logp_difference/mean": float(np.abs(difference).mean()),
        "sampling/sampling_logp_difference/max": float(np.abs(difference).max()),
        "sampling/importance_sampling_ratio/min": float(ratio.min()),
        "sampling/importance_sampling_ratio/mean": float(ratio.mean()),
        "sampling/importance_sampling_ratio/max": float(ratio.max()),
    }
