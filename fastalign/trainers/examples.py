"""Data sets for a trainer: whatever was handed in, as tokenised examples."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from datasets import Dataset

from fastalign.data import DataReport, PreferenceCollator, prepare_preferences
from fastalign.trainers.dpo_config import DPOConfig
from fastalign.trainers.reference import EXAMPLE_COLUMNS, list_lengths, pair_lengths

logger = logging.getLogger(__name__)


class Examples:
    """Tokenises data sets by a config's settings and keeps the report of each."""

    def __init__(self, tokenizer: Any, args: DPOConfig) -> None:
        self.tokenizer, self.args = tokenizer, args
        self.reports: dict[str, DataReport] = {}

    def prepare(self, dataset: Any, name: str, split: str | None = None) -> Dataset:
        """Columns prompt_ids, chosen_ids, rejected_ids, row. A Dataset that has the first three is only checked."""
        args = self.args
        if isinstance(dataset, Dataset) and set(EXAMPLE_COLUMNS) <= set(dataset.column_names):
            return _checked(dataset, args.max_length)
        named = isinstance(dataset, str)
        prepared = prepare_preferences(
            dataset,
            self.tokenizer,
            split=split if named else None,
            config=args.dataset_config if named else None,
            max_samples=args.max_samples,
            format=args.dataset_format,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            on_long_prompt=args.on_long_prompt,
            on_bad_row=args.on_bad_row,
        )
        self.reports[name] = prepared.report
        lost = prepared.report.bad or prepared.report.dropped
        logger.log(logging.WARNING if lost else logging.INFO, "%s data: %s", name, prepared.report)
        return prepared.dataset

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

    def collator(self) -> PreferenceCollator:
        """Padding with the pad token, or any other: padding is told from its place."""
        tokenizer = self.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return PreferenceCollator(0 if pad is None else pad, pad_to_multiple_of=self.args.pad_to_multiple_of)


def _checked(dataset: Dataset, max_length: int | None) -> Dataset:
    """An already tokenised data set, or ValueError naming the first row that is empty or too long."""
    for name in EXAMPLE_COLUMNS:
        if len(empty := np.flatnonzero(list_lengths(dataset, name) == 0)):
            raise ValueError(f"{name} of row {empty[0]} of the tokenised data set is empty")
    lengths = pair_lengths(dataset)
    if max_length is not None and len(lengths) and lengths.max() > max_length:
        row = int(np.argmax(lengths > max_length))
        raise ValueError(
            f"row {row} of the tokenised data set has {lengths[row]} tokens, max_length={max_length} is accepted; "
            "cut it when tokenising, or raise max_length"
        )
    return dataset
