"""Which sequences are run together: to be scored, or to be continued."""

from __future__ import annotations

import numpy as np


def plan_batches(lengths: np.ndarray, batch_tokens: int, max_rows: int | None = None) -> list[np.ndarray]:
    """Indices of the sequences of each batch, longest first: little padding, and a lack of memory shows at once.

    lengths (n,) int: tokens of each sequence. batch_tokens: rows × longest length of a batch stays within it; a longer
    sequence is a batch of its own. max_rows: sequences of a batch, at most.
    Returns int64 arrays that partition 0 … n − 1; equal lengths keep their order.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    batches, start = [], 0
    while start < len(order):
        longest = int(lengths[order[start]])
        rows = max(1, batch_tokens // longest)
        stop = min(start + (rows if max_rows is None else min(rows, max_rows)), len(order))
        batches.append(order[start:stop])
        start = stop
    return batches
