"""Token ids of data and the embeddings of a model: an id without one ends a run on an accelerator without a word."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
from datasets import Dataset
from torch import nn

from fastalign.models.head import base_causal_lm
from fastalign.trainers.examples import padding_id
from fastalign.trainers.token_batches import ID_COLUMNS


def check_token_ids(model: nn.Module, tokenizer: Any, *datasets: Dataset | None) -> None:
    """Raise ValueError for a token id of tokenised data, or of the padding, that the model has no embedding for.

    It names the row: tokens that were added to a tokenizer, or a tokenizer of another model.
    """
    rows = getattr(base_causal_lm(model).get_input_embeddings(), "num_embeddings", None)
    if rows is None:  # no torch.nn.Embedding: what it takes is not known here
        return
    name = type(base_causal_lm(model)).__name__
    advice = "take the model's own tokenizer, or resize the model's embeddings (resize_token_embeddings)"
    if (pad := padding_id(tokenizer)) >= rows:
        raise ValueError(f"the padding is token {pad}, and {name} has embeddings for {rows} tokens: {advice}")
    for dataset in datasets:
        for column in ID_COLUMNS if dataset is not None else ():
            if dataset is None or column not in dataset.column_names:
                continue
            smallest, largest = _range(dataset, column)
            if smallest >= 0 and largest < rows:
                continue
            number, token = _first_outside(dataset, column, rows)
            row = dataset["row"][number] if "row" in dataset.column_names else number
            raise ValueError(
                f"{column} of row {row} has token {token}, and {name} has embeddings for {rows} tokens: {advice}"
            )


def _range(dataset: Dataset, name: str) -> tuple[int, int]:
    """The smallest and the largest value of a column of lists, or of lists of lists."""
    values = dataset.select_columns(name).with_format("arrow")[:][name]
    while pyarrow.types.is_list(values.type) or pyarrow.types.is_large_list(values.type):
        values = pyarrow.compute.list_flatten(values)
    ends = pyarrow.compute.min_max(values).as_py()
    return (0, 0) if ends["min"] is None else (ends["min"], ends["max"])


def _first_outside(dataset: Dataset, name: str, rows: int) -> tuple[int, int]:
    """(number, token) of the first example with a token outside [0, rows)."""
    for number, lists in enumerate(dataset.select_columns(name).with_format(None)[name]):
        ids = np.concatenate([np.atleast_1d(part).ravel() for part in lists])
        outside = ids[(ids < 0) | (ids >= rows)]
        if len(outside):
            return number, int(outside[0])
    raise AssertionError("no token is outside")
