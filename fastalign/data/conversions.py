"""Ranked lists to pairs and back, for trainers that take the other: rows as people have them, or tokenised data sets.

DPOTrainer(..., train_dataset=lists_to_pairs(rows))                             DPO on rankings
DPOTrainer(..., train_dataset=lists_to_pairs(prepare_lists(...).dataset))       the same, tokenised beforehand
PROTrainer(..., train_dataset=pairs_to_lists(rows, merge=True))                 PRO on pairs (it takes pairs as well)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.compute

from fastalign.data.formats import checked_row
from fastalign.data.judgements import ranks_of
from fastalign.data.length import check_choice
from fastalign.data.merging import Comparison, merge_comparisons
from fastalign.data.preparation import check_countable, fingerprint
from fastalign.data.report import RowError

_KEPT = ("tools", "chat_template_kwargs")  # of a row, beside its prompt


def _best_rest(ranks: np.ndarray) -> np.ndarray:
    return (ranks[:, None] == ranks.min()) & (ranks[None, :] > ranks.min())


def _all(ranks: np.ndarray) -> np.ndarray:
    return ranks[:, None] < ranks[None, :]


def _adjacent(ranks: np.ndarray) -> np.ndarray:
    order = np.unique(ranks, return_inverse=True)[1]
    return order[:, None] + 1 == order[None, :]


PAIRINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"best_rest": _best_rest, "all": _all, "adjacent": _adjacent}
"""Which comparisons of a ranking become pairs; from ranks (K,) to a mask (K, K), [chosen, rejected].

best_rest   the best against each that is worse: K − 1 pairs
all         each against each that is worse: K(K − 1)/2 pairs
adjacent    each against those of the next rank: K − 1 pairs

