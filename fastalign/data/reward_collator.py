"""Tokenised judged responses to padded batches that are read at each sequence's last token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastalign.data.prefixes import prefix_lengths

# From the columns that tell a kind of example to the columns of its responses.
_KINDS = {
    "pairs": ("chosen_ids", "rejected_ids"),
    "lists": ("response_ids",),
    "labels": ("completion_ids",),
}


@dataclass(frozen=True)
class RewardCollator:
    """Pads pairs, lists or single responses to a batch of S sequences, on the right; each response is in it once.

    Takes examples with `prompt_ids` and, all of them the same of
        `chosen_ids`, `rejected_ids` and optionally `margin`      pairs: the P chosen ones first, then the rejected
        `response_ids`, `ranks`                                   lists: list after list, of any lengths
        `completion_ids`, `label`                                 single responses
    and returns

        input_ids, attention_mask   (S, T) int64
        rows                        (S,) numpy int64: flat index b·T + t of each sequence's last token
        cu_seqlens                  (S + 1,) numpy int32, 0 … S: each sequence has one row
        groups, lengths             (S,) numpy int64: the example of each sequence, and its tokens without padding
        prefix_lengths              (P,), (L,) or (S,) numpy int64: tokens that all sequences of an example begin with
        completion_lengths          (S,) float32: tokens after the prompt
        margin (P,), ranks (S,), labels (S,)      float32, where the examples have them

    T is the longest sequence, rounded up to a multiple of `pad_to_multiple_of`. What is numpy stays on the host.
    Lengths alone decide what is padding, so `pad_token_id` may be any token. ValueError: no examples, examples of
    different kinds, an empty list of ids, or ranks that do not match the responses.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not examples:
            raise ValueError("there are no examples to collate")
        kind = example_kind(examples[0])
        if others := [i for i, example in enumerate(examples) if example_kind(example) != kind]:
            raise ValueError(f"example 0 of the batch is one of {kind}, example {others[0]} is not")
        if kind == "pairs":
            order = [(i, example[name]) for name in _KINDS[kind] for i, example in enumerate(examples)]
        elif kind == "lists":
            order = [(i, ids) for i, example in enumerate(examples) for ids in example["response_ids"]]
        else:
            order = [(i, example["completion_ids"]) for i, example in enumerate(examples)]
        batch = self._padded([(i, examples[i]["prompt_ids"], ids) for i, ids in order])
        return batch | _judgements(kind, examples, batch["groups"])

    def _padded(self, sequences: list[tuple[int, Any, Any]]) -> dict[str, Any]:
        groups, prompts, completions = zip(*sequences, strict=True)
        prompt_lengths, completion_lengths = (np.array([len(ids) for ids in part]) for part in (prompts, completions))
        for name, counts in (("the prompt", prompt_lengths), ("a response", completion_lengths)):
            if not counts.all():
                raise ValueError(f"{name} of example {groups[int(np.argmin(counts))]} of the batch is empty")
        lengths = prompt_lengths + completion_lengths
        width = int(lengths.max())
        if self.pad_to_multiple_of is not None:
            width += -width % self.pad_to_multiple_of
        real = np.arange(width) < lengths[:, None]
        input_ids = np.full(real.shape, self.pad_token_id, dtype=np.int64)
        parts = [np.asarray(ids, np.int64) for pair in zip(prompts, completions, strict=True) for ids in pair]
        input_ids[real] = np.concatenate(parts)
        count = len(lengths)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(real.astype(np.int64)),
            "rows": np.arange(count) * width + lengths - 1,
            "cu_seqlens": np.arange(count + 1, dtype=np.int32),
            "groups": np.array(groups),
            "lengths": lengths,
            "prefix_lengths": prefix_lengths(input_ids, lengths, np.array(groups)),
            "completion_lengths": torch.from_numpy(completion_lengths.astype(np.float32)),
        }


def example_kind(example: Mapping[str, Any]) -> str:
    """ "pairs", "lists" or "labels", from the columns of an example (or of a data set). ValueError: none of them."""
    for kind, columns in _KINDS.items():
        if all(name in example for name in columns):
            return kind
    raise ValueError(
        f"an example has {', '.join(sorted(example))}; accepted are prompt_ids with "
        + ", or ".join(" and ".join(columns) for columns in _KINDS.values())
    )


def _judgements(kind: str, examples: Sequence[Mapping[str, Any]], groups: np.ndarray) -> dict[str, Any]:
    if kind == "pairs":
        given = ["margin" in example for example in examples]
        if any(given) and not all(given):
            raise ValueError(
                f"example {given.index(not given[0])} of the batch differs from example 0: one has a margin"
            )
        return {"margin": _floats([example["margin"] for example in examples])} if given[0] else {}
    if kind == "labels":
        return {"labels": _floats([example["label"] for example in examples])}
    sizes, counts = np.array([len(example["ranks"]) for example in examples]), np.bincount(groups)
    if len(wrong := np.flatnonzero(sizes != counts)):
        i = int(wrong[0])
        raise ValueError(f"example {i} of the batch has {counts[i]} responses and {sizes[i]} ranks")
    return {"ranks": _floats(np.concatenate([np.asarray(example["ranks"]) for example in examples]))}


def _floats(values: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))
