"""Tokenised ranked lists to padded batches of sequences to score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastalign.data.collator import CompletionCollator
from fastalign.data.fields import given, joined, name_of, reference_tensors
from fastalign.data.prefixes import prefix_lengths


@dataclass(frozen=True)
class ListCollator:
    """Pads L lists to a batch of S sequences, one a response, list after list, on the right.

    Takes examples with `prompt_ids`, `response_ids` (K lists of token ids, none empty; K may differ), `ranks` (K
    numbers, 1 is best) and optionally `scores` (K numbers) and `ref_response_logps` (K lists of one float a token);
    other keys are left alone. Returns

        input_ids, attention_mask, targets      (S, T) int64; targets aligned with the hidden states
        rows, cu_seqlens, lengths               numpy, as `CompletionCollator` has them; rows are those of responses
        groups                                  (S,) numpy int64: the list of each sequence
        prefix_lengths                          (L,) numpy int64: the tokens that all sequences of a list begin with
        ranks                                   (S,) float32
        rewards                                 (S,) float32, the scores                  }
        ref_per_token_logps                     (n,) float32 in the order of rows         } only if given
        ref_logps                               (S,) float32, their sums per sequence     }

    What is numpy is needed on the host and stays there. ValueError: no examples, an empty list of ids, or ranks, scores
    or reference log-probs that do not match the responses.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        CompletionCollator(self.pad_token_id, self.pad_to_multiple_of)  # checks both

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        sequences = [joined(example, "response_ids", ids) for example in examples for ids in example["response_ids"]]
        if not sequences:
            raise ValueError("there are no examples to collate")
        batch = CompletionCollator(self.pad_token_id, self.pad_to_multiple_of)(sequences)
        sizes = [len(example["response_ids"]) for example in examples]
        batch["groups"] = np.repeat(np.arange(len(examples)), sizes)
        batch["prefix_lengths"] = prefix_lengths(batch["input_ids"].numpy(), batch["lengths"], batch["groups"])
        batch["ranks"] = _per_response(examples, "ranks")
        if given(examples, "scores"):
            batch["rewards"] = _per_response(examples, "scores")
        return batch | (_reference(examples, batch["cu_seqlens"]) if given(examples, "ref_response_logps") else {})


def _per_response(examples: Sequence[Mapping[str, Any]], column: str) -> torch.Tensor:
    for example in examples:
        if len(example[column]) != len(example["response_ids"]):
            raise ValueError(
                f"{column} of {name_of(example)} has {len(example[column])} values for "
                f"{len(example['response_ids'])} responses"
            )
    values = np.concatenate([np.asarray(example[column], np.float32) for example in examples])
    return torch.from_numpy(values)


def _reference(examples: Sequence[Mapping[str, Any]], cu_seqlens: np.ndarray) -> dict[str, Any]:
    logps = [np.asarray(own, np.float32) for example in examples for own in example["ref_response_logps"]]
    for example in examples:
        counts = [list(map(len, example[name])) for name in ("ref_response_logps", "response_ids")]
        if counts[0] != counts[1]:
            raise ValueError(f"ref_response_logps of {name_of(example)} are not one for each token of its response_ids")
    return reference_tensors(logps, cu_seqlens)
