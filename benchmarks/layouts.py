"""The backbone of a model, forward and backward, in every token layout: CPU time and kept activations.

    python benchmarks/layouts.py --model hh-tiny --data hh_harmless.jsonl.gz [--rounds 5]

Two batches: real preference pairs, and lists of short responses to one prompt each (random tokens), where calls of
attention are many and small. "shared, whole last layer" computes the last layer's queries and MLP for every token, read
or not: the difference is what leaving them out saves. Time is that of the process on one thread, so that other
processes matter little; the median over interleaved rounds. Kept activations: distinct memory that autograd holds for
the backward.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import harness
import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer

from fastalign.data import ListCollator, PreferenceCollator, prepare_preferences
from fastalign.models import TOKEN_LAYOUTS, enable_segments, fuse_head, load_causal_lm, plan_layout, run_layout
from fastalign.models.layouts import TokenLayout

Batch = dict[str, Any]


def real_pairs(arguments: argparse.Namespace) -> Batch:
    found = prepare_preferences(
        arguments.data, AutoTokenizer.from_pretrained(arguments.model), max_length=arguments.max_length,
        on_bad_row="skip",
    )  # fmt: skip
    return PreferenceCollator(0)(found.dataset.select(range(arguments.pairs)).to_list())


def short_lists(vocabulary: int) -> Batch:
    """Eight prompts of 30 to 89 tokens, eight responses of 7 to 21 tokens to each."""
    draw = np.random.default_rng(0)

    def tokens(low: int, high: int) -> np.ndarray:
        return draw.integers(5, vocabulary, draw.integers(low, high))

    examples = [
        {"prompt_ids": tokens(30, 90), "response_ids": [tokens(7, 22) for _ in range(8)], "ranks": list(range(1, 9))}
        for _ in range(8)
    ]
    return ListCollator(0)(examples)


WHOLE = ", whole last layer"


def planned(batch: Batch, mode: str) -> TokenLayout | None:
    layout = plan_layout(batch, mode.removesuffix(WHOLE))
    if layout is not None and mode.endswith(WHOLE):
        layout.segments.needed = None
    return layout


def forward(model: nn.Module, batch: Batch, mode: str) -> torch.Tensor:
    """(n, H) hidden states of the scored rows; the plan is part of the work."""
    return run_layout(model, batch, planned(batch, mode), lambda hidden, head: hidden)


def kept_mib(model: nn.Module, batch: Batch, mode: str) -> float:
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(model, batch, mode)
    return sum(sizes.values()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = fuse_head(enable_segments(load_causal_lm(arguments.model, dtype=torch.float32))).train()
    batches = {"pairs": real_pairs(arguments), "short lists": short_lists(model.config.vocab_size)}
    rows: list[dict[str, Any]] = []
    for name, batch in batches.items():
        seconds: dict[str, list[float]] = {mode: [] for mode in (*TOKEN_LAYOUTS, "shared" + WHOLE)}
        gradient = torch.randn(len(batch["rows"]), model.config.hidden_size)
        for _ in range(arguments.rounds):
            for mode, own in seconds.items():
                start = time.process_time()
                forward(model, batch, mode).backward(gradient)
                own.append(time.process_time() - start)
                model.zero_grad()
        padded = statistics.median(seconds["padded"])
        for mode, own in seconds.items():
            layout = planned(batch, mode)
            computed = batch["input_ids"].numel() if layout is None else layout.computed
            middle = statistics.median(own)
            rows.append(
                {
                    "batch": name, "layout": mode, "tokens": computed, "scored": len(batch["rows"]),
                    "cpu_seconds": middle, "over_padded": middle / padded, "us_per_token": middle / computed * 1e6,
                    "kept_mib": kept_mib(model, batch, mode),
                }
            )  # fmt: skip
            harness.say(**rows[-1])
    if not arguments.no_save:
        harness.append_rows("layouts", "cpu", rows)


if __name__ == "__main__":
    main()
