"""What is scored, and its key: blake2b-128 of (reference digest, completion start, token ids)."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

import numpy as np

KEY_BYTES = 16
_PERSON = b"fastalign.seq.1"  # separates these digests from any other use of blake2b


class TokenSequence(NamedTuple):
    """Token ids and the position from which they are scored: the completion is input_ids[completion_start:].

    input_ids: list of int, or a 1-D integer array. 1 ≤ completion_start < len(input_ids): the first token has nothing
    before it to be predicted from. A plain tuple (input_ids, completion_start) is as good.
    """

    input_ids: Sequence[int]
    completion_start: int


Scorer = Callable[[list[TokenSequence]], list[np.ndarray]]
"""Sequences → log-probs of their completions: one float32 array (len(input_ids) − completion_start,) each."""


class PreferenceSequences(Sequence[TokenSequence]):
    """The two sequences of each tokenised example, prompt + chosen and prompt + rejected, interleaved.

    examples: anything with len() and [i] that gives dicts of prompt_ids, chosen_ids and rejected_ids (lists or arrays).
    Item 2i is the chosen response of example i, item 2i + 1 the rejected one. Nothing is copied up front.
    responses: the columns behind prompt_ids, if they are others; k of them make items k·i … k·i + k − 1.
    """

    def __init__(
        self, examples: Sequence[Mapping[str, Any]], responses: Sequence[str] = ("chosen_ids", "rejected_ids")
    ) -> None:
        self._examples, self._responses = examples, tuple(responses)

    def __len__(self) -> int:
        return len(self._responses) * len(self._examples)

    @overload
    def __getitem__(self, index: int) -> TokenSequence: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenSequence]: ...
    def __getitem__(self, index: int | slice) -> TokenSequence | list[TokenSequence]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        example, side = divmod(index % len(self), len(self._responses))
        return self._of(self._examples[example])[side]

    def __iter__(self) -> Iterator[TokenSequence]:
        for example in self._examples:  # one read of the example serves all its responses
            yield from self._of(example)

    def _of(self, example: Mapping[str, Any]) -> list[TokenSequence]:
        prompt = example["prompt_ids"]
        return [TokenSequence(_joined(prompt, example[name]), len(prompt)) for name in self._responses]


def _joined(prompt: Any, response: Any) -> Any:
    if isinstance(prompt, list) and isinstance(response, list):
        return prompt + response
    return np.concatenate([np.asarray(prompt), np.asarray(response)])


def sequence_keys(digest: str, sequences: Iterable[TokenSequence]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys (n, 16) uint8, lengths (n,) int64 of the whole sequences, and completion lengths (n,) int64.

    digest: the reference's, 64 hexadecimal digits. Raises ValueError, naming the sequence's position, for a completion
    start outside 1 … len − 1 and for ids that are not integers in [0, 2³²).
    """
    root = hashlib.blake2b(bytes.fromhex(digest), digest_size=KEY_BYTES, person=_PERSON)
    keys, lengths, completions = bytearray(), [], []
    for position, (input_ids, start) in enumerate(sequences):
        length = checked_length(position, input_ids, start)
        key = root.copy()
        key.update(int(start).to_bytes(8, "little"))
        key.update(_id_bytes(input_ids, position))
        keys += key.digest()
        lengths.append(length)
        completions.append(length - start)
    return (
        np.frombuffer(bytes(keys), np.uint8).reshape(-1, KEY_BYTES),
        np.array(lengths, np.int64),
        np.array(completions, np.int64),
    )


def checked_length(position: int, input_ids: Sequence[int], start: int) -> int:
    """Tokens of the sequence. Raises ValueError, naming its position, unless at least one of them can be scored."""
    length = len(input_ids)
    if not 1 <= start < length:
        raise ValueError(
            f"sequence {position}: completion_start must lie in 1 … {length - 1} for {length} tokens, got {start}"
        )
    return length


def _id_bytes(input_ids: Sequence[int], position: int) -> bytes:
    """The ids as little-endian uint32, whatever they came as: a list, an array or a tensor give one key."""
    try:
        if isinstance(input_ids, list | tuple):
            return struct.pack(f"<{len(input_ids)}I", *input_ids)
        ids = np.asarray(input_ids)
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or (ids.size and (ids.min() < 0 or ids.max() >= 2**32)):
            raise ValueError
    except (struct.error, ValueError, TypeError):
        raise ValueError(f"sequence {position}: token ids must be one row of integers in [0, 2³²)") from None
    return ids.astype("<u4").tobytes()
