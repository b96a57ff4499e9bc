"""What completions are worth: reward models, Python functions, or several of both with weights."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fastalign.models import score_sequences
from fastalign.models.scalar import fuse_scalar_head
from fastalign.reference import TokenSequence
from fastalign.rollouts import Completion

RewardFunction = Callable[..., Sequence[float | None]]

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """Completions of one phase in one process, with what the data set says of their prompts.

    prompt_ids, completions, rows: one of each per sample; rows are numbers in the data set. read_columns: from rows to
    the data's other columns, called when a reward asks for them; None where the data has none.
    """

    prompt_ids: list[list[int]]
    completions: list[Completion]
    rows: list[int]
    read_columns: Callable[[Sequence[int]], dict[str, list[Any]]] | None = None

    @cached_property
    def columns(self) -> dict[str, list[Any]]:
        """One value per sample by name."""
        return {} if self.read_columns is None else self.read_columns(self.rows)

    def __len__(self) -> int:
        return len(self.completions)


def token_sequences(samples: Samples) -> list[TokenSequence]:
    """Prompt and completion of each sample in the policy's tokens."""
    return [
        TokenSequence(prompt + completion.ids, len(prompt))
        for prompt, completion in zip(samples.prompt_ids, samples.completions, strict=True)
    ]


