"""What a preference loss is made of before training: its data and its reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from torch import nn

from fastalign.trainers.dpo_config import DPOConfig
from fastalign.trainers.dpo_reference import CachedReference, NoReference
from fastalign.trainers.examples import Examples, preference_examples
from fastalign.trainers.live_reference import LiveReference
from fastalign.trainers.reference import PAIRS, RESPONSES, RESPONSES_AND_MISMATCHED
from fastalign.trainers.response_examples import ResponseExamples

COLUMNS = tuple(
    dict.fromkeys(
        name
        for layout in (PAIRS, RESPONSES_AND_MISMATCHED)
        for name in (*layout.columns, *layout.scored, *layout.scored.values(), "label")
    )
)
"""All columns that a collator of `examples_of` may read."""


def examples_of(tokenizer: Any, args: DPOConfig) -> Examples:
    """The data that the loss asks for."""
    return preference_examples(tokenizer, args) if args.on_pairs else ResponseExamples(tokenizer, args)


def reference_of(
    args: DPOConfig, splits: Sequence[Dataset], ref_model: str | nn.Module | None, quantization_config: Any,
    with_adapter: bool,
) -> NoReference:  # fmt: skip
    """Where the loss gets its reference from; a separate one is scored, before the policy is loaded."""
    layout = PAIRS if args.on_pairs else RESPONSES_AND_MISMATCHED if args.needs_kl else RESPONSES
    if not args.needs_reference:
        if ref_model is not None:
            raise ValueError(f"ref_model is given, and loss_type={args.loss_type!r} has no reference: leave it out")
        return NoReference(args, layout)
    given: dict[str, Any] = {
        "ref_model": args.ref_model_name_or_path if ref_model is None else ref_model,
        "quantization_config": quantization_config, "with_adapter": with_adapter,
    }  # fmt: skip
    if args.precompute_ref_log_probs:
        return CachedReference(args, layout, splits, **given)
    return LiveReference(args, layout, **given)
