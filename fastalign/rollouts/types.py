"""What a sampler takes and gives: SamplingOptions, Completion and the Sampler protocol."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How completions are sampled. The defaults sample from softmax(logits / temperature) and nothing else.

    max_new_tokens: tokens of a completion at most, the stop token included.
    temperature: positive. Greedy decoding has no importance ratio, so 0 is refused.
    top_k, top_p: keep the k likeliest tokens, and of those the smallest set that holds the probability p; 0 and 1 are
        off. min_new_tokens: no stop token before that many tokens. All three change the distribution that is sampled
        from: log-probs that a trainer recomputes are not the sampler's then (see `is_pure`).
    stop_token_ids: further stop tokens, beside the model's and the tokenizer's own.

    Raises ValueError for a value out of range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("top_k", 0), ("min_new_tokens", 0)):
            object.__setattr__(self, name, _integer(name, getattr(self, name), least))
        if not (_is_number(self.temperature) and 0 < self.temperature < math.inf):
            raise ValueError(f"temperature must be a positive number, got {self.temperature!r}")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p!r}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} is more than max_new_tokens={self.max_new_tokens}: no "
                "completion could end with a stop token"
            )
        ids = tuple(_integer("stop_token_ids", token, 0) for token in self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", ids)

    @property
    def is_pure(self) -> bool:
        """Whether tokens are drawn from softmax(logits / temperature) itself, with nothing cut off."""
        return self.top_k == 0 and self.top_p == 1 and self.min_new_tokens == 0


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """One sampled completion.

    ids: the sampled tokens, at least one, the stop token included where one was sampled; nothing after it.
    finished: it ended with a stop token; False: it was cut at max_new_tokens.
    logps: float32 (len(ids),), the log-probs under the distribution that the sampler drew from; None where the sampler
        cannot tell.
    """

    ids: list[int]
    finished: bool
    logps: np.ndarray | None = None


class Sampler(Protocol):
    """Prompts to completions, whatever engine does the work."""

    options: SamplingOptions

    def generate(self, prompts: Sequence[Sequence[int]], *, num_samples: int = 1, seed: int) -> list[Completion]:
        """num_samples completions of each prompt, prompt-major: those of prompt 0 first. prompts: token ids, without
        padding. One seed gives one result, on one machine with one split into batches."""
        ...

    def sync(self, model: nn.Module) -> None:
        """Sample from this model's weights from now on. Called after every update of the policy."""
        ...


def check_prompts(prompts: Sequence[Sequence[int]], num_samples: int) -> list[list[int]]:
    """The prompts as lists of int. Raises ValueError, naming the prompt, for an empty one or ids that are none."""
    _integer("num_samples", num_samples, 1)
    checked = []
    for position, prompt in enumerate(prompts):
        try:
            ids = [operator.index(token) for token in prompt]
        except TypeError:
            raise ValueError(
                f"prompt {position} must be a sequence of token ids, got {type(prompt).__name__}"
            ) from None
        if not ids:
            raise ValueError(f"prompt {position} is empty: there is nothing to predict its first token from")
        checked.append(ids)
    return checked


def _integer(name: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return number


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
