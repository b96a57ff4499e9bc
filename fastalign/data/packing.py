"""Packing: several sequences in one example, so that a batch has hardly any padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
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
    with_room: list[deque[int]] = [deque() for _ in range(capacity + 1)]  # bins by the room they have left
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
    ids, mask = (table.column(name).combine_chunks() for name in ("input_ids", "completion_mask"))
    offsets = np.asarray(ids.offsets).astype(np.int64)
    tokens, trained = ids.values.to_numpy(), mask.values.to_numpy(zero_copy_only=False)
    mask_shift = np.asarray(mask.offsets).astype(np.int64)[0] - offsets[0]
    source = np.asarray(table.column("row")) if "row" in table.column_names else np.arange(len(dataset))
    starts, lengths, rows = _pieces(offsets[:-1], np.diff(offsets), source, max_length if strategy != "bfd" else None)

    columns: list[list[np.ndarray]] = [[] for _ in _SCHEMA]
    keep = [trained[s + mask_shift + 1 : s + mask_shift + n].any() for s, n in zip(starts, lengths, strict=True)]
    starts, lengths, rows = starts[keep], lengths[keep], rows[keep]
    for members in best_fit_decreasing(lengths, max_length):
        parts = [slice(starts[m], starts[m] + lengths[m]) for m in members]
        shifted = [trained[part.start + mask_shift : part.stop + mask_shift].copy() for part in parts]
        for part in shifted:
            part[0] = False  # a piece's first token is predicted by nothing
        values = (
            np.concatenate([tokens[part] for part in parts]),
            np.concatenate(shifted),
            lengths[members],
            rows[members],
        )
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    arrays = [pyarrow.array(column, type=field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
    packed = pyarrow.Table.from_arrays(arrays, schema=_SCHEMA)
    return datasets.Dataset(packed, fingerprint=fingerprint(packed))


def _pieces(
    starts: np.ndarray, lengths: np.ndarray, rows: np.ndarray, max_length: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(start, length, row) of each sequence, cut where it is longer than max_length."""
    if max_length is None or not len(lengths):
        return starts, lengths, rows
    counts = -(-lengths // max_length)
    number = np.concatenate([np.arange(count) for count in counts])  # of a piece within its sequence
    first = np.repeat(starts, counts) + number * max_length
    ends = np.repeat(starts + lengths, counts)
    return first, np.minimum(ends - first, max_length), np.repeat(rows, counts)
