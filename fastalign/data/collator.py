"""Tokenised examples to padded batches: pairs, and sequences to learn from. The one place that shifts labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastalign.data.fields import column, given, name_of, reference_tensors
from fastalign.data.prefixes import prefix_lengths
from fastalign.types import IGNORE_INDEX

_SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class PreferenceCollator:
    """Pads P pairs to a batch of 2P sequences, the P chosen ones first, on the right.

    Takes examples with `prompt_ids`, `chosen_ids`, `rejected_ids` (sequences of token ids, none empty) and optionally
    `ref_chosen_logps`, `ref_rejected_logps` (one float per completion id); other keys are left alone. Returns

        input_ids, attention_mask   (2P, T) int64
        targets                     (2P, T) int64, aligned with the hidden states: targets[b, t] = input_ids[b, t + 1]
                                    if that is a completion token, else IGNORE_INDEX
        rows                        (n,) numpy int64, ascending: flat indices b·T + t of the n targets that count
        cu_seqlens                  (2P + 1,) numpy int32: sequence b has rows[cu_seqlens[b]:cu_seqlens[b + 1]]
        groups, lengths             (2P,) numpy int64: the pair of each sequence, and its tokens without padding
        prefix_lengths              (P,) numpy int64: the tokens that both sequences of a pair begin with
        ref_per_token_logps         (n,) float32 in the order of rows        } only if given
        ref_logps                   (2P,) float32, their sums per sequence   }

    T is the longest sequence, rounded up to a multiple of `pad_to_multiple_of`. What is numpy is needed on the host and
    stays there when the batch is moved to a device. Lengths alone decide what is padding: `pad_token_id` may be any
    token, the end-of-sequence token too.

    ValueError: no examples, an empty list of ids, or reference log-probs that do not match the completions.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        _check_padding(self.pad_token_id, self.pad_to_multiple_of)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not examples:
            raise ValueError("there are no examples to collate")
        prompts = [column(example, "prompt_ids", np.int64) for example in examples] * 2
        completions = [column(example, f"{side}_ids", np.int64) for side in _SIDES for example in examples]
        prompt_lengths = np.array([len(ids) for ids in prompts])[:, None]
        completion_lengths = np.array([len(ids) for ids in completions])
        lengths = prompt_lengths + completion_lengths[:, None]  # (2P, 1)

        positions = np.arange(_width(lengths, self.pad_to_multiple_of))
        real = positions < lengths
        input_ids = np.full((len(prompts), len(positions)), self.pad_token_id, dtype=np.int64)
        input_ids[real] = np.concatenate([ids for pair in zip(prompts, completions, strict=True) for ids in pair])

        # Position t predicts token t + 1: a completion's first token is predicted by the prompt's last.
        counts = (positions >= prompt_lengths - 1) & (positions < lengths - 1)
        targets = np.full_like(input_ids, IGNORE_INDEX)
        targets[counts] = np.concatenate(completions)
        cu_seqlens = np.concatenate([[0], np.cumsum(completion_lengths)]).astype(np.int32)
        groups = np.tile(np.arange(len(examples)), 2)
        batch = {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(real.astype(np.int64)),
            "targets": torch.from_numpy(targets),
            "rows": np.flatnonzero(counts),
            "cu_seqlens": cu_seqlens,
            "groups": groups,
            "lengths": lengths[:, 0],
            "prefix_lengths": prefix_lengths(input_ids, lengths[:, 0], groups),
        }
        return batch | _reference(examples, completion_lengths, cu_seqlens)


