"""What collators read of tokenised examples, and how they say what is wrong with one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

Example = Mapping[str, Any]


def name_of(example: Example) -> str:
    """ "row 17", or "an example" where it has no number."""
    return f"row {example['row']}" if "row" in example else "an example"


def column(example: Example, key: str, dtype: type) -> np.ndarray:
    """The values under a key. ValueError: there are none."""
    values: np.ndarray = np.asarray(example[key], dtype=dtype)
    if not len(values):
        raise ValueError(f"{key} of {name_of(example)} is empty")
    return values


def given(examples: Sequence[Example], *columns: str) -> bool:
    """Whether the examples have these columns. ValueError: some of them, or some of the columns."""
    found = {name in example for example in examples for name in columns}
    if len(found) > 1:
        raise ValueError(
            f"some examples have {' or '.join(columns)} and some have not; give {'both' if columns[1:] else 'it'} with "
            "all of them or none"
        )
    return found == {True}


def joined(example: Example, key: str, response: Any = None) -> dict[str, Any]:
    """Prompt and response as one sequence to learn the response from: input_ids, completion_mask and row.

    key: the column of the response, or of several of which `response` is one. ValueError: one of the two is empty.
    """
    prompt = column(example, "prompt_ids", np.int64)
    ids: np.ndarray = np.asarray(example[key] if response is None else response, np.int64)
    if not len(ids):
        raise ValueError(f"{key} of {name_of(example)} {'is' if response is None else 'has one that is'} empty")
    row = {"row": example["row"]} if "row" in example else {}
    mask = np.arange(len(prompt) + len(ids)) >= len(prompt)
    return row | {"input_ids": np.concatenate([prompt, ids]), "completion_mask": mask}


def reference_tensors(logps: Sequence[np.ndarray], cu_seqlens: np.ndarray) -> dict[str, torch.Tensor]:
    """ref_per_token_logps (n,) and their sums per sequence, ref_logps (S,), taken in float64; both float32."""
    per_token: np.ndarray = np.concatenate(logps).astype(np.float32, copy=False)
    sums = np.add.reduceat(per_token, cu_seqlens[:-1], dtype=np.float64).astype(np.float32)
    return {"ref_per_token_logps": torch.from_numpy(per_token), "ref_logps": torch.from_numpy(sums)}
