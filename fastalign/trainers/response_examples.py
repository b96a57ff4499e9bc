"""Data sets for losses on single responses: labelled ones, or pairs that are taken apart."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from datasets import Dataset

from fastalign.data import DataReport, prepare_labelled, prepare_preferences
from fastalign.data.unpaired import KL_COLUMN, UnpairedCollator, unpair, with_mismatched
from fastalign.trainers.dpo_config import DPOConfig
from fastalign.trainers.examples import Examples, padding_id, row_options
from fastalign.trainers.reference import PAIRS, RESPONSES, example_lengths
from fastalign.trainers.reward_examples import rows_kind

logger = logging.getLogger(__name__)

_BALANCE = (1.0, 4 / 3)  # of desirable to undesirable weight in all, where KTO works best: arXiv 2402.01306 eq. 8


class ResponseExamples(Examples):
    """Tokenises labelled responses and pairs alike: prompt_ids, completion_ids, label, row.

    Losses that estimate the policy's KL to the reference get kl_completion_ids too, unless the tokenised data that were
    handed in have them. Of tokenised pairs, each side becomes an example.
    """

    args: DPOConfig

    def __init__(self, tokenizer: Any, args: DPOConfig) -> None:
        collator = UnpairedCollator(padding_id(tokenizer), args.pad_to_multiple_of)
        super().__init__(tokenizer, args, self._tokenize, RESPONSES.columns, _lengths, collator)
        self._pairs = Examples(tokenizer, args, self._tokenize, PAIRS.columns, _pair_lengths, collator)
        self._stride = 1

    def prepare(self, dataset: Any, name: str, split: str | None = None) -> Dataset:
        self._stride = 1
        if isinstance(dataset, Dataset) and set(PAIRS.columns) <= set(dataset.column_names):
            prepared = self._unpaired(self._pairs.prepare(dataset, name))
        else:
            prepared = super().prepare(dataset, name, split)
        _warn_of_imbalance(prepared, self.args, name)
        if not self.args.needs_kl or KL_COLUMN in prepared.column_names:
            return prepared
        return with_mismatched(prepared, stride=self._stride, max_length=self.args.max_length)

    def _tokenize(self, dataset: Any, tokenizer: Any, **options: Any) -> tuple[Dataset, DataReport]:
        kind, _ = rows_kind(dataset, options)
        options = options | row_options(self.args)
        if kind == "labels":
            return prepare_labelled(dataset, tokenizer, label_type="binary", **options)
        if kind == "pairs":
            prepared, report = prepare_preferences(dataset, tokenizer, **options)
            return self._unpaired(prepared), report
        raise ValueError(
            f"loss_type={self.args.loss_type!r} learns from rows with prompt, completion and label, or with chosen and "
            "rejected; the first rows have neither"
        )

    def _unpaired(self, pairs: Dataset) -> Dataset:
        self._stride = 2
        return unpair(pairs)

    def _checked(self, dataset: Dataset) -> Dataset:
        if "label" not in dataset.column_names:
            raise ValueError("the tokenised data set has completion_ids and no label")
        labels = _labels(dataset)
        if len(wrong := np.flatnonzero((labels != 0) & (labels != 1))):
            raise ValueError(
                f"label of row {wrong[0]} of the tokenised data set is {labels[wrong[0]]}, not true or false"
            )
        return super()._checked(dataset)


def _lengths(dataset: Dataset) -> np.ndarray:
    return example_lengths(dataset, RESPONSES)


def _pair_lengths(dataset: Dataset) -> np.ndarray:
    return example_lengths(dataset, PAIRS)


def _labels(dataset: Dataset) -> np.ndarray:
    return np.asarray(dataset.select_columns("label").with_format("arrow")[:]["label"].to_numpy(zero_copy_only=False))


def _warn_of_imbalance(dataset: Dataset, args: DPOConfig, name: str) -> None:
    """Say what weights would balance good and bad responses, where those given are far from it."""
    labels = _labels(dataset).astype(bool)
    good, bad = int(labels.sum()), int((~labels).sum())
    if name != "train" or not good or not bad or good == bad:
        return
    ratio = args.desirable_weight * good / (args.undesirable_weight * bad) if args.undesirable_weight else np.inf
    if not _BALANCE[0] - 0.01 <= ratio <= _BALANCE[1] + 0.01:
        low, high = (limit * args.undesirable_weight * bad / good for limit in _BALANCE)
        logger.warning(
            "%d good and %d bad responses, weighted %g to 1; KTO's authors advise 1 to 4/3: desirable_weight from %.2f "
            "to %.2f beside undesirable_weight=%g",
            good, bad, ratio, low, high, args.undesirable_weight,
        )  # fmt: skip
