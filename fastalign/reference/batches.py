"""Which sequences are scored together: those of one prompt, so that it goes through the model once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from fastalign.models.batches import plan_batches
from fastalign.reference.sequences import TokenSequence


class PromptNotes:
    """Sequences as they pass by; afterwards `prompts` has a number for each that tells its prompt from others.

    Equal prompts have equal numbers; that different ones do too is possible and does no harm (see `shared_prefixes`).
    """

    def __init__(self, sequences: Iterable[TokenSequence]) -> None:
        self._sequences = sequences
        self._found: list[int] = []

    def __iter__(self) -> Iterator[TokenSequence]:
        for sequence in self._sequences:
            ids, start = sequence
            prompt = ids[: max(int(start), 0)]
            self._found.append(hash(prompt.tobytes() if isinstance(prompt, np.ndarray) else tuple(prompt)))
            yield sequence

    @property
    def prompts(self) -> np.ndarray:
        """(n,) int64."""
        return np.array(self._found, np.int64)


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
        starts = _group_starts(lengths, completions, prompts, batch_tokens)
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


def _group_starts(lengths: np.ndarray, completions: np.ndarray, prompts: np.ndarray, budget: int) -> np.ndarray:
    """Where each run of sequences with one prompt starts; a run over the budget is cut."""
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
