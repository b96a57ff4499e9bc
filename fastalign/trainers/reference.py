"""Reference log-probs for a trainer: cached on disk, joined to the examples, checked before they are trusted."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, overload

import numpy as np
import pyarrow
import pyarrow.compute
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from torch import nn

from fastalign.reference import PreferenceSequences, ReferenceCache, ReferenceModel, TokenSequence
from fastalign.reference.errors import UnscorableError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """What tokenised examples hold behind `prompt_ids`.

    unit: what one is called. learned: columns of responses to learn from. scored: columns of responses that the
    reference scores, and the columns that their log-probs go to.
    """

    unit: str
    learned: tuple[str, ...]
    scored: Mapping[str, str]

    @property
    def columns(self) -> tuple[str, ...]:
        return ("prompt_ids", *self.learned)

    def sequences(self, examples: Any) -> PreferenceSequences:
        """What the reference scores, example by example."""
        return PreferenceSequences(examples, tuple(self.scored))


PAIRS = Layout(
    "pair",
    ("chosen_ids", "rejected_ids"),
    MappingProxyType({"chosen_ids": "ref_chosen_logps", "rejected_ids": "ref_rejected_logps"}),
)
RESPONSES = Layout("example", ("completion_ids",), MappingProxyType({"completion_ids": "ref_completion_logps"}))
RESPONSES_AND_MISMATCHED = Layout(
    "example", RESPONSES.learned, MappingProxyType({**RESPONSES.scored, "kl_completion_ids": "ref_kl_logps"})
)

EXAMPLE_COLUMNS = PAIRS.columns
REFERENCE_COLUMNS = tuple(PAIRS.scored.values())

CHECKED_PAIRS = 4
# Mean difference per token, in nats, that rounding may leave between two computations of one sequence. A wrong
# reference, row or token span is off by tenths of a nat.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_TOLERANCE_16_BIT = 0.05


class ReferenceMismatchError(ValueError):
    """Cached log-probs are not those of the reference."""


def reference_adapter(model: nn.Module) -> str | None:
    """The adapter of a PeftModel that its reference includes: the active one, unless it changes nothing yet.

    A policy with an SFT adapter has base and adapter as its reference; with a fresh LoRA (B = 0) the base alone, so
    that the random A of a new adapter does not make it another reference.
    """
    if not isinstance(model, PeftModel):
        return None
    adapter = model.active_adapter
    if model.peft_config[adapter].is_prompt_learning:
        raise ValueError(
            f"adapter {adapter!r} is {model.peft_config[adapter].peft_type.value}: adapters that add tokens to the "
            "prompt are not supported; use LoRA"
        )
    return None if _changes_nothing(model, adapter) else adapter


def _changes_nothing(model: PeftModel, adapter: str) -> bool:
    config = model.peft_config[adapter]
    if config.peft_type.value != "LORA" or config.use_dora or config.modules_to_save:
        return False
    last = [
        p
        for name, p in model.named_parameters()
        if f".{adapter}" in name and ("lora_B" in name or "embedding_B" in name)
    ]
    trained = [p for name, p in model.named_parameters() if adapter in name and "lora_" not in name]
    return bool(last) and not trained and not any(bool(p.any()) for p in last)


def build_cache(
    cache_dir: str, reference: ReferenceModel, datasets: Sequence[Dataset], *, batch_tokens: int, progress: bool,
    layout: Layout = PAIRS,
) -> ReferenceCache:  # fmt: skip
    """Log-probs of all examples, each computed at most once; processes share the work. Every process must call this."""
    state = PartialState()
    examples = _Chained(datasets)
    share = layout.sequences(_Strided(examples, state.process_index, state.num_processes))
    progress = progress and state.is_local_main_process
    try:
        cache = ReferenceCache.build(cache_dir, reference, share, batch_tokens=batch_tokens, progress=progress)
    except UnscorableError as error:
        number, side = divmod(error.index, len(layout.scored))
        number = state.process_index + number * state.num_processes
        row = examples[number].get("row", number)
        raise ValueError(f"{list(layout.scored)[side]} of row {row} of the data set: {error.what}") from error
    report = cache.report
    if report is not None:
        logger.info("reference log-probs: %d found in %s, %d computed", report.cached, cache_dir, report.computed)
    if state.num_processes > 1:
        state.wait_for_everyone()
        cache.reload()
        if cache.missing(layout.sequences(examples)):
            raise ValueError(
                f"cache_dir {cache_dir} does not hold what the other processes computed: it must be on a filesystem "
                "that all of them share"
            )
    return cache


def with_reference(dataset: Dataset, cache: ReferenceCache, layout: Layout = PAIRS) -> Dataset:
    """The examples with their reference log-probs (float32 lists, one value a token) and `length`."""
    logps, count = cache.lookup(layout.sequences(dataset)), len(layout.scored)
    dataset = dataset.with_format(None)
    for index, name in enumerate(layout.scored.values()):
        if name in dataset.column_names:
            dataset = dataset.remove_columns(name)
        dataset = dataset.add_column(name, _list_column(logps[index::count]))
    return with_lengths(dataset, layout)


def with_lengths(dataset: Dataset, layout: Layout) -> Dataset:
    """The examples, read as arrays, with `length`: what train_sampling_strategy="group_by_length" groups by."""
    if "length" not in dataset.column_names:
        dataset = dataset.add_column("length", pyarrow.array(example_lengths(dataset, layout), pyarrow.int32()))
    return dataset.with_format("numpy")


def example_lengths(dataset: Dataset, layout: Layout) -> np.ndarray:
    """(n,) tokens of the longest sequence of each example that is learned from."""
    responses = [list_lengths(dataset, name) for name in layout.learned]
    return list_lengths(dataset, "prompt_ids") + np.max(responses, axis=0)


def pair_lengths(dataset: Dataset) -> np.ndarray:
    """(n,) tokens of the longer sequence of each pair."""
    return example_lengths(dataset, PAIRS)


def list_lengths(dataset: Dataset, name: str) -> np.ndarray:
    """(n,) int64: the lengths of a column of lists, without reading the lists."""
    column = dataset.select_columns(name).with_format("arrow")[:][name]
    return pyarrow.compute.list_value_length(column).to_numpy().astype(np.int64)


def _list_column(values: Sequence[np.ndarray]) -> Any:
    offsets = np.concatenate([[0], np.cumsum([len(v) for v in values])])
    flat = np.concatenate(values).astype(np.float32)
    large = offsets[-1] > np.iinfo(np.int32).max
    array, kind = (pyarrow.LargeListArray, np.int64) if large else (pyarrow.ListArray, np.int32)
    return array.from_arrays(offsets.astype(kind), pyarrow.array(flat))


def check_cached(
    cache: ReferenceCache, reference: ReferenceModel, dataset: Dataset, autocast: torch.dtype | None,
    layout: Layout = PAIRS,
) -> None:  # fmt: skip
    """Recompute a few log-probs; ReferenceMismatchError if the cached ones differ. Nothing cached, nothing to do."""
    if cache.report is not None and not cache.report.cached:
        return
    examples = dataset.select(sample_indices(len(dataset)))
    sequences: list[TokenSequence] = list(layout.sequences(examples))
    with reference.scorer() as score:
        fresh = score(sequences)
        dtype = autocast or next(p.dtype for p in score.model.parameters() if p.is_floating_point())
    reference.release()
    worst = compare_logps(
        fresh, cache.lookup(sequences), dtype, f"the reference ({reference.source})", examples, layout
    )
    logger.info("reference log-probs: %d cached examples recomputed, %.1e nats a token apart", len(examples), worst)


def compare_logps(
    fresh: Sequence[np.ndarray], cached: Sequence[np.ndarray], dtype: torch.dtype, whose: str, examples: Dataset,
    layout: Layout = PAIRS,
) -> float:  # fmt: skip
    """Largest mean difference per token of a sequence, in nats.

    fresh, cached: per-token log-probs, in the order of `layout.sequences(examples)`. dtype: that of the computation.
    Raises ReferenceMismatchError, naming the example, where the difference is larger than rounding makes it.
    """
    differences = [float(np.abs(a - b).mean()) for a, b in zip(fresh, cached, strict=True)]
    worst = int(np.argmax(differences))
    tolerance = logps_tolerance(dtype)
    if not differences[worst] <= tolerance:  # nan too
        index, side = divmod(worst, len(layout.scored))
        row = f" (row {examples['row'][index]} of the data set)" if "row" in examples.column_names else ""
        raise ReferenceMismatchError(
            f"the cached reference log-probs of {list(layout.scored)[side]} of {layout.unit} {index}{row} are "
            f"{differences[worst]:.2e} nats a token away from those of {whose}; accepted are "
            f"{tolerance:g} in {dtype}. The cache was damaged or belongs to another model: name another cache_dir"
        )
    return differences[worst]


def logps_tolerance(dtype: torch.dtype) -> float:
    """Nats a token by which two computations of the same log-probs in a dtype may differ, in the mean."""
    return _TOLERANCE.get(dtype, _TOLERANCE_16_BIT)


def sample_indices(n: int) -> list[int]:
    """A few positions spread over n examples, the same ones every time."""
    return sorted({round(i) for i in np.linspace(0, n - 1, min(CHECKED_PAIRS, n))})


class _Chained(Sequence[Any]):
    """Several data sets as one sequence of examples."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self._datasets = datasets
        self._ends = np.cumsum([len(dataset) for dataset in datasets])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self._datasets[which][index - int(self._ends[which - 1] if which else 0)]


class _Strided(Sequence[Any]):
    """Items first, first + step, ... of a sequence: one process's share."""

    def __init__(self, items: Sequence[Any], first: int, step: int) -> None:
        self._items, self._positions = items, range(first, len(items), step)

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self._items[i] for i in self._positions[index]]
        return self._items[self._positions[index]]
