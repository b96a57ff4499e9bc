"""What the plans of a run's steps are made from (fastalign.planning): model, lengths of the data, settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PretrainedConfig

from fastalign.planning import (
    HeadSettings,
    ModelSettings,
    OptimizerSettings,
    StepPlan,
    auto_micro_batch_tokens,
    count_tokens,
    memory_budget,
    parts_of,
    record_step,
    scaled_flops,
)
from fastalign.trainers.batches import Batch, split_batch
from fastalign.trainers.config import DEFAULT_MICRO_BATCH_TOKENS, TrainerConfig
from fastalign.trainers.dpo_config import DPOConfig
from fastalign.trainers.examples import Examples
from fastalign.trainers.loading import lora_config
from fastalign.trainers.run_settings import checkpoint_dtype, replace_fields
from fastalign.trainers.token_batches import example_tokens

_AS_FULL = 0.95
# Passes of a step that are recorded: the largest, and some more with gradients there; on the CPU several, until
# malloc's holes are as they will be.
RECORDED = {"cpu": 4, "cuda": 2}


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What plans are made from; `plan` takes a micro batch other than the run's.

    args            the run's config
    config          of its model
    data, examples  tokenised training examples, and what makes batches of them
    device_type     of the run that is planned, which need not be this machine's
    """

    args: TrainerConfig
    config: PretrainedConfig
    data: Dataset
    examples: Examples
    device_type: str
    model: ModelSettings
    head: HeadSettings
    optimizer: OptimizerSettings
    autocast: torch.dtype | None
    reference_bytes: Callable[[int, int], int]

    @property
    def micro_batch_tokens(self) -> int:
        """The run's, or its default. ValueError for "auto", which is for `auto` to find."""
        given = self.args.micro_batch_tokens
        if isinstance(self.args, DPOConfig) and self.args.couples_batch:
            return 0
        if given == "auto":
            raise ValueError("micro_batch_tokens='auto' has no plan of its own: auto() chooses a number and plans it")
        return DEFAULT_MICRO_BATCH_TOKENS[self.device_type] if given is None else given

    @property
    def _scores_first(self) -> bool:
        """Whether the reference's log-probs come from the model itself before it trains."""
        args = self.args
        return bool(getattr(args, "precompute_ref_log_probs", False)) or getattr(args, "reference_free", True) is False

    @cached_property
    def sizes(self) -> np.ndarray:
        """(n,) computed tokens of each example."""
        return example_tokens(self.data).computed(self.model.layout)

    @property
    def batch_examples(self) -> int | None:
        """Examples of a device batch; None where it is a budget of tokens that bounds it."""
        return self.args.per_device_train_batch_size if self.args.max_tokens_per_batch is None else None

    @property
    def batch_tokens(self) -> int:
        """Computed tokens of a device batch at most."""
        if self.batch_examples is not None:
            return int(self.sizes.max()) * self.batch_examples
        assert self.args.max_tokens_per_batch is not None
        return self.args.max_tokens_per_batch

    def heaviest(self, micro_batch_tokens: int) -> np.ndarray:
        """Numbers of the examples of a device batch that holds a pass as full as the data allow, again and again.

        A pass takes whole examples. How many of about one length fill it is found over the data's own lengths, or of
        any length where those leave much room; of what fills it about as well, the longest examples are taken, because
        more passes then follow the first with gradients in memory. Where nothing is cut, these are the longest of all.
        """
        count, order = self.batch_examples, np.argsort(-self.sizes, kind="stable")
        if count is None:
            limit = min(micro_batch_tokens or self.batch_tokens, self.batch_tokens)
            most = max(limit // max(int(self.sizes.min()), 1), 1)
        elif not micro_batch_tokens:
            return np.resize(order[:count], count)
        else:
            limit, most = micro_batch_tokens, count
        candidates = [order[:1]]
        for number in range(1, min(most, len(order)) + 1):
            start = int(np.searchsorted(-self.sizes[order], -(limit // number)))
            candidates.append(order[start : start + number])
        if self.model.layout != "padded":  # where examples of any length go well together
            candidates.append(self._filled(order, limit, most))
        fills = np.array([int(self.sizes[chosen].sum()) for chosen in candidates])
        best = int(np.argmax(fills >= _AS_FULL * fills.max()))
        if count is not None:
            return np.resize(candidates[best], count)
        repeated = np.tile(candidates[best], self.batch_tokens // int(fills[best]) + 1)
        return repeated[: max(int(np.searchsorted(np.cumsum(self.sizes[repeated]), self.batch_tokens, "right")), 1)]

    def _filled(self, order: np.ndarray, limit: int, most: int) -> np.ndarray:
        """Examples of any lengths that fill a pass, the longest first."""
        chosen: list[int] = []
        room, smallest = limit, int(self.sizes[order[-1]])
        for number in order.tolist():
            if room < smallest or len(chosen) == most:
                break
            if (size := int(self.sizes[number])) <= room:
                chosen.append(number)
                room -= size
        return np.array(chosen, np.int64)

    def batch(self, micro_batch_tokens: int) -> Batch:
        """The heaviest device batch."""
        batch = self.examples.collator(self._rows(self.heaviest(micro_batch_tokens)))
        return {name: value for name, value in batch.items() if name != "kl"}

    def step_data(self) -> list[dict[str, Any]]:
        """The examples of a device batch that is as heavy as can be, to measure what is planned."""
        return self._rows(self.heaviest(self.micro_batch_tokens))

    def _rows(self, numbers: np.ndarray) -> list[dict[str, Any]]:
        chosen = self.data.select(numbers)
        return [chosen[i] for i in range(len(chosen))]

    def plan(self, micro_batch_tokens: int | None = None) -> StepPlan:
        """The plan of an optimizer step over the heaviest batch."""
        limit = self.micro_batch_tokens if micro_batch_tokens is None else micro_batch_tokens
        layout, accumulated = self.model.layout, self.args.gradient_accumulation_steps
        pieces = split_batch(self.batch(limit), limit, layout=layout, multiple_of=self.args.pad_to_multiple_of)
        passes = pieces * accumulated
        recorded = passes[: RECORDED[self.device_type]]
        record = record_step(
            self.config, recorded, model=self.model, head=self.head, optimizer=self.optimizer, autocast=self.autocast
        )
        tokens = count_tokens(passes, layout)
        beside = {"reference": self.reference_bytes(record.parameters, record.trainable)}
        beside |= self.exchanged(record.trainable)
        return StepPlan(
            model=self.config.model_type,
            parameters=record.parameters,
            trainable=record.trainable,
            device_type=self.device_type,
            layout=layout,
            checkpointing=self.model.checkpointing,
            micro_batch_tokens=limit,
            parts=parts_of(record, self.device_type, with_scoring=self._scores_first, **beside),
            flops=scaled_flops(record, tokens["computed"]),
            tokens=tokens,
            passes=len(passes),
            pass_tokens=max(count_tokens([piece], layout)["computed"] for piece in pieces),
            head=str(record.plans[0]) if record.plans else "a score of each sequence",
        )

    def exchanged(self, trainable: int) -> dict[str, int]:
        """What several processes take to exchange the gradients of so many parameters."""
        return {"processes": trainable * 4} if self.args.world_size > 1 else {}

    def auto(self, memory_gb: float | None = None, device_bytes: int | None = None) -> tuple[int, StepPlan]:
        """`micro_batch_tokens` that a memory budget allows, and its plan; see `auto_micro_batch_tokens`."""
        budget = memory_budget(self.device_type, memory_gb, device_bytes)
        return auto_micro_batch_tokens(self.plan, budget, largest=self.batch_tokens)

    def alternatives(self, plan: StepPlan) -> list[tuple[str, StepPlan]]:
        """Plans with one setting of `plan` changed that would need less."""
        limit = plan.micro_batch_tokens
        found: list[tuple[str, RunPlan]] = []
        if not self.model.checkpointing:
            found.append(("gradient_checkpointing", replace(self, model=replace(self.model, checkpointing=True))))
        if self.model.adapter is None and not self.model.scalar:
            adapter = lora_config(replace_fields(self.args, use_peft=True), None)
            found.append(
                ("use_peft", self._adapted(replace(self.model, adapter=adapter, dtype=checkpoint_dtype(self.config))))
            )
        if self.autocast is None:
            found.append(("bf16", replace(self, autocast=torch.bfloat16)))
        plans = [(words, other.plan(limit)) for words, other in found]
        if limit > 1 and self.batch_examples != 1:
            plans.append((f"micro_batch_tokens {limit // 2}", self.plan(limit // 2)))
        return plans

    def _adapted(self, model: ModelSettings) -> RunPlan:
        """With an adapter over a frozen base, which is its own reference."""
        return replace(self, model=model, reference_bytes=lambda *_: 0)
