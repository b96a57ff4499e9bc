"""Cutting a padded batch between examples: pairs, lists or single sequences.

A loss that is a sum over examples may take a batch through the model in pieces whose gradients add up to that of the
whole. Pieces of examples of like length need less padding, and only one piece's activations are alive at a time.
Everything here is planned on the host from `groups`, `lengths`, `prefix_lengths`, `rows` and `cu_seqlens`, without a
device synchronisation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastalign.data.packing import best_fit_decreasing
from fastalign.models.batches import prompt_runs

Batch = dict[str, Any]

ROW_NUMBERS = "row_numbers"
"""Of a batch, where it is known: (examples,) numpy int64, the data set's rows that its examples were read from."""


def sequence_groups(batch: Batch) -> np.ndarray:
    """(S,) int64, on the host: the example that each sequence belongs to, numbered from 0."""
    return np.asarray(batch["groups"])


def num_examples(batch: Batch) -> int:
    """How many pairs, lists or single sequences a batch holds."""
    groups = sequence_groups(batch)
    return int(groups.max()) + 1 if len(groups) else 0


def sequence_lengths(batch: Batch) -> np.ndarray:
    """(S,) int64, on the host: tokens of each sequence without padding."""
    return np.asarray(batch["lengths"])


def prefix_lengths(batch: Batch) -> np.ndarray:
    """(examples,) int64, on the host: tokens that all sequences of an example begin with; 0 where that is unknown."""
    if "prefix_lengths" in batch:
        return np.asarray(batch["prefix_lengths"])
    return np.zeros(num_examples(batch), dtype=np.int64)


def example_tokens(batch: Batch, layout: str = "packed") -> np.ndarray:
    """(examples,) int64: the tokens that each example's sequences have in the layout "packed" or "shared"."""
    groups = sequence_groups(batch)
    total = num_examples(batch)
    tokens = np.bincount(groups, weights=sequence_lengths(batch), minlength=total).astype(np.int64)
    if layout == "shared":
        tokens -= (np.bincount(groups, minlength=total) - 1) * prefix_lengths(batch)
    return tokens


def computed_tokens(batch: Batch, layout: str) -> int:
    """Tokens that go through the model when the batch does, padding included."""
    return batch["input_ids"].numel() if layout == "padded" else int(example_tokens(batch, layout).sum())


def grouped_by_prompt(batch: Batch, max_tokens: int = 0) -> Batch:
    """A batch whose examples are the sequences of a prompt each, instead of single ones: those that may share it.

    batch: single sequences, with `prompts` (S,), the number of each one's prompt; what is scored is all behind it.
    max_tokens: sequences of a prompt that have more tokens, the prompt counted once, become several examples, so that
    a piece of the batch need not exceed it; 0 is no limit.
    """
    prompts, lengths = np.asarray(batch["prompts"]), sequence_lengths(batch)
    scored = np.diff(batch["cu_seqlens"])
    order = np.argsort(prompts, kind="stable")
    starts = prompt_runs(lengths[order], scored[order], prompts[order], max_tokens or int(lengths.sum()))
    sizes = np.diff(starts, append=len(order))
    groups = np.empty(len(order), np.int64)
    groups[order] = np.repeat(np.arange(len(starts)), sizes)
    first = order[starts]
    return batch | {"groups": groups, "prefix_lengths": np.where(sizes > 1, (lengths - scored)[first], 0)}


