"""Responses that are good or not, each by itself: what KTO and its relatives learn from.

examples      prompt_ids, completion_ids, label (bool): rows of `prepare_labelled`, or the two sides of a pair
mismatched    kl_completion_ids: another prompt's response, for the estimate of the policy's KL to the reference
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow
import torch
from datasets import Dataset

from fastalign.data.collator import CompletionCollator
from fastalign.data.fields import given, joined, name_of, reference_tensors
from fastalign.data.preparation import check_countable, fingerprint

KL_COLUMN = "kl_completion_ids"


def unpair(dataset: Dataset) -> Dataset:
    """Tokenised pairs as twice as many labelled responses: of each pair the chosen one, then the rejected one.

    Columns prompt_ids, completion_ids, label and, where there is one, row (the pair's).
    """
    table = dataset.with_format("arrow")[:]
    check_countable(table, "prompt_ids", "chosen_ids", "rejected_ids")
    count = len(table)
    twice = np.repeat(np.arange(count), 2)
    sides = pyarrow.chunked_array([*table["chosen_ids"].chunks, *table["rejected_ids"].chunks])
    columns = {
        "prompt_ids": table["prompt_ids"].take(twice),
        "completion_ids": sides.take(np.arange(2 * count).reshape(2, count).T.ravel()),
        "label": pyarrow.array(np.tile([True, False], count)),
    }
    if "row" in table.column_names:
        columns["row"] = table["row"].take(twice)
    made = pyarrow.table(columns)
    return Dataset(made, fingerprint=fingerprint(made))


def with_mismatched(dataset: Dataset, *, stride: int = 1, max_length: int | None = None) -> Dataset:
    """The examples with `kl_completion_ids`, a response that was given to another prompt; always the same one.

    Example i gets the response of example i + stride or, where that has the same prompt, of the first one of
    i + 2·stride, i + 3·stride, … (cyclic) that has another, cut to the room that its prompt leaves in max_length.
    stride: 1; 2 for pairs behind `unpair`, so that good responses stand for good ones and bad for bad.

    TRL shifts by one too, but inside each device batch, so that its pairing depends on the batch size, and without a
    look at the prompts: neighbours that share one are no mismatch. ValueError: fewer than two different prompts.
    """
    columns = dataset.select_columns(["prompt_ids", "completion_ids"]).with_format("arrow")[:]
    check_countable(columns, "prompt_ids", "completion_ids")
    prompts, lengths = _numbered(columns["prompt_ids"].combine_chunks())
    if len(lengths) and prompts.max() == 0:
        raise ValueError(
            f"the {len(prompts)} examples have one prompt: the KL to the reference is estimated from responses to "
            "other prompts, so there must be two at least"
        )
    partners = _partners(prompts, stride)
    responses = columns["completion_ids"].combine_chunks().take(pyarrow.array(partners))
    if max_length is not None:
        responses = _shortened(responses, np.maximum(max_length - lengths, 0))
    if KL_COLUMN in dataset.column_names:
        dataset = dataset.remove_columns(KL_COLUMN)
    return dataset.add_column(KL_COLUMN, responses)


def _shortened(lists: pyarrow.ListArray, room: np.ndarray) -> pyarrow.ListArray:
    """Each list up to so many values."""
    offsets = np.asarray(lists.offsets).astype(np.int64)
    kept = np.minimum(np.diff(offsets), room)
    ends = np.cumsum(kept)
    index = np.arange(kept.sum()) + np.repeat(offsets[:-1] - (ends - kept), kept)
    bounds = pyarrow.array(np.concatenate([[0], ends]), type=lists.offsets.type)
    return type(lists).from_arrays(bounds, lists.values.take(pyarrow.array(index)), type=lists.type)


def _numbered(column: pyarrow.Array) -> tuple[np.ndarray, np.ndarray]:
    """(n,) numbers, equal where the lists are equal, and (n,) their lengths."""
    offsets = np.asarray(column.offsets)
    values = np.ascontiguousarray(np.asarray(column.values))
    numbers: dict[bytes, int] = {}
    found = [numbers.setdefault(values[start:stop].tobytes(), len(numbers)) for start, stop in pairwise(offsets)]
    return np.array(found, np.int64), np.diff(offsets)


def _partners(prompts: np.ndarray, stride: int) -> np.ndarray:
    """(n,) for each example the first of those `stride` apart whose prompt is another one."""
    count = len(prompts)
    partners = (np.arange(count) + stride) % count
    pending = np.flatnonzero(prompts[partners] == prompts)
    for _ in range(count):
        if not len(pending):
            return partners
        partners[pending] = (partners[pending] + stride) % count
        pending = pending[prompts[partners[pending]] == prompts[pending]]
    return _partners(prompts, 1)  # a stride may go round among equal prompts alone


@dataclass(frozen=True)
class UnpairedCollator:
    """Pads S labelled responses to a batch of S sequences, on the right.

    Takes examples with `prompt_ids`, `completion_ids` (token ids, none empty), `label` (a bool) and optionally
    `ref_completion_logps` (one float per completion id), `kl_completion_ids` (another prompt's response) and with it
    `ref_kl_logps`; other keys are left alone. Returns

        input_ids, attention_mask, targets      (S, T) int64; targets aligned with the hidden states
        rows, cu_seqlens, groups, lengths       numpy, as `CompletionCollator` has them; a group is one response
        prompts                                 (S,) numpy int64: a number that equal prompts have in common
        labels                                  (S,) bool: whether the response is good
        ref_per_token_logps                     (n,) float32 in the order of rows         } only if given
        ref_logps                               (S,) float32, their sums per sequence     }
        kl                                      a batch of the same layout, without labels, of prompts with
                                                kl_completion_ids; only if given

    What is numpy is needed on the host and stays there. ValueError: no examples, an empty list of ids, or reference
    log-probs that do not match the completions.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        CompletionCollator(self.pad_token_id, self.pad_to_multiple_of)  # checks both

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self._sequences(examples, "completion_ids", "ref_completion_logps")
        batch["labels"] = torch.tensor([bool(example["label"]) for example in examples])
        if given(examples, KL_COLUMN):
            batch["kl"] = self._sequences(examples, KL_COLUMN, "ref_kl_logps")
        return batch

    def _sequences(self, examples: Sequence[Mapping[str, Any]], ids: str, logps: str) -> dict[str, Any]:
        sequences = [joined(example, ids) for example in examples]
        batch = CompletionCollator(self.pad_token_id, self.pad_to_multiple_of)(sequences)
        numbers: dict[bytes, int] = {}
        prompts = [np.asarray(example["prompt_ids"], np.int64).tobytes() for example in examples]
        batch["prompts"] = np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts])
        if not given(examples, logps):
            return batch
        values = [np.asarray(example[logps], np.float32) for example in examples]
        for example, own, length in zip(examples, values, np.diff(batch["cu_seqlens"]), strict=True):
            if len(own) != length:
                raise ValueError(
                    f"{logps} of {name_of(example)} has {len(own)} values for {length} {ids}; one for each is needed"
                )
        return batch | reference_tensors(values, batch["cu_seqlens"])