without ties. Responses that are tied are never paired with each other; each of them is with the others.
"""


def lists_to_pairs(lists: Any, pairs: str = "best_rest") -> Any:
    """Preference pairs from ranked lists.

    lists       rows of `prompt` and `completions` with `rank`, `ranking` or `score`, an iterable of dicts: gives a list
                of rows `prompt`, `chosen`, `rejected`. Or a Dataset of `prepare_lists`: gives a Dataset of prompt_ids,
                chosen_ids, rejected_ids and row
    pairs       which comparisons: one of `PAIRINGS`

    The pairs of a list follow each other. Each list weighs by the number of its pairs, and "all" lets a long list
    weigh quadratically. ValueError: an unknown `pairs`, or a row without a ranking, by its number.
    """
    check_choice("pairs", pairs, tuple(PAIRINGS))
    if _is_tokenised(lists, "response_ids"):
        return _tokenised_pairs(lists, PAIRINGS[pairs])
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(lists):
        try:
            _require(row, ("prompt", "completions"))
            ranks, _, _ = ranks_of(row)
        except RowError as error:
            raise ValueError(f"row {number}: {error}") from error
        own = {name: row[name] for name in ("prompt", *_KEPT) if row.get(name) is not None}
        for chosen, rejected in np.argwhere(PAIRINGS[pairs](np.array(ranks))):
            rows.append(own | {"chosen": row["completions"][chosen], "rejected": row["completions"][rejected]})
    return rows


def pairs_to_lists(pairs: Any, *, merge: bool = False) -> Any:
    """Ranked lists from preference pairs.

    pairs       rows of `prompt`, `chosen` and `rejected`, an iterable of dicts: gives a list of rows `prompt`,
                `completions`, `rank`. Or a Dataset of `prepare_preferences`: gives a Dataset of prompt_ids,
                response_ids, ranks and row. (Rows whose prompt is implicit have to be tokenised first, which splits
                them.)
    merge       False: every pair is a list of two. True: comparisons of one prompt become one list where they say
                how it is ranked; see `merge_comparisons`. Of equal comparisons one is kept then

    ValueError: a row without prompt, chosen or rejected, by its number.
    """
    if _is_tokenised(pairs, "chosen_ids", "rejected_ids"):
        return _tokenised_lists(pairs, merge)
    rows = list(pairs)
    for number, row in enumerate(rows):
        try:
            _require(row, ("prompt", "chosen", "rejected"))
        except RowError as error:
            raise ValueError(f"row {number}: {error}") from error
    owners = [{name: row[name] for name in ("prompt", *_KEPT) if row.get(name) is not None} for row in rows]
    keys = ((_key(own), _key(row["chosen"]), _key(row["rejected"])) for own, row in zip(owners, rows, strict=True))
    responses = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
    return [
        owners[first] | {"completions": [responses[i] for i in members], "rank": ranks}
        for first, members, ranks in (merge_comparisons(keys) if merge else _pairs_of(len(rows)))
    ]


def _pairs_of(count: int) -> Iterable[tuple[int, list[int], list[int]]]:
    """Every pair by itself, in the form of `merge_comparisons`."""
    return ((i, [i, count + i], [1, 2]) for i in range(count))


def _require(row: Mapping[str, Any], names: Sequence[str]) -> None:
    checked_row(row, tuple(names))


def _key(value: Any) -> bytes:
    return _digest(json.dumps(value, sort_keys=True, default=str).encode())


def _digest(content: bytes) -> bytes:
    """What stands for a text or its ids in a look-up, so that memory holds no second copy of the data."""
    return hashlib.blake2b(content, digest_size=16).digest()


# Tokenised ------------------------------------------------------------------------------------------------------------


def _is_tokenised(data: Any, *columns: str) -> bool:
    return isinstance(data, datasets.Dataset) and {"prompt_ids", *columns} <= set(data.column_names)


def _tokenised_pairs(lists: datasets.Dataset, pairing: Callable[[np.ndarray], np.ndarray]) -> datasets.Dataset:
    table = lists.with_format("arrow")[:]
    check_countable(table, "prompt_ids", "response_ids")
    owners, chosen, rejected, start = [], [], [], 0
    for number, ranks in enumerate(table["ranks"].to_pylist()):
        better, worse = np.nonzero(pairing(np.array(ranks)))
        owners += [number] * len(better)
        chosen += (start + better).tolist()
        rejected += (start + worse).tolist()
        start += len(ranks)
    responses = pyarrow.compute.list_flatten(table["response_ids"])
    columns = {"prompt_ids": table["prompt_ids"].take(pyarrow.array(owners, pyarrow.int64()))}
    columns["chosen_ids"] = responses.take(pyarrow.array(chosen, pyarrow.int64()))
    columns["rejected_ids"] = responses.take(pyarrow.array(rejected, pyarrow.int64()))
    return _dataset(columns, table, owners)


def _comparison(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> Comparison:
    return _digest(prompt.tobytes()), _digest(chosen.tobytes()), _digest(rejected.tobytes())


def _tokenised_lists(pairs: datasets.Dataset, merge: bool) -> datasets.Dataset:
    table = pairs.with_format("arrow")[:]
    check_countable(table, "prompt_ids", "chosen_ids", "rejected_ids")
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    examples = pairs.with_format("numpy", columns=names)
    keys = (_comparison(*(example[name] for name in names)) for example in examples)
    owners, members, ranks, sizes = [], [], [], [0]
    for first, own, ranked in merge_comparisons(keys) if merge else _pairs_of(len(pairs)):
        owners.append(first)
        members += own
        ranks += ranked
        sizes.append(len(own))
    responses = pyarrow.chunked_array([*table["chosen_ids"].chunks, *table["rejected_ids"].chunks])
    bounds = pyarrow.array(np.cumsum(sizes), pyarrow.int32())
    taken = responses.take(pyarrow.array(members, pyarrow.int64())).combine_chunks()
    columns = {
        "prompt_ids": table["prompt_ids"].take(pyarrow.array(owners, pyarrow.int64())),
        "response_ids": pyarrow.ListArray.from_arrays(bounds, taken),
        "ranks": pyarrow.ListArray.from_arrays(bounds, pyarrow.array(ranks, pyarrow.float32())),
    }
    return _dataset(columns, table, owners)


def _dataset(columns: dict[str, Any], source: pyarrow.Table, owners: list[int]) -> datasets.Dataset:
    """The columns, and the source's `row` of each."""
    if "row" in source.column_names:
        columns["row"] = source["row"].take(pyarrow.array(owners, pyarrow.int64()))
    table = pyarrow.table(columns)
    return datasets.Dataset(table, fingerprint=fingerprint(table))