@dataclass(frozen=True)
class CompletionCollator:
    """Pads B sequences to learn from, on the right.

    Takes examples with `input_ids` and `completion_mask` (a bool per id, True: trained on) and, where several sequences
    were packed one after the other, `seq_lengths` (the length of each); other keys are left alone. Returns

        input_ids, attention_mask   (B, T) int64
        targets                     (B, T) int64, aligned with the hidden states: targets[b, t] = input_ids[b, t + 1] if
                                    that is trained on, else IGNORE_INDEX
        rows                        (n,) numpy int64, ascending: flat indices b·T + t of the n targets that count
        cu_seqlens                  (B + 1,) numpy int32: sequence b has rows[cu_seqlens[b]:cu_seqlens[b + 1]]
        groups, lengths             (B,) numpy int64: 0 … B − 1, and the tokens of each without padding
        segment_lengths             (B, K) numpy int64: the sequences packed in each row, 0 behind  } only if packed
        position_ids                (B, T) int64, from 0 within each of them and in the padding     }

    What is numpy is needed on the host and stays there when the batch is moved to a device; see `PreferenceCollator`.

    ValueError: no examples, no ids, a mask or seq_lengths that do not match the ids, or a sequence whose first token is
    trained on: nothing predicts it.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        _check_padding(self.pad_token_id, self.pad_to_multiple_of)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not examples:
            raise ValueError("there are no examples to collate")
        ids = [column(example, "input_ids", np.int64) for example in examples]
        trained = [column(example, "completion_mask", np.bool_) for example in examples]
        segments = [_segments(example, len(own)) for example, own in zip(examples, ids, strict=True)]
        for example, own, mask, parts in zip(examples, ids, trained, segments, strict=True):
            if len(own) != len(mask):
                raise ValueError(
                    f"{name_of(example)} has {len(own)} input_ids and {len(mask)} values in completion_mask"
                )
            if mask[np.cumsum(parts) - parts].any():
                raise ValueError(
                    f"completion_mask of {name_of(example)} is true for a first token, which nothing predicts"
                )
        lengths = np.array([len(own) for own in ids])
        positions = np.arange(_width(lengths, self.pad_to_multiple_of))
        real = positions < lengths[:, None]
        input_ids = np.full(real.shape, self.pad_token_id, dtype=np.int64)
        input_ids[real] = np.concatenate(ids)
        learned = np.zeros(real.shape, dtype=bool)
        learned[real] = np.concatenate(trained)

        targets = np.full_like(input_ids, IGNORE_INDEX)  # position t predicts token t + 1
        targets[:, :-1][learned[:, 1:]] = input_ids[learned]
        batch = {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(real.astype(np.int64)),
            "targets": torch.from_numpy(targets),
            "rows": np.flatnonzero(targets != IGNORE_INDEX),
            "cu_seqlens": np.concatenate([[0], np.cumsum([mask.sum() for mask in trained])]).astype(np.int32),
            "groups": np.arange(len(examples)),
            "lengths": lengths,
        }
        return batch | (_packed(segments, real) if "seq_lengths" in examples[0] else {})


def _segments(example: Mapping[str, Any], length: int) -> np.ndarray:
    """Lengths of the sequences in one example."""
    if "seq_lengths" not in example:
        return np.array([length])
    parts = column(example, "seq_lengths", np.int64)
    if parts.sum() != length or parts.min() < 1:
        raise ValueError(f"seq_lengths of {name_of(example)} do not add up to its {length} input_ids")
    return parts


def _packed(segments: list[np.ndarray], real: np.ndarray) -> dict[str, Any]:
    lengths = np.zeros((len(segments), max(map(len, segments))), dtype=np.int64)
    positions = np.tile(np.arange(real.shape[1]), (len(segments), 1))
    for row, parts in enumerate(segments):
        lengths[row, : len(parts)] = parts
        starts = np.repeat(np.cumsum(parts) - parts, parts)
        positions[row, : len(starts)] -= starts
        positions[row, len(starts) :] -= len(starts)
    return {"segment_lengths": lengths, "position_ids": torch.from_numpy(positions)}


def _check_padding(pad_token_id: int | None, pad_to_multiple_of: int | None) -> None:
    if pad_token_id is None:
        raise ValueError("pad_token_id is None; any token id will do, the end-of-sequence token's for one")
    if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
        raise ValueError(f"pad_to_multiple_of must be at least 1 or None, got {pad_to_multiple_of}")


def _width(lengths: np.ndarray, multiple: int | None) -> int:
    longest = int(lengths.max())
    return longest if multiple is None else longest + -longest % multiple


def _reference(examples: Sequence[Mapping[str, Any]], lengths: np.ndarray, cu_seqlens: np.ndarray) -> dict[str, Any]:
    keys = [f"ref_{side}_logps" for side in _SIDES]
    if not given(examples, *keys):
        return {}
    logps = [column(example, key, np.float32) for key in keys for example in examples]
    for index, (values, length) in enumerate(zip(logps, lengths, strict=True)):
        if len(values) != length:
            side, example = _SIDES[index // len(examples)], examples[index % len(examples)]
            raise ValueError(
                f"ref_{side}_logps of {name_of(example)} has {len(values)} values for {length} {side}_ids; "
                "one for each is needed"
            )
    return reference_tensors(logps, cu_seqlens)
