"""Which of the sequences to score have the same prompt, so that it goes through the model once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from fastalign.models.batches import prompt_number
from fastalign.reference.sequences import TokenSequence


class PromptNotes:
    """Sequences as they pass by; afterwards `prompts` has a number for each that tells its prompt from others.

    Equal prompts have equal numbers; that different ones do too is possible and does no harm (see
    `fastalign.models.batches.shared_prefixes`).
    """

    def __init__(self, sequences: Iterable[TokenSequence]) -> None:
        self._sequences = sequences
        self._found: list[int] = []

    def __iter__(self) -> Iterator[TokenSequence]:
        for sequence in self._sequences:
            ids, start = sequence
            self._found.append(prompt_number(ids[: max(int(start), 0)]))
            yield sequence

    @property
    def prompts(self) -> np.ndarray:
        """(n,) int64."""
        return np.array(self._found, np.int64)
