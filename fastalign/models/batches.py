"""Which sequences are run together: to be scored, or to be continued."""

from __future__ import annotations

from collections.abc import Sequence

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


def plan_scoring(
    lengths: np.ndarray, completions: np.ndarray, prompts: np.ndarray, batch_tokens: int, layout: str
) -> list[np.ndarray]:
    """Indices of the sequences of each batch, of at most `batch_tokens` tokens as the layout computes them, the longest
    first; a longer sequence is a batch of its own.

    lengths, completions (n,): tokens of each sequence, and those of them behind its prompt. prompts (n,): in the shared
    layout sequences that follow each other with the same prompt are in one batch, unless together they are too long.
    Returns int64 arrays that partition 0 … n − 1; those of a prompt stay in order, next to each other.
    """
    if layout == "padded" or not len(lengths):
        return plan_batches(lengths, batch_tokens)
    starts = np.arange(len(lengths))
    if layout == "shared":
        starts = prompt_runs(lengths, completions, prompts, batch_tokens)
    sizes = np.diff(starts, append=len(lengths))
    tokens = np.add.reduceat(completions, starts) + (lengths - completions)[starts]
    batches: list[np.ndarray] = []
    members: list[np.ndarray] = []
    total = 0
    for group in np.argsort(-np.maximum.reduceat(lengths, starts), kind="stable").tolist():
        if members and total + tokens[group] > batch_tokens:
            batches.append(np.concatenate(members))
            members, total = [], 0
        members.append(np.arange(starts[group], starts[group] + sizes[group]))
        total += int(tokens[group])
    return [*batches, np.concatenate(members)]


def prompt_runs(lengths: np.ndarray, completions: np.ndarray, prompts: np.ndarray, budget: int) -> np.ndarray:
    """(runs,) int64, where each run of sequences with one prompt starts; a run is cut where its tokens, the prompt
    counted once, would exceed the budget. (n,) each, n at least 1: see `plan_scoring`.
    """
    same = (prompts[1:] == prompts[:-1]) & (np.diff(lengths - completions) == 0)
    starts, total = [0], int(lengths[0])
    for i in range(1, len(lengths)):
        total += int(completions[i])
        if not same[i - 1] or total > budget:
            starts.append(i)
            total = int(lengths[i])
    return np.array(starts, np.int64)


def shared_prefixes(ids: np.ndarray, lengths: np.ndarray, starts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Groups of consecutive sequences with the same prompt: (group of each sequence (S,), common tokens (groups,)).

    ids (S, T) padded, lengths and starts (S,): tokens, and where completions begin. What members have in common beyond
    the prompt is counted; a group of one has 0.
    """
    begin = np.asarray(starts, np.int64)
    same = ids[1:] == ids[:-1]
    both = np.minimum(lengths[1:], lengths[:-1])
    common = np.minimum(np.where(same.all(axis=1), ids.shape[1], same.argmin(axis=1)), both)
    joined = (begin[1:] == begin[:-1]) & (common >= begin[1:])
    groups = np.concatenate([[0], np.cumsum(~joined)])
    prefixes = np.full(int(groups[-1]) + 1, np.iinfo(np.int64).max)
    np.minimum.at(prefixes, groups[1:][joined], common[joined])
    return groups, np.where(np.bincount(groups) > 1, prefixes, 0)


def prompt_number(prompt: Sequence[int] | np.ndarray) -> int:
    """A number that equal prompts have in common; that different ones do too is possible, and `shared_prefixes` tells
    them apart.
    """
    return hash(prompt.tobytes() if isinstance(prompt, np.ndarray) else tuple(prompt))
