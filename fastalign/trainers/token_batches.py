"""Batches by a budget of tokens instead of a number of examples, the same ones whenever a run is repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler

from fastalign.data.packing import best_fit_decreasing
from fastalign.trainers.config import TrainerConfig

_FINENESS = 16  # sizes within 1/16 of each other are exchangeable


class ExampleTokens(NamedTuple):
    """(n,) int64 each: an example's sequences, the longest of them, all their tokens, and those of their prompt."""

    sequences: np.ndarray
    longest: np.ndarray
    total: np.ndarray
    prompt: np.ndarray

    def computed(self, layout: str) -> np.ndarray:
        """(n,) tokens that an example costs alone. What responses have in common beyond the prompt is not counted."""
        if layout == "padded":
            return self.sequences * self.longest
        return self.total - (self.sequences - 1) * self.prompt if layout == "shared" else self.total


def example_tokens(dataset: Dataset) -> ExampleTokens:
    """Of tokenised examples of any trainer, without reading the ids. ValueError: no columns of such."""
    names = dataset.column_names
    table = dataset.select_columns([name for name in ID_COLUMNS if name in names]).with_format("arrow")[:]
    none, one = np.zeros(len(dataset), np.int64), np.ones(len(dataset), np.int64)
    if "input_ids" in names:
        lengths = _list_lengths(table["input_ids"])
        return ExampleTokens(one, lengths, lengths, none)
    if "prompt_ids" not in names or len(table.column_names) < 2:
        raise ValueError(
            f"max_tokens_per_batch needs tokenised examples, and the data have the columns {', '.join(names)}"
        )
    prompt = _list_lengths(table["prompt_ids"])
    if "response_ids" in names:
        count = _list_lengths(table["response_ids"])
        each = _list_lengths(pyarrow.compute.list_flatten(table["response_ids"]))
        starts = np.cumsum(count) - count
        longest, total = (function.reduceat(each, starts) for function in (np.maximum, np.add))
    else:
        responses = [_list_lengths(table[name]) for name in table.column_names if name != "prompt_ids"]
        count, longest, total = one * len(responses), np.max(responses, axis=0), np.sum(responses, axis=0)
    return ExampleTokens(count, prompt + longest, count * prompt + total, prompt)


ID_COLUMNS = ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids", "response_ids", "completion_ids")


def _list_lengths(column: Any) -> np.ndarray:
    lengths: np.ndarray = pyarrow.compute.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64)
    return lengths


class TokenBatches(Sampler[list[int]]):
    """Batches of example numbers, each of at most `budget` computed tokens; one process's share of them.

    Random batches: examples of about the same size are exchangeable. Which sizes make a batch is planned once, by best
    fit (for the padded layout: by like length); every epoch draws from seed and epoch which examples take the places,
    and the order of the batches. So all epochs have the same number of batches, an example is in exactly one, and a
    batch that is begun again is the same. Batches of about the same size follow each other, `stride` of them a group,
    so that the processes of a step have equal work; the groups are shuffled, an incomplete one comes last.

    Sequential batches (shuffle=False) are consecutive examples, in order, as many as fit.

    Every process has the same number of batches: the smallest ones are dealt out again, or large ones halved, until it
    comes out even (drop_last: what is left over is dropped). Where nothing is left to halve, the first batches are used
    twice.

    Raises ValueError: an example that is larger than the budget, naming it.
    """

    def __init__(
        self, tokens: ExampleTokens, budget: int, layout: str, *, seed: int, shuffle: bool = True, stride: int = 1,
        process_index: int = 0, num_processes: int = 1, drop_last: bool = False,
    ) -> None:  # fmt: skip
        sizes = tokens.computed(layout)
        if len(sizes) and int(sizes.max()) > budget:
            worst = int(sizes.argmax())
            raise ValueError(
                f"max_tokens_per_batch={budget}: example {worst} has {sizes[worst]} tokens in the {layout} layout, and "
                "is not divided; accepted is at least as much, or a smaller max_length"
            )
        self.seed, self.epoch, self.shuffle = seed, 0, shuffle
        self._process, self._processes, self._stride = process_index, num_processes, max(stride, num_processes)
        self._classes: np.ndarray | None = None
        if shuffle:
            self._classes, batches = _by_size(tokens, sizes, budget, layout)
            if not drop_last:
                batches = _dealt(batches, num_processes, tokens, sizes, budget, layout)
        else:
            batches = _consecutive(tokens, sizes, budget, layout)
        batches = _evened(batches, num_processes, drop_last)
        if shuffle:
            batches.sort(key=lambda batch: -int(sizes[batch].sum()))
        self._batches = batches  # of examples; shuffled, of places that examples of the same class may take

    def __len__(self) -> int:
        return len(self._batches) // self._processes

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.epoch_batches(self.epoch)[self._process :: self._processes]:
            yield batch.tolist()

    def epoch_batches(self, epoch: int) -> list[np.ndarray]:
        """The batches of all processes, in order."""
        if self._classes is None:
            return self._batches
        rng = np.random.default_rng([self.seed, epoch])
        taken = np.empty(len(self._classes), np.int64)
        by_class = np.argsort(self._classes, kind="stable")
        shuffled = rng.permutation(len(self._classes))
        taken[by_class] = shuffled[np.argsort(self._classes[shuffled], kind="stable")]
        groups = [self._batches[i : i + self._stride] for i in range(0, len(self._batches), self._stride)]
        whole = len(self._batches) // self._stride
        order = [*rng.permutation(whole).tolist(), *range(whole, len(groups))]
        return [np.sort(taken[batch]) for group in order for batch in groups[group]]


