"""Data sets for a trainer: whatever was handed in, as tokenised examples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset

from fastalign.data import DataReport, PreferenceCollator, prepare_preferences
from fastalign.trainers.config import TrainerConfig
from fastalign.trainers.dpo_config import DPOConfig
from fastalign.trainers.reference import EXAMPLE_COLUMNS, list_lengths, pair_lengths

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Examples:
    """Tokenises data sets by a config's settings and keeps the report of each.

    tokenizer   a transformers tokenizer
    args        the trainer's config
    tokenize    from (data set, tokenizer, split=, config=, max_samples=) to (dataset, report)
    columns     of token ids, that a tokenised example has; a Dataset that has them all is only checked
    lengths     from a tokenised data set to the tokens of each example (of its longest sequence)
    collator    from examples to a batch
    """

    tokenizer: Any
    args: TrainerConfig
    tokenize: Callable[..., tuple[Dataset, DataReport]]
    columns: Sequence[str]
    lengths: Callable[[Dataset], np.ndarray]
    collator: Callable[[list[Any]], dict[str, Any]]
    reports: dict[str, DataReport] = field(default_factory=dict)

    def prepare(self, dataset: Any, name: str, split: str | None = None) -> Dataset:
        """A tokenised data set: `columns` and row."""
        args = self.args
        if isinstance(dataset, Dataset) and set(self.columns) <= set(dataset.column_names):
            return self._checked(dataset)
        named = isinstance(dataset, str)
        prepared, report = self.tokenize(
            dataset,
            self.tokenizer,
            split=split if named else None,
            config=args.dataset_config if named else None,
            max_samples=args.max_samples,
        )
        self.reports[name] = report
        lost = report.bad or report.dropped
        logger.log(logging.WARNING if lost else logging.INFO, "%s data: %s", name, report)
        return prepared

    def training(self, dataset: Any) -> Dataset | None:
        """The training set that was given, or the config's."""
        if dataset is None and self.args.dataset_name is None:
            return None
        return self.prepare(
            self.args.dataset_name if dataset is None else dataset, "train", self.args.dataset_train_split
        )

    def evaluation(self, dataset: Any) -> dict[str, Dataset]:
        """The evaluation sets by name, "" for a single one; the config's test split if none was given."""
        if dataset is None:
            split = self.args.dataset_test_split
            if self.args.dataset_name is None or split is None:
                return {}
            return {"": self.prepare(self.args.dataset_name, "eval", split)}
        if isinstance(dataset, dict):
            return {name: self.prepare(part, name) for name, part in dataset.items()}
        return {"": self.prepare(dataset, "eval")}

    def _checked(self, dataset: Dataset) -> Dataset:
        """An already tokenised data set, or ValueError naming the first row that is empty or too long."""
        for name in self.columns:
            if len(empty := np.flatnonzero(list_lengths(dataset, name) == 0)):
                raise ValueError(f"{name} of row {empty[0]} of the tokenised data set is empty")
        return self._checked_lengths(dataset)

    def _checked_lengths(self, dataset: Dataset) -> Dataset:
        lengths, max_length = self.lengths(dataset), self.args.max_length
        if max_length is not None and len(lengths) and lengths.max() > max_length:
            row = int(np.argmax(lengths > max_length))
            raise ValueError(
                f"row {row} of the tokenised data set has {lengths[row]} tokens, max_length={max_length} is accepted; "
                "cut it when tokenising, or raise max_length"
            )
        return dataset


def padding_id(tokenizer: Any) -> int:
    """The pad token, or any other where there is none: padding is told from its place."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return 0 if pad is None else pad


def row_options(args: TrainerConfig) -> dict[str, Any]:
    """How a config wants rows to be read and cut: keyword arguments of the `prepare_*` functions of fastalign.data."""
    return {
        "format": args.dataset_format,
        "max_length": args.max_length,
        "truncation_mode": args.truncation_mode,
        "on_long_prompt": args.on_long_prompt,
        "on_bad_row": args.on_bad_row,
    }


def preference_examples(tokenizer: Any, args: DPOConfig) -> Examples:
    """Pairs: prompt_ids, chosen_ids, rejected_ids."""

    def tokenize(dataset: Any, tokenizer: Any, **options: Any) -> tuple[Dataset, DataReport]:
        return prepare_preferences(dataset, tokenizer, **options, **row_options(args))

    collator = PreferenceCollator(padding_id(tokenizer), pad_to_multiple_of=args.pad_to_multiple_of)
    return Examples(tokenizer, args, tokenize, EXAMPLE_COLUMNS, pair_lengths, collator)
