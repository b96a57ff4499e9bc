"""Cutting a padded preference batch between pairs.

A preference loss is a sum over pairs, so a batch may go through the model in pieces whose gradients add up to that of
the whole. Pieces of pairs of like length need less padding, and only one piece's activations are alive at a time.
Everything here is planned on the host from `rows` and `cu_seqlens`, without a device synchronisation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Batch = dict[str, Any]

_PADDED = ("input_ids", "attention_mask", "targets")  # (2P, T)


def num_pairs(batch: Batch) -> int:
    """P, of a batch of `PreferenceCollator`."""
    return (len(batch["cu_seqlens"]) - 1) // 2


def sequence_lengths(batch: Batch) -> np.ndarray:
    """(2P,) int64, on the host: tokens of each sequence without padding."""
    width = batch["targets"].shape[1]
    last = np.asarray(batch["rows"])[np.asarray(batch["cu_seqlens"][1:]) - 1]  # the row that predicts the last token
    return last % width + 2


def split_batch(
    batch: Batch, max_tokens: int, *, pairs: int | None = None, multiple_of: int | None = None
) -> list[Batch]:
    """The batch in pieces of whole pairs with at most `max_tokens` padded tokens each (one pair may have more).

    max_tokens: 0 makes one piece. pairs: keep only the first so many pairs. multiple_of: pieces' lengths are rounded
    up to a multiple of it. Pieces come longest first, so that a lack of memory shows at once; within a piece pairs
    keep their order.
    """
    total = num_pairs(batch)
    kept = total if pairs is None else min(pairs, total)
    if kept == 0:
        return []
    lengths = sequence_lengths(batch)
    longest = np.maximum(lengths[:total], lengths[total:])[:kept]
    order = np.argsort(-longest, kind="stable")
    pieces: list[np.ndarray] = []
    start = 0
    while start < kept:
        room = kept if max_tokens == 0 else max(max_tokens // (2 * int(longest[order[start]])), 1)
        pieces.append(np.sort(order[start : start + room]))
        start += room
    if len(pieces) == 1 and kept == total:
        return [batch]
    return [_take(batch, piece, _rounded(int(longest[piece].max()), multiple_of)) for piece in pieces]


def _rounded(length: int, multiple_of: int | None) -> int:
    return length if multiple_of is None else length + -length % multiple_of


def _take(batch: Batch, pairs: np.ndarray, width: int) -> Batch:
    """The sub-batch of some pairs, cut or padded to nothing more than `width` columns."""
    total = num_pairs(batch)
    cu_seqlens, rows = np.asarray(batch["cu_seqlens"]), np.asarray(batch["rows"])
    sequences = np.concatenate([pairs, pairs + total])
    old_width = batch["targets"].shape[1]
    width = min(width, old_width)
    spans = [np.arange(cu_seqlens[s], cu_seqlens[s + 1]) for s in sequences]
    taken = np.concatenate(spans)
    counts = np.array([len(span) for span in spans])
    shift = np.repeat(np.arange(len(sequences)), counts) * width
    piece: Batch = {name: _select(batch[name], sequences)[:, :width] for name in _PADDED}
    piece["rows"] = rows[taken] % old_width + shift
    piece["cu_seqlens"] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    if "ref_logps" in batch:
        piece["ref_logps"] = _select(batch["ref_logps"], sequences)
    if "ref_per_token_logps" in batch:
        piece["ref_per_token_logps"] = _select(batch["ref_per_token_logps"], taken)
    return piece


def _select(tensor: Tensor, index: np.ndarray) -> Tensor:
    return tensor.index_select(0, torch.from_numpy(index).to(tensor.device, non_blocking=True))
