"""Data sets of ranked lists: tokenised, checked, and with the reference's log-probs of every response."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
from datasets import Dataset

from fastalign.data import DataReport, ListCollator, pairs_to_lists, prepare_lists, prepare_preferences
from fastalign.data.preparation import fingerprint
from fastalign.trainers.examples import Examples, padding_id, row_options
from fastalign.trainers.pro_config import PROConfig
from fastalign.trainers.reference import EXAMPLE_COLUMNS, list_lengths
from fastalign.trainers.reward_examples import example_lengths, rows_kind

REFERENCE_COLUMN = "ref_response_logps"
LIST_COLUMNS = ("prompt_ids", "response_ids", "ranks", "scores", REFERENCE_COLUMN)
_NEEDED = ("prompt_ids", "response_ids", "ranks")


class ListExamples(Examples):
    """Tokenises ranked lists; pairs become lists of two, or more where the config merges them."""

    args: PROConfig

    def __init__(self, tokenizer: Any, args: PROConfig) -> None:
        collator = ListCollator(padding_id(tokenizer), args.pad_to_multiple_of)
        super().__init__(tokenizer, args, self._tokenize, ("prompt_ids",), example_lengths, collator)

    def prepare(self, dataset: Any, name: str, split: str | None = None) -> Dataset:
        """A tokenised data set: the columns of `ListCollator`'s examples, row and length."""
        if isinstance(dataset, Dataset) and set(EXAMPLE_COLUMNS) <= set(dataset.column_names):
            dataset = self._from_pairs(dataset)
        prepared = super().prepare(dataset, name, split)
        unused = [] if self.args.reward_temperatures else ["scores"]
        unused += [REFERENCE_COLUMN] if self.args.reference_free else []  # the collator would hand them to the loss
        prepared = prepared.remove_columns([name for name in unused if name in prepared.column_names])
        if "length" not in prepared.column_names:
            prepared = prepared.add_column("length", pyarrow.array(example_lengths(prepared), pyarrow.int32()))
        return prepared.with_format(None)  # lists of lists stay Python's

    def _tokenize(self, dataset: Any, tokenizer: Any, **options: Any) -> tuple[Dataset, DataReport]:
        kind, _ = rows_kind(dataset, options)
        options = options | row_options(self.args)
        if kind == "lists":
            return prepare_lists(dataset, tokenizer, scores=self.args.reward_temperatures, **options)
        if kind == "pairs":
            pairs, report = prepare_preferences(dataset, tokenizer, **options)
            return self._from_pairs(pairs), report
        raise ValueError(
            "the first rows hold no ranking: prompt and completions with rank, ranking or score, or chosen and "
            "rejected, are accepted"
        )

    def _from_pairs(self, pairs: Dataset) -> Dataset:
        if self.args.reward_temperatures:
            raise ValueError("reward_temperatures=True needs a score for every response, and the data are pairs")
        return pairs_to_lists(pairs, merge=self.args.merge_pairs)

    def _checked(self, dataset: Dataset) -> Dataset:
        """An already tokenised data set; ValueError naming the row that cannot be used."""
        needed = (*_NEEDED, "scores") if self.args.reward_temperatures else _NEEDED
        if missing := [name for name in needed if name not in dataset.column_names]:
            raise ValueError(f"the tokenised data set has no {' and no '.join(missing)}")
        counts = list_lengths(dataset, "response_ids")
        for name in needed[2:]:
            if len(wrong := np.flatnonzero(list_lengths(dataset, name) != counts)):
                raise ValueError(f"{name} of row {wrong[0]} of the tokenised data set are not one for each response")
        for name, empty in (
            ("prompt_ids", list_lengths(dataset, "prompt_ids") == 0),
            ("response_ids", counts == 0),
            ("response_ids", np.array([not all(own) for own in _response_lengths(dataset, counts)], bool)),
        ):
            if len(wrong := np.flatnonzero(empty)):
                raise ValueError(f"{name} of row {wrong[0]} of the tokenised data set is empty")
        if self.args.reward_temperatures:
            _check_order(dataset)
        return self._checked_lengths(dataset)


def _check_order(dataset: Dataset) -> None:
    columns = dataset.select_columns(["ranks", "scores"]).with_format(None)
    for row, example in enumerate(columns):
        ranks, scores = (np.array(example[name]) for name in ("ranks", "scores"))
        if ((ranks[:, None] < ranks) & (scores[:, None] < scores)).any():
            raise ValueError(f"row {row} of the tokenised data set ranks a response before one of a higher score")


def _response_lengths(dataset: Dataset, counts: np.ndarray) -> list[np.ndarray]:
    flat = pyarrow.compute.list_flatten(_column(dataset, "response_ids"))
    return np.split(pyarrow.compute.list_value_length(flat).to_numpy(), np.cumsum(counts)[:-1])


def _column(dataset: Dataset, name: str) -> pyarrow.ChunkedArray:
    return dataset.select_columns(name).with_format("arrow")[:][name]


# The reference scores single responses -------------------------------------------------------------------------------


def single_responses(lists: Dataset) -> Dataset:
    """Every response of tokenised lists by itself: prompt_ids, completion_ids and, if there is one, the list's row."""
    owners = pyarrow.array(np.repeat(np.arange(len(lists)), list_lengths(lists, "response_ids")))
    columns = {name: _column(lists, name).take(owners) for name in ("prompt_ids", "row") if name in lists.column_names}
    columns["completion_ids"] = pyarrow.compute.list_flatten(_column(lists, "response_ids"))
    table = pyarrow.table(columns)
    return Dataset(table, fingerprint=fingerprint(table))


def with_list_logps(lists: Dataset, logps: pyarrow.ChunkedArray) -> Dataset:
    """The lists with `ref_response_logps`, from the log-probs of `single_responses(lists)`, a list of floats each."""
    bounds = np.concatenate([[0], np.cumsum(list_lengths(lists, "response_ids"))])
    nested = pyarrow.LargeListArray.from_arrays(pyarrow.array(bounds), logps.combine_chunks())
    if REFERENCE_COLUMN in lists.column_names:
        lists = lists.remove_columns(REFERENCE_COLUMN)
    return lists.add_column(REFERENCE_COLUMN, nested)
