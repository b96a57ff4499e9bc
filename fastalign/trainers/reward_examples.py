"""Data sets for reward models: pairs, lists or labelled responses, told apart by their columns."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
from datasets import Dataset

from fastalign.data import (
    DataReport,
    RewardCollator,
    load_rows,
    prepare_completions,
    prepare_labelled,
    prepare_lists,
    prepare_preferences,
)
from fastalign.data.report import BadRow, Reason
from fastalign.data.reward_collator import example_kind
from fastalign.data.rows import Unreadable
from fastalign.trainers.examples import Examples, padding_id, row_options
from fastalign.trainers.reference import list_lengths
from fastalign.trainers.reward_config import RewardConfig

logger = logging.getLogger(__name__)

TOKENISED_COLUMNS = (
    "prompt_ids", "chosen_ids", "rejected_ids", "margin", "response_ids", "ranks", "completion_ids", "label",
)  # fmt: skip
_RESPONSES = {"pairs": ("chosen_ids", "rejected_ids"), "lists": ("response_ids",), "labels": ("completion_ids",)}
_INSPECTED_ROWS = 64  # of a data set, to find out what it holds
Sequences = list[tuple[list[int], int]]


class RewardExamples(Examples):
    """Tokenises data sets of any kind of judgement; `label_type` is the config's, or that of the first labels seen."""

    args: RewardConfig

    def __init__(self, tokenizer: Any, args: RewardConfig) -> None:
        collator = RewardCollator(padding_id(tokenizer), args.pad_to_multiple_of)
        super().__init__(tokenizer, args, self._tokenize, ("prompt_ids",), example_lengths, collator)
        self.label_type = None if args.label_type == "auto" else args.label_type
        self._ends: dict[str, np.ndarray] = {}  # last tokens of the responses of each data set

    def prepare(self, dataset: Any, name: str, split: str | None = None) -> Dataset:
        """A tokenised data set: the columns of `RewardCollator`'s examples, row and length."""
        prepared = super().prepare(dataset, name, split)
        kind = example_kind(prepared.features)
        self._ends[name] = np.concatenate([_last_tokens(prepared, column) for column in _RESPONSES[kind]])
        if kind == "labels":
            self._settle_labels(prepared, name)
        if kind != "pairs" and self.args.center_rewards_coefficient:
            raise ValueError(
                f"center_rewards_coefficient={self.args.center_rewards_coefficient} centres pairs; the {name} data are "
                f"{kind}"
            )
        if "length" not in prepared.column_names:
            prepared = prepared.add_column("length", pyarrow.array(example_lengths(prepared), pyarrow.int32()))
        return prepared if kind == "lists" else prepared.with_format("numpy")  # lists of lists stay Python's

    def use_pad_token(self, pad_token_id: int) -> None:
        """Pad batches with this token, and warn of sequences that end with it: plain transformers misreads those."""
        self.collator = RewardCollator(pad_token_id, self.args.pad_to_multiple_of)
        for name, ends in self._ends.items():
            if count := int((ends == pad_token_id).sum()):
                logger.warning(
                    "%d responses of the %s data end with the pad token %d, at which plain transformers reads no score",
                    count, name, pad_token_id,
                )  # fmt: skip

    def reference_sequences(self, dataset: Any, split: str | None, max_samples: int | None) -> Sequences:
        """Token ids of all responses of a reference set, behind their prompts."""
        if isinstance(dataset, Dataset) and "prompt_ids" in dataset.column_names:
            prepared = dataset if max_samples is None else dataset.select(range(min(max_samples, len(dataset))))
        else:
            options = self._source(dataset, split) | {"max_samples": max_samples}
            prepared, self.reports["reward reference"] = _prepare(dataset, self.tokenizer, self.args, None, options)
        return response_sequences(prepared)

    def _source(self, dataset: Any, split: str | None) -> dict[str, Any]:
        """Options of `load_rows` for a reference set. dataset_config is dataset_name's, and of no other data."""
        if not isinstance(dataset, str):
            return {"split": None, "config": None}
        return {"split": split, "config": self.args.dataset_config if dataset == self.args.dataset_name else None}

    def _tokenize(self, dataset: Any, tokenizer: Any, **options: Any) -> tuple[Dataset, DataReport]:
        prepared, report = _prepare(dataset, tokenizer, self.args, self.label_type, options, judged=True)
        return prepared, report

    def _checked(self, dataset: Dataset) -> Dataset:
        """An already tokenised data set; ValueError for an empty list of ids, a row too long, or missing judgements."""
        kind = example_kind(dataset.features)
        needed = {"lists": "ranks", "labels": "label"}.get(kind, "prompt_ids")
        if needed not in dataset.column_names:
            raise ValueError(f"the tokenised data set has {', '.join(_RESPONSES[kind])} and no {needed}")
        for name in ("prompt_ids", *_RESPONSES[kind]):
            rows = _inner_lengths(dataset, name)
            if len(empty := np.flatnonzero([not len(row) or not row.all() for row in rows])):
                raise ValueError(f"{name} of row {empty[0]} of the tokenised data set is empty")
        return self._checked_lengths(dataset)

    def _settle_labels(self, dataset: Dataset, name: str) -> None:
        labels = np.asarray(dataset.with_format("numpy")["label"][:])
        given = dataset.features["label"].dtype
        whole = bool(np.isin(labels, (0, 1)).all())
        found = "binary" if given == "bool" or (given.startswith(("int", "uint")) and whole) else "scalar"
        self.label_type = self.label_type or found
        if self.label_type == "binary" and not whole:
            raise ValueError(f"labels are binary, and those of the {name} data are others than 0 and 1")


