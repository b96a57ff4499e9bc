"""What transformers' `generate` is told, and nothing of what a model's own generation_config would add."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation import (
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastalign.rollouts.types import SamplingOptions

# How tokens are computed, not which: taken over from the model's own generation_config.
_KEPT = ("cache_implementation", "cache_config", "compile_config", "disable_compile", "prefill_chunk_size")
# Neither: ids, lengths (the options have their own), outputs, and the knobs of methods that other fields choose.
# As in a reference's identity, fields are left out by name: one that nobody here knows is spoken of.
_UNSPOKEN = {"bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id", "transformers_version"}
_UNSPOKEN |= {"do_sample", "max_length", "max_new_tokens", "num_return_sequences", "early_stopping", "length_penalty"}
_UNSPOKEN |= {"output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"}
_UNSPOKEN |= {"use_cache", "max_cache_len", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule"}
_UNSPOKEN |= {"assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size"}
_UNSPOKEN |= {"continuous_batching_config", "assistant_ensemble_weight", "speculation_type", *_KEPT}
_OFF_AT_ONE = {"temperature", "top_p", "typical_p", "repetition_penalty", "encoder_repetition_penalty"}
_OFF_AT_ONE |= {"num_beams", "num_beam_groups", "guidance_scale"}


def ignored_settings(config: GenerationConfig) -> dict[str, Any]:
    """The settings of a model's generation_config that would change what is sampled: none of them is used."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if value  # None, 0, False and empty lists are off
        and not name.startswith("_")
        and name not in _UNSPOKEN
        and not (name in _OFF_AT_ONE and value == 1)
    }


def bare_config(
    own: GenerationConfig, options: SamplingOptions, pad_token_id: int, stop_ids: Iterable[int]
) -> GenerationConfig:
    """A generation_config that samples from the model's softmax and stops at `stop_ids` or after max_new_tokens."""
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=options.max_new_tokens,
        pad_token_id=pad_token_id,
        eos_token_id=sorted(stop_ids) or None,
        use_cache=True,
        **{name: value for name in _KEPT if (value := getattr(own, name, None)) is not None},
    )


@contextmanager
def generation_config_of(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Inside, `config` is the model's own: `generate` fills every field that its argument leaves open from that."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


class SampledLogps(LogitsProcessor):
    """The last of the processors: keeps the log-prob of each sampled token, and of the scores those of one step.

    transformers calls it with the tokens so far (B, t) and the scores (B, V) that the next one is drawn from. The token
    that was drawn from the last scores is the last of the tokens of the next call.
    """

    def __init__(self) -> None:
        self._scores: Tensor | None = None
        self._lse = torch.empty(0)
        self._logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._scores is not None:
            self._take(self._scores, input_ids[:, -1])
        self._scores, self._lse = scores, scores.logsumexp(dim=1)
        # A distribution that is none (a weight or an activation is nan) would end the process's use of a GPU where the
        # token is drawn: any token is drawn instead, and its log-prob is nan, which no step of training gets past.
        return scores.masked_fill_(~self._lse.isfinite()[:, None], 0.0)

    def finish(self, generated: Tensor) -> Tensor:
        """(B, L) float32 for the generated tokens (B, L)."""
        if self._scores is not None and len(self._logps) < generated.shape[1]:
            self._take(self._scores, generated[:, -1])
        self._scores = None
        return torch.stack(self._logps[: generated.shape[1]], dim=1)  # mps samples one step more than it keeps

    def _take(self, scores: Tensor, tokens: Tensor) -> None:
        logps = scores.gather(1, tokens[:, None])[:, 0] - self._lse
        self._logps.append(torch.where(self._lse.isfinite(), logps, torch.nan))


def processors(
    options: SamplingOptions, width: int, stop_ids: Iterable[int], device: torch.device, recorder: SampledLogps
) -> LogitsProcessorList:
    """logits → scores, for prompts padded to `width`: transformers' own processors in its order, then the recorder."""
    found: list[LogitsProcessor] = []
    if options.min_new_tokens and (stops := sorted(stop_ids)):
        found.append(MinNewTokensLengthLogitsProcessor(width, options.min_new_tokens, stops, device=str(device)))
    if options.temperature != 1.0:
        found.append(TemperatureLogitsWarper(float(options.temperature)))
    if options.top_k:
        found.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1.0:
        found.append(TopPLogitsWarper(float(options.top_p)))
    return LogitsProcessorList([*found, recorder])
