"""Sampling with transformers: batched `generate` with a key-value cache, or its continuous batching."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import ContinuousBatchingConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastalign.models.batches import plan_batches
from fastalign.models.head import base_causal_lm
from fastalign.models.inference import inference, refuse_token_adapters
from fastalign.rollouts.continuous import check_continuous, generate_continuously
from fastalign.rollouts.generation import (
    SampledLogps,
    bare_config,
    generation_config_of,
    ignored_settings,
    processors,
)
from fastalign.rollouts.types import Completion, SamplingOptions, check_prompts

logger = logging.getLogger(__name__)

DEFAULT_BATCH_TOKENS = 65_536


class TransformersSampler:
    """Completions sampled from a transformers causal LM where it is: the policy itself, between two updates.

    model: the model, a PeftModel around it (its active adapters count), or a function without arguments that gives
        one. Unwrapped from DDP, FSDP or DeepSpeed, with its parameters whole: that is the caller's business. A fused
        model (`models.fuse_head`) is as good.
    tokenizer: the tokenizer, or a pair (pad_token_id or None, stop token ids) in its place. A completion stops at the
        tokenizer's eos token or the pair's ids, at the eos ids of the model's generation_config, and at
        options.stop_token_ids: whichever comes first.
    options: SamplingOptions. They are all that counts: the temperature, top-k, top-p, penalties, forced and forbidden
        tokens of the model's own generation_config are ignored, with a warning that names them, because the log-probs
        of a policy that is trained on its samples know nothing of them.
    batch_tokens: a batch holds at most that many tokens, (longest prompt + max_new_tokens) × rows; the key-value cache
        is as large. batch_size: rows of a batch at most. Prompts are batched by length and results put back in order.
    autocast: compute in this dtype under torch.autocast, as a trainer with bf16=True does over float32 weights.
    continuous_batching: let transformers admit a prompt as soon as another one is finished, with paged attention and
        shared prompts: True, or a ContinuousBatchingConfig. Meant for GPUs with flash attention; without, slower.

    Batches are left padded, positions count from the first token of each prompt. During sampling the model is in
    evaluation mode without autograd; modes, random state and generation_config are then as before. `logps` are the log
    softmax of the scores that each token was drawn from, float32; the scores of one step are held, never [B, T, V].

    A seed gives the same completions for the same prompts and settings on one machine. How prompts fall into batches
    changes which random number meets which token, so other prompts, batch_tokens or batch_size change completions.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        tokenizer: PreTrainedTokenizerBase | tuple[int | None, Iterable[int]],
        options: SamplingOptions,
        *,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        batch_size: int | None = None,
        autocast: torch.dtype | None = None,
        continuous_batching: bool | ContinuousBatchingConfig = False,
    ) -> None:
        if batch_tokens < 1 or (batch_size is not None and batch_size < 1):
            raise ValueError(f"batch_tokens and batch_size must be positive, got {batch_tokens} and {batch_size}")
        self.options = options
        self.batch_tokens, self.batch_size, self.autocast = batch_tokens, batch_size, autocast
        self.continuous_batching = continuous_batching
        self._model = model
        self._pad_token_id, self._tokenizer_stops = special_ids(tokenizer)
        self._spoken_of: dict[str, Any] = {}

    def sync(self, model: nn.Module) -> None:
        """Nothing to do: the sampler reads the policy's own weights."""

    def generate(self, prompts: Sequence[Sequence[int]], *, num_samples: int = 1, seed: int) -> list[Completion]:
        """num_samples completions of each prompt, prompt-major.

        Raises ValueError: an empty prompt, an id outside the vocabulary, a prompt that leaves max_new_tokens no room in
        a table of learned positions, an adapter that adds tokens, continuous batching that cannot be had.
        """
        checked = check_prompts(prompts, num_samples)
        if not checked:
            return []
        model = self._model if isinstance(self._model, nn.Module) else self._model()
        refuse_token_adapters(model)
        base = base_causal_lm(model)
        stops = self.stop_ids(base)
        check_ids(base, checked, self.options)
        own, pad = base.generation_config, self._padding(base, stops)
        self._speak_of(ignored_settings(own))
        config = bare_config(own, self.options, pad, stops)
        device = base.get_input_embeddings().weight.device
        rows = [prompt for prompt in checked for _ in range(num_samples)]
        if self.continuous_batching:
            check_continuous(base, self.options, self.autocast)
        with inference(model, device, autocast=self.autocast), generation_config_of(base, config):
            torch.manual_seed(seed)
            if self.continuous_batching:
                given = None if self.continuous_batching is True else self.continuous_batching
                return generate_continuously(
                    base, rows, self.options, config, stops, seed=seed, batch_tokens=self.batch_tokens, given=given
                )
            return self._in_batches(base, rows, stops, pad)

    def stop_ids(self, model: nn.Module) -> frozenset[int]:
        """The ids that end a completion of this model."""
        eos = base_causal_lm(model).generation_config.eos_token_id
        from_model = [] if eos is None else [eos] if isinstance(eos, int) else eos
        return frozenset({*map(int, from_model), *self._tokenizer_stops, *self.options.stop_token_ids})

    def _in_batches(
        self, base: PreTrainedModel, rows: list[list[int]], stops: frozenset[int], pad: int
    ) -> list[Completion]:
        completions: dict[int, Completion] = {}
        lengths = np.array([len(row) for row in rows], np.int64) + self.options.max_new_tokens
        for batch in plan_batches(lengths, self.batch_tokens, self.batch_size):
            sampled = self._sample_batch(base, [rows[i] for i in batch], stops, pad)
            completions |= zip(batch.tolist(), sampled, strict=True)
        return [completions[i] for i in range(len(rows))]

    def _sample_batch(
        self, base: PreTrainedModel, rows: list[list[int]], stops: frozenset[int], pad: int
    ) -> list[Completion]:
        width = max(map(len, rows))
        device = base.get_input_embeddings().weight.device
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        recorder = SampledLogps()
        sequences = base.generate(  # position ids: transformers counts them from the mask
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            logits_processor=processors(self.options, width, stops, device, recorder),
        )
        generated = sequences[:, width:]
        logps = recorder.finish(generated).cpu().numpy()
        return [finish(row, values, stops) for row, values in zip(generated.tolist(), logps, strict=True)]

    def _padding(self, base: PreTrainedModel, stops: frozenset[int]) -> int:
        """An id for the padding, which attention masks and no completion contains: any embedding will do."""
        vocabulary = base.get_input_embeddings().weight.shape[0]
        candidates = (self._pad_token_id, base.generation_config.pad_token_id, *sorted(stops), 0)
        return next(int(token) for token in candidates if token is not None and 0 <= token < vocabulary)

    def _speak_of(self, ignored: dict[str, Any]) -> None:
        if ignored and ignored != self._spoken_of:
            self._spoken_of = ignored
            logger.warning(
                "the model's own generation_config is not used for sampling; ignored: %s",
                ", ".join(f"{name}={value!r}" for name, value in sorted(ignored.items())),
            )


