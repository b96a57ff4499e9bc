"""What the sequences of a group begin with in common, so that a model need compute it once only."""

from __future__ import annotations

import numpy as np


def prefix_lengths(ids: np.ndarray, lengths: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(G,) int64: the tokens that all sequences of a group begin with, 0 where a group has one sequence.

    ids (S, T) padded on the right, lengths (S,) without padding, groups (S,) of numbers 0 … G − 1. It is the longest
    prefix by token ids: completions that begin alike lengthen it beyond the prompt.
    """
    ids, lengths, groups = np.asarray(ids), np.asarray(lengths), np.asarray(groups)
    count = int(groups.max(initial=-1)) + 1
    first = np.zeros(count, np.int64)
    first[groups[::-1]] = np.arange(len(groups))[::-1]  # the last write stays: the first sequence of each group
    theirs = first[groups]
    common = np.minimum(lengths, lengths[theirs])
    differs = (ids != ids[theirs]) | (np.arange(ids.shape[1]) >= common[:, None])
    with_first = np.where(differs.any(axis=1), differs.argmax(axis=1), ids.shape[1])
    shortest = np.full(count, ids.shape[1], np.int64)
    np.minimum.at(shortest, groups, with_first)
    return np.where(np.bincount(groups, minlength=count) > 1, shortest, 0)
