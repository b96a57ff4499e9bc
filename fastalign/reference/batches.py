"""Which sequences are scored together."""

from __future__ import annotations

import numpy as np


def plan_batches(lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Indices of the sequences of each batch, longest first: little padding, and a lack of memory shows at once.

    lengths (n,) int: tokens of each sequence. batch_tokens: rows × longest length of a batch stays within it; a longer
    sequence is a batch of its own.
    Returns int64 arrays that partition 0 … n − 1; equal lengths keep their order.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    batches, start = [], 0
    while start < len(order):
        longest = int(lengths[order[start]])
        stop = min(start + max(1, batch_tokens // longest), len(order))
        batches.append(order[start:stop])
        start = stop
    return batches