def rows_kind(dataset: Any, options: dict[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    """What the first rows hold: "pairs", "lists", "labels" or None; and the columns of numbers beside pairs.

    ValueError: there are no rows, or none of the first can be read.
    """
    limit = min(_INSPECTED_ROWS, options.get("max_samples") or _INSPECTED_ROWS)
    source = load_rows(dataset, **(options | {"max_samples": limit}))
    first = source.read(source.start, source.stop)
    if not first:
        raise ValueError(f"no row is left to train on: {source.name} has no rows")
    if isinstance(first[0], Unreadable) and all(isinstance(row, Unreadable) for row in first):
        bad = BadRow(source.start, Reason.UNREADABLE, first[0].detail)
        raise ValueError(f"none of the first rows of {source.name} can be read; {bad}")
    rows = [row for row in first if isinstance(row, dict)]
    seen = [{key for key, value in row.items() if value is not None} for row in rows]
    for kind, columns in (("pairs", {"chosen", "rejected"}), ("lists", {"completions"}), ("labels", {"label"})):
        if any(columns <= keys for keys in seen):
            return kind, ("margin",) if kind == "pairs" and any("margin" in keys for keys in seen) else ()
    return None, ()


def _prepare(
    dataset: Any,
    tokenizer: Any,
    args: RewardConfig,
    label_type: str | None,
    options: dict[str, Any],
    *,
    judged: bool = False,
) -> tuple[Dataset, DataReport]:
    """Tokenised rows of whatever kind; `judged`: of one that a reward model can be trained on."""
    kind, numbers = rows_kind(dataset, options)
    options = options | row_options(args)
    if kind == "lists":
        return prepare_lists(dataset, tokenizer, **options)
    if kind == "labels":
        return prepare_labelled(dataset, tokenizer, label_type=label_type, **options)
    if kind == "pairs":
        return prepare_preferences(dataset, tokenizer, numbers=numbers, **options)
    if judged:
        raise ValueError(
            f"the first {_INSPECTED_ROWS} rows hold no judgement: chosen and rejected, or prompt and completions with "
            "rank, score or ranking, or prompt and completion with label are accepted"
        )
    return prepare_completions(dataset, tokenizer, **options)


def response_sequences(dataset: Dataset) -> Sequences:
    """(prompt and response, where the response starts) of every response of a tokenised data set."""
    sequences: Sequences = []
    for example in dataset.with_format(None):
        if "input_ids" in example:
            sequences.append((example["input_ids"], 0))
            continue
        prompt, kind = example["prompt_ids"], example_kind(example)
        responses = example["response_ids"] if kind == "lists" else [example[name] for name in _RESPONSES[kind]]
        sequences += [(prompt + ids, len(prompt)) for ids in responses]
    return sequences


def example_lengths(dataset: Dataset) -> np.ndarray:
    """(n,) tokens of the longest sequence of each example: what train_sampling_strategy="group_by_length" goes by."""
    longest = [
        np.array([row.max() if len(row) else 0 for row in _inner_lengths(dataset, name)], np.int64)
        for name in _RESPONSES[example_kind(dataset.features)]
    ]
    return list_lengths(dataset, "prompt_ids") + np.max(longest, axis=0)


def _inner_lengths(dataset: Dataset, name: str) -> list[np.ndarray]:
    """Lengths of the lists of token ids of each row: one for a list of ids, several for a list of lists."""
    if name != "response_ids":
        return list(list_lengths(dataset, name)[:, None])
    column = dataset.select_columns(name).with_format("arrow")[:][name]
    inner = pyarrow.compute.list_value_length(pyarrow.compute.list_flatten(column)).to_numpy().astype(np.int64)
    return np.split(inner, np.cumsum(list_lengths(dataset, name))[:-1])


def _last_tokens(dataset: Dataset, name: str) -> np.ndarray:
    """The last token of each list of ids of a column."""
    column = dataset.select_columns(name).with_format("arrow")[:][name]
    if name == "response_ids":
        column = pyarrow.compute.list_flatten(column)
    lengths = pyarrow.compute.list_value_length(column).to_numpy()
    return pyarrow.compute.list_flatten(column).to_numpy()[np.cumsum(lengths) - 1]