def split_batch(
    batch: Batch, max_tokens: int, *, layout: str = "padded", examples: int | None = None,
    multiple_of: int | None = None,
) -> list[Batch]:  # fmt: skip
    """The batch in pieces of whole examples with at most `max_tokens` tokens each (one example may have more).

    max_tokens: 0 makes one piece. layout: how the pieces will go through the model: "padded" counts padding, "shared"
    counts once what an example's sequences have in common. examples: keep only the first so many. multiple_of: padded
    pieces' lengths are rounded up to a multiple of it. Pieces come longest first (of packed ones, the largest), so that
    a lack of memory shows at once; within a piece sequences keep their order.

    Of the batch's other entries, tensors and arrays as long as it has sequences are cut by sequence, as long as it has
    rows by row, as long as it has examples by example; where these counts are equal the cuts are too.
    """
    total = num_examples(batch)
    kept = total if examples is None else min(examples, total)
    if kept == 0:
        return []
    groups, lengths = sequence_groups(batch), sequence_lengths(batch)
    longest = np.zeros(total, dtype=np.int64)
    np.maximum.at(longest, groups, lengths)
    if max_tokens == 0:
        pieces = [np.arange(kept)]
    elif layout == "padded":
        pieces = _padded_pieces(longest[:kept], np.bincount(groups, minlength=total)[:kept], max_tokens, multiple_of)
    else:
        pieces = _packed_pieces(example_tokens(batch, layout)[:kept], max_tokens)
    if len(pieces) == 1 and kept == total:
        return [batch]
    return [_take(batch, piece, _rounded(int(longest[piece].max()), multiple_of)) for piece in pieces]


def _padded_pieces(longest: np.ndarray, sizes: np.ndarray, max_tokens: int, multiple: int | None) -> list[np.ndarray]:
    """Examples of like length, filled up with padding to their longest sequence."""
    order = np.argsort(-longest, kind="stable")
    pieces: list[np.ndarray] = []
    start = 0
    while start < len(order):
        width = _rounded(int(longest[order[start]]), multiple)
        tokens = np.cumsum(sizes[order[start:]]) * width
        room = max(int(np.searchsorted(tokens, max_tokens, side="right")), 1)
        pieces.append(np.sort(order[start : start + room]))
        start += room
    return pieces


def _packed_pieces(tokens: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """As few pieces as best fit finds."""
    pieces = [np.array(piece) for piece in best_fit_decreasing(np.minimum(tokens, max_tokens), max_tokens)]
    return sorted(pieces, key=lambda piece: -int(tokens[piece].sum()))


def _rounded(length: int, multiple_of: int | None) -> int:
    return length if multiple_of is None else length + -length % multiple_of


def _take(batch: Batch, examples: np.ndarray, width: int) -> Batch:
    """The sub-batch of some examples, cut or padded to nothing more than `width` columns."""
    groups, cu_seqlens, rows = sequence_groups(batch), np.asarray(batch["cu_seqlens"]), np.asarray(batch["rows"])
    sequences = np.flatnonzero(np.isin(groups, examples))
    old_width = batch["input_ids"].shape[1]
    width = min(width, old_width)
    spans = [np.arange(cu_seqlens[s], cu_seqlens[s + 1]) for s in sequences]
    taken = np.concatenate(spans)
    counts = np.array([len(span) for span in spans])
    shift = np.repeat(np.arange(len(sequences)), counts) * width
    piece: Batch = {}
    for name, value in batch.items():
        if name == "groups":
            piece[name] = np.searchsorted(examples, groups[sequences])
        elif name == "rows":
            piece[name] = rows[taken] % old_width + shift
        elif name == "cu_seqlens":
            piece[name] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        elif len(value) == len(groups):
            part = _select(value, sequences)
            piece[name] = part[:, :width] if value.ndim > 1 and value.shape[1] == old_width else part
        elif len(value) == len(rows):
            piece[name] = _select(value, taken)
        elif len(value) == num_examples(batch):
            piece[name] = _select(value, examples)
        else:
            raise ValueError(f"{name} of the batch has {len(value)} entries: neither one a sequence, row nor example")
    return piece


def _select(values: Tensor | np.ndarray, index: np.ndarray) -> Tensor | np.ndarray:
    if isinstance(values, np.ndarray):
        return values[index]
    return values.index_select(0, torch.from_numpy(index).to(values.device, non_blocking=True))


def select_examples(batch: Batch, examples: np.ndarray) -> Batch:
    """The sub-batch of some examples, ascending, cut to its longest sequence."""
    members = np.isin(sequence_groups(batch), examples)
    return _take(batch, examples, int(sequence_lengths(batch)[members].max()))