class RewardModel:
    """A reward model as a reward function: the score of prompt and completion at their last token.

    model: a scalar model (`models.load_scalar_model`), whose stored normalisation is applied. tokenizer: its own. Where
    that gives text the policy's ids, token ids go in as they were sampled, unless the prompt came as messages and the
    reward model has another chat template. Otherwise the text goes in, through the reward model's own template if the
    prompt came as messages.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, policy_tokenizer: PreTrainedTokenizerBase, *,
        batch_tokens: int, autocast: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.model = fuse_scalar_head(model)  # here, so that a model that cannot be one is found out at once
        self.tokenizer, self.policy_tokenizer = tokenizer, policy_tokenizer
        self.batch_tokens, self.autocast = batch_tokens, autocast
        self.shares_tokenizer = same_tokens(tokenizer, policy_tokenizer)
        self._shares_template = tokenizer.chat_template in (None, policy_tokenizer.chat_template)

    def __call__(self, samples: Samples) -> np.ndarray:
        """(S,) float32."""
        sequences = token_sequences(samples)
        if not self.shares_tokenizer or not self._shares_template:
            prompts = samples.columns.get("prompt", [None] * len(samples))
            for i, prompt in enumerate(prompts):
                if not self.shares_tokenizer or isinstance(prompt, list):
                    sequences[i] = self._retokenised(samples, i, prompt)
        scores = score_sequences(self.model, sequences, batch_tokens=self.batch_tokens, autocast=self.autocast)
        if len(bad := np.flatnonzero(~np.isfinite(scores))):
            raise ValueError(
                f"the reward model {type(self.model).__name__} gave {scores[bad[0]]} for a completion of row "
                f"{samples.rows[bad[0]]}; it must be finite"
            )
        return scores

    def _retokenised(self, samples: Samples, index: int, prompt: Any) -> TokenSequence:
        completion, own = samples.completions[index], self.tokenizer
        text = self.policy_tokenizer.decode(completion.ids, skip_special_tokens=True)
        if isinstance(prompt, list) and own.chat_template is not None:
            answer = {"role": "assistant", "content": text}
            before = own.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            whole = own.apply_chat_template([*prompt, answer], tokenize=False)
            ids = own(whole, add_special_tokens=False)["input_ids"]
            return TokenSequence(ids, min(len(own(before, add_special_tokens=False)["input_ids"]), len(ids) - 1))
        ids = own(self.policy_tokenizer.decode(samples.prompt_ids[index], skip_special_tokens=True))["input_ids"]
        answer_ids = own(text, add_special_tokens=False)["input_ids"]
        if completion.finished and own.eos_token_id is not None:
            answer_ids = [*answer_ids, own.eos_token_id]
        if not answer_ids:  # nothing but special tokens was sampled: the score is that of the prompt
            return TokenSequence(ids, len(ids) - 1)
        return TokenSequence(ids + answer_ids, len(ids))


class FunctionReward:
    """A Python function `f(prompts, completions, ...)`, called as TRL calls its reward functions.

    By keyword, and only those that it takes: prompts (the data's `prompt` column, text or messages, or the decoded
    ids), completions (text without special tokens), prompt_ids, completion_ids, finished (bool), and every other column
    of the data. One finite value per sample; None where the function has nothing to say.
    """

    def __init__(self, function: RewardFunction, tokenizer: PreTrainedTokenizerBase) -> None:
        self.function, self.tokenizer = function, tokenizer
        self.name = getattr(function, "__name__", type(function).__name__)
        parameters = list(inspect.signature(function).parameters.values())
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self._names = {p.name for p in named}
        self._needed = [p.name for p in named if p.default is p.empty]
        if positional := [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]:
            raise ValueError(f"reward function {self.name} takes {positional[0]} by position; it is called by keyword")

    def __call__(self, samples: Samples) -> np.ndarray:
        """(S,) float32, NaN where the function gave None.

        Raises ValueError, naming the function: an argument that there is no column for, a number of values that is not
        that of the completions, a value that is no finite number (by row).
        """
        decode = self.tokenizer.batch_decode
        given: dict[str, Any] = {
            **samples.columns,
            "prompts": samples.columns.get("prompt") or decode(samples.prompt_ids, skip_special_tokens=False),
            "completions": decode([completion.ids for completion in samples.completions], skip_special_tokens=True),
            "prompt_ids": samples.prompt_ids,
            "completion_ids": [completion.ids for completion in samples.completions],
            "finished": [completion.finished for completion in samples.completions],
        }
        if missing := [name for name in self._needed if name not in given]:
            raise ValueError(
                f"reward function {self.name} takes {missing[0]}, and there is no such column; there are "
                f"{', '.join(sorted(given))}"
            )
        arguments = given if self._takes_all else {name: given[name] for name in given if name in self._names}
        values: Any = self.function(**arguments)
        if isinstance(values, torch.Tensor):
            values = values.tolist()
        count = len(values) if hasattr(values, "__len__") else None
        if count != len(samples):
            found = type(values).__name__ if count is None else f"{count} values"
            raise ValueError(f"reward function {self.name} returned {found} for {len(samples)} completions")
        return np.array([self._value(value, row) for value, row in zip(values, samples.rows, strict=True)], np.float32)

    def _value(self, value: Any, row: int) -> float:
        if value is None:
            return math.nan
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not abs(number) <= _LARGEST:
            raise ValueError(
                f"reward function {self.name} gave {value!r} for a completion of row {row}: accepted are finite "
                "numbers, and None where it has nothing to say"
            )
        return number


class Rewards:
    """The weighted sum of several rewards.

    sources: by name; NaN in what one gives ("does not apply") leaves it out of that sample's sum. weights: one of each.
    """

    def __init__(self, sources: Mapping[str, Callable[[Samples], np.ndarray]], weights: Sequence[float] | None) -> None:
        if not sources:
            raise ValueError("no reward: give reward_model, reward_funcs, or their names in the config")
        if weights is not None and len(weights) != len(sources):
            raise ValueError(
                f"reward_weights has {len(weights)} weights for {len(sources)} rewards: {', '.join(sources)}"
            )
        self.sources = dict(sources)
        self.weights = np.ones(len(sources), np.float32) if weights is None else np.array(weights, np.float32)
        if not np.isfinite(self.weights).all():
            raise ValueError(f"reward_weights={list(weights or ())}: they must be finite")

    def __call__(self, samples: Samples) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(scores (S,) float32, each reward by name, unweighted and with NaN where it does not apply).

        Raises ValueError, naming the row, for a sample without any.
        """
        each = {name: source(samples) for name, source in self.sources.items()}
        table = np.stack(list(each.values()), axis=1)  # (S, rewards)
        if len(bad := np.flatnonzero(np.isnan(table).all(axis=1))):
            raise ValueError(f"no reward applies to a completion of row {samples.rows[bad[0]]}: {', '.join(each)}")
        return np.nansum(table * self.weights, axis=1).astype(np.float32), each


def same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give a text the same ids, as far as their vocabularies say."""
    return one is other or (one.eos_token_id == other.eos_token_id and one.get_vocab() == other.get_vocab())


def load_function(path: str) -> RewardFunction:
    """The function that `package.module:name` names; the current folder counts too, behind Python's own path.

    Raises ValueError, naming it, for anything else.
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise ValueError(f"reward_funcs: {path!r} must be package.module:function")
    here = os.getcwd()
    if here not in sys.path:  # as `python -m` has it, and an installed command has not
        sys.path.append(here)
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward_funcs: {path!r} cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"reward_funcs: {path!r} is a {type(function).__name__}, not a function")
    return function