def _dealt(
    batches: list[np.ndarray], processes: int, tokens: ExampleTokens, sizes: np.ndarray, budget: int, layout: str
) -> list[np.ndarray]:
    """The smallest batches, those that do not make a round of the processes, as one batch for each: if they fit."""
    left = len(batches) % processes
    if not left:
        return batches
    batches = sorted(batches, key=lambda batch: -int(sizes[batch].sum()))
    pool = np.concatenate(batches[-left:])
    hands: list[list[int]] = [[] for _ in range(processes)]
    loads = np.zeros(processes)
    for example in pool[np.argsort(-sizes[pool], kind="stable")].tolist():
        lightest = int(loads.argmin())
        hands[lightest].append(example)
        loads[lightest] += sizes[example]
    width, rows = _shape(tokens, sizes, budget, layout)
    if all(hand and width[hand].max() * rows[hand].sum() <= budget for hand in hands):
        return batches[:-left] + [np.array(hand) for hand in hands]
    return batches


def _shape(tokens: ExampleTokens, sizes: np.ndarray, budget: int, layout: str) -> tuple[np.ndarray, np.ndarray]:
    """(width, rows) of each example, rounded up to its class: (largest width) · (sum of rows) is what a batch costs."""
    if layout == "padded":
        return np.minimum(_rounded_up(tokens.longest), budget // tokens.sequences), tokens.sequences  # alone it fits
    return np.ones(len(sizes), np.int64), np.minimum(_rounded_up(sizes), budget)


def _by_size(tokens: ExampleTokens, sizes: np.ndarray, budget: int, layout: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """The class of each example, and the batches of the plan, in which members of a class may change places."""
    width, rows = _shape(tokens, sizes, budget, layout)
    if layout == "padded":
        classes = width * (int(rows.max()) + 1) + rows
        order = np.argsort(-classes, kind="stable")
        return classes, [order[batch] for batch in _filled(width[order], rows[order], budget)]
    return rows, [np.array(batch) for batch in best_fit_decreasing(rows, budget)]


def _rounded_up(sizes: np.ndarray) -> np.ndarray:
    quantum = np.maximum(2 ** np.floor(np.log2(np.maximum(sizes, 1))).astype(np.int64) // _FINENESS, 1)
    rounded: np.ndarray = -(-sizes // quantum) * quantum
    return rounded


def _consecutive(tokens: ExampleTokens, sizes: np.ndarray, budget: int, layout: str) -> list[np.ndarray]:
    if layout == "padded":
        return _filled(tokens.longest, tokens.sequences, budget)
    return _filled(np.ones(len(sizes), np.int64), sizes, budget)


def _filled(width: np.ndarray, rows: np.ndarray, budget: int) -> list[np.ndarray]:
    """Consecutive examples, as many as keep (sum of rows) · (largest width) within the budget."""
    batches, start, total, widest = [], 0, 0, 0
    for i, (own, count) in enumerate(zip(width.tolist(), rows.tolist(), strict=True)):
        total, widest = total + count, max(widest, own)
        if total * widest > budget:
            batches.append(np.arange(start, i))
            start, total, widest = i, count, own
    return [*batches, np.arange(start, len(width))] if len(width) else []


def _evened(batches: list[np.ndarray], processes: int, drop_last: bool) -> list[np.ndarray]:
    """As many batches for each process."""
    if drop_last:
        return batches[: len(batches) // processes * processes]
    batches = list(batches)
    while len(batches) % processes:
        largest = max(range(len(batches)), key=lambda i: len(batches[i]))
        if (count := len(batches[largest])) < 2:
            missing = -len(batches) % processes
            return batches + [batches[i % len(batches)] for i in range(missing)]
        batches[largest : largest + 1] = [batches[largest][: count // 2], batches[largest][count // 2 :]]
    return batches


def token_dataloader(
    dataset: Dataset, collator: Any, args: TrainerConfig, layout: str, accelerator: Accelerator,
    worker_init_fn: Callable[[int], None],
) -> DataLoader[Any]:  # fmt: skip
    """A loader of one process's `TokenBatches`, prepared as the Trainer's own is."""
    sampler = TokenBatches(
        example_tokens(dataset), args.max_tokens_per_batch or 0, layout,
        seed=args.seed if args.data_seed is None else args.data_seed,
        shuffle=args.train_sampling_strategy == "random",
        stride=accelerator.num_processes * args.gradient_accumulation_steps,
        process_index=accelerator.process_index, num_processes=accelerator.num_processes,
        drop_last=args.dataloader_drop_last,
    )  # fmt: skip
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
        in_order=getattr(args, "dataloader_in_order", True),
        worker_init_fn=worker_init_fn,
    )
    # the sampler knows its process: accelerate has nothing left to share out
    return prepare_data_loader(
        loader, accelerator.device, num_processes=1, process_index=0, put_on_device=accelerator.device_placement,
        non_blocking=accelerator.non_blocking,
    )  # fmt: skip