def special_ids(tokenizer: PreTrainedTokenizerBase | tuple[int | None, Iterable[int]]) -> tuple[int | None, list[int]]:
    """(padding id or None, stop ids) of a tokenizer, or of the pair that stands for one."""
    if isinstance(tokenizer, tuple):
        pad, stops = tokenizer
        return pad, [int(token) for token in stops]
    eos = tokenizer.eos_token_id
    return tokenizer.pad_token_id, [] if eos is None else [int(eos)]


def finish(ids: Sequence[int], logps: np.ndarray | Sequence[float] | None, stops: frozenset[int]) -> Completion:
    """The completion in a row of generated tokens: up to its first stop token, or all of it."""
    end = next((position + 1 for position, token in enumerate(ids) if token in stops), None)
    kept = None if logps is None else np.asarray(logps, np.float32)[:end]
    return Completion(list(ids[:end]), end is not None, kept)


def check_ids(base: PreTrainedModel, prompts: Sequence[Sequence[int]], options: SamplingOptions) -> None:
    """Raise ValueError for a token that the model does not have, or a prompt that leaves it no room."""
    vocabulary = base.get_input_embeddings().weight.shape[0]
    if any(token >= vocabulary for token in options.stop_token_ids):
        raise ValueError(f"stop_token_ids {options.stop_token_ids} are not all below the vocabulary's {vocabulary}")
    config = base.config.get_text_config(decoder=True)
    # RoPE has no last position; a table of learned ones does, and beyond it a GPU fails in a kernel
    learned = None if getattr(config, "rope_parameters", None) else getattr(config, "max_position_embeddings", None)
    for position, prompt in enumerate(prompts):
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            worst = min(prompt) if min(prompt) < 0 else max(prompt)
            raise ValueError(f"prompt {position}: token id {worst} is outside the model's vocabulary of {vocabulary}")
        if learned is not None and len(prompt) + options.max_new_tokens > learned:
            raise ValueError(
                f"prompt {position}: {len(prompt)} tokens and max_new_tokens={options.max_new_tokens} are more than "
                f"the {learned} positions of {type(base).__name__}: shorten either"
            )
