"""transformers' continuous batching: a request is admitted as soon as another one is finished."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from fastalign.rollouts.types import Completion, SamplingOptions

_POLL_SECONDS = 1.0
_MASKED_STEP_TOKENS = 1024  # without flash attention a step has a mask of (its tokens) × (tokens in the cache)


def check_continuous(base: PreTrainedModel, options: SamplingOptions, autocast: torch.dtype | None) -> None:
    """Raise ValueError, saying why, if continuous batching cannot sample with these settings."""
    reason, config = None, base.config.get_text_config(decoder=True)
    softcap, attention = getattr(config, "attn_logit_softcapping", None), config._attn_implementation
    if not hasattr(base, "init_continuous_batching"):
        reason = f"{type(base).__name__} does not offer it: take another model"
    elif options.min_new_tokens:
        reason = "transformers applies no min_new_tokens there: set it to 0"
    elif autocast is not None:
        reason = f"it runs in a thread of its own, where autocast={autocast} does not reach; load the model in it"
    elif softcap is not None and "flash" not in str(attention):
        reason = f"paged attention without flash ignores attn_logit_softcapping={softcap}: load the model with flash"
    elif hasattr(base, "_cached_continuous_batching_manager"):
        reason = "the model keeps a manager with settings of its own; call destroy_cached_continuous_batching_manager()"
    if reason is not None:
        raise ValueError(f"continuous_batching cannot be used: {reason}, or set continuous_batching=False")


def generate_continuously(
    base: PreTrainedModel, rows: Sequence[list[int]], options: SamplingOptions, config: GenerationConfig,
    stops: frozenset[int], *, seed: int, batch_tokens: int, given: ContinuousBatchingConfig | None = None,
) -> list[Completion]:  # fmt: skip
    """One completion of each row, in order. config: a bare one; the options' temperature, top_k and top_p are added.

    All requests are queued before the engine starts, so that a seed decides the result.
    Raises RuntimeError, with the engine's reason, if a request fails.
    """
    config.temperature, config.top_k, config.top_p = float(options.temperature), options.top_k, float(options.top_p)
    config.eos_token_id = sorted(stops) or [-1]
    manager = base.init_continuous_batching(
        generation_config=config, continuous_batching_config=_settings(rows, options, given, batch_tokens, seed)
    )
    outputs: dict[str, Any] = {}
    try:
        for index, row in enumerate(rows):
            manager.add_request(row, request_id=str(index), max_new_tokens=options.max_new_tokens)
        manager.start()
        while len(outputs) < len(rows):
            output = manager.get_result(timeout=_POLL_SECONDS)
            if output is not None:
                if output.error is not None:
                    raise RuntimeError(f"continuous batching failed at row {output.request_id}: {output.error}")
                outputs[output.request_id] = output
            elif not manager.is_running():
                raise RuntimeError(f"continuous batching stopped after {len(outputs)} of {len(rows)} completions")
    finally:
        manager.stop(block=True, hard_stop=len(outputs) < len(rows))
        manager.destroy()
    completions = []
    for index in range(len(rows)):
        ids, logps = outputs[str(index)].generated_tokens, outputs[str(index)].logprobs
        completions.append(Completion(list(ids), ids[-1] in stops, np.asarray(logps, np.float32)))
    return completions


def _settings(
    rows: Sequence[list[int]], options: SamplingOptions, given: ContinuousBatchingConfig | None, batch_tokens: int,
    seed: int,
) -> ContinuousBatchingConfig:  # fmt: skip
    """The caller's settings with what cannot be otherwise; without any, a cache of `batch_tokens` tokens."""
    if given is not None:
        return replace(given, return_logprobs=True, seed=seed)
    longest = max(map(len, rows)) + options.max_new_tokens
    page = getattr(ContinuousBatchingConfig, "page_size", 256)  # block_size in older versions
    needed = sum(math.ceil((len(row) + options.max_new_tokens) / page) for row in rows)
    blocks = max(math.ceil(longest / page) + 1, min(needed, math.ceil(batch_tokens / page)))
    return ContinuousBatchingConfig(
        num_blocks=blocks, max_batch_tokens=_MASKED_STEP_TOKENS, return_logprobs=True, seed=seed
    )
