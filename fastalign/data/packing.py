"""Packing: several sequences in one example, so that a batch has hardly any padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Sequence

import datasets
import numpy as np
import pyarrow

from fastalign.data.preparation import IDS, MASK, fingerprint

PACKING_STRATEGIES = ("bfd", "bfd_split")
"""How sequences are put together; both by best fit, longest first, and deterministic.

bfd         a sequence stays whole; one over max_length is an error (truncate when tokenising)
bfd_split   a sequence over max_length is cut into pieces of that length, each of which begins anew
"""

_SCHEMA = pyarrow.schema([("input_ids", IDS), ("completion_mask", MASK), ("seq_lengths", IDS), ("rows", IDS)])


def best_fit_decreasing(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Bins of sequence numbers whose lengths add up to at most `capacity`.

    Longest first, each into the fullest bin that has room for it. Bins come in the order of their first sequence,
    sequences within a bin in their own order. ValueError: a length over capacity.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"sequence {lengths.argmax()} has {lengths.max()} tokens, max_length={capacity} is accepted")
    bins: list[list[int]] = []
    with_room: defaultdict[int, deque[int]] = defaultdict(deque)  # bins by the room they have left
    rooms: list[int] = []  # that some bin has left, ascending
    for sequence in np.argsort(-lengths, kind="stable"):
        length = int(lengths[sequence])
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            number = with_room[room].popleft()
            if not with_room[room]:
                rooms.pop(at)
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(int(sequence))
        left = room - length
        if left:
            if not with_room[left]:
                insort(rooms, left)
            with_room[left].append(number)
    return sorted((sorted(members) for members in bins), key=lambda members: members[0])


def pack(dataset: datasets.Dataset, max_length: int, strategy: str = "bfd") -> datasets.Dataset:
    """Tokenised sequences (`prepare_completions`) packed into examples of at most `max_length` tokens.

    Columns: input_ids and completion_mask, of the sequences one after the other; seq_lengths, of each; rows, theirs in
    the source. No attention may pass between them: `CompletionCollator` says where they lie. A piece that "bfd_split"
    leaves without a token to train on is dropped.

    ValueError: an unknown strategy, max_length below 2, or with "bfd" a sequence that is longer.
    """
    if strategy not in PACKING_STRATEGIES:
        raise ValueError(f"packing strategy {strategy!r} is unknown; accepted are {', '.join(PACKING_STRATEGIES)}")
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 to pack sequences, got {max_length}")
    table = dataset.with_format("arrow")[:]
    ids, mask = (_Lists(table.column(name)) for name in ("input_ids", "completion_mask"))
    source = np.asarray(table.column("row")) if "row" in table.column_names else np.arange(len(dataset))
    pieces = _pieces(ids.lengths, max_length if strategy != "bfd" else None)
    keep = np.array([mask.part(s, first + 1, n - 1).any() for s, first, n in zip(*pieces, strict=True)], bool)
    sequences, firsts, lengths = (part[keep] for part in pieces)

    columns: list[list[np.ndarray]] = [[] for _ in _SCHEMA]
    for members in best_fit_decreasing(lengths, max_length):
        parts = [(sequences[m], firsts[m], lengths[m]) for m in members]
        trained = [mask.part(*part).copy() for part in parts]
        for own in trained:
            own[0] = False  # a piece's first token is predicted by nothing
        values = (
            np.concatenate([ids.part(*part) for part in parts]),
            np.concatenate(trained),
            lengths[members],
            source[sequences[members]],
        )
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    arrays = [pyarrow.array(column, type=field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
    packed = pyarrow.Table.from_arrays(arrays, schema=_SCHEMA)
    return datasets.Dataset(packed, fingerprint=fingerprint(packed))


class _Lists:
    """A column of lists, each to be had without a copy. A chunk's offsets are 32 bits wide, which the tokens of all of
    them may exceed: they are never joined.
    """

    def __init__(self, column: pyarrow.ChunkedArray) -> None:
        bounds = [np.asarray(chunk.offsets).astype(np.int64) for chunk in column.chunks]
        none = [np.zeros(0, np.int64)]
        self._values = [chunk.values.to_numpy(zero_copy_only=False) for chunk in column.chunks]
        self._chunk = np.repeat(np.arange(len(bounds)), [len(own) - 1 for own in bounds])
        self._start = np.concatenate(none + [own[:-1] for own in bounds])
        self.lengths = np.concatenate(none + [np.diff(own) for own in bounds])

    def part(self, number: int, first: int, length: int) -> np.ndarray:
        """`length` values of a list, from its `first` on."""
        start = self._start[number] + first
        values: np.ndarray = self._values[self._chunk[number]][start : start + length]
        return values


def _pieces(lengths: np.ndarray, max_length: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sequence, first token, length) of each sequence, cut where it is longer than max_length."""
    sequences = np.arange(len(lengths))
    if max_length is None or not len(lengths):
        return sequences, np.zeros_like(lengths), lengths
    counts = -(-lengths // max_length)
    firsts = np.concatenate([np.arange(count) for count in counts]) * max_length
    return np.repeat(sequences, counts), firsts, np.minimum(np.repeat(lengths, counts) - firsts, max_length)
