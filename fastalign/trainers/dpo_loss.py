"""The fused loss of a batch, or of a piece of one, and what it must know of everything beyond it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastalign.linear import linear_dpo_loss, linear_kto_loss
from fastalign.losses import mean_metric
from fastalign.models import Head
from fastalign.trainers.batches import Batch, num_examples
from fastalign.trainers.dpo_config import DPOConfig
from fastalign.trainers.layouts import scored_rows
from fastalign.trainers.meters import Meter
from fastalign.types import LossOutput, Metric


class RunningShift:
    """δ of BCO (arXiv 2404.04656): the middle between the rewards of good and of bad responses so far.

        δ = ½(mean of rewards/chosen + mean of rewards/rejected),   a mean of nothing being 0

    over every response trained on before the step at hand, which itself only counts afterwards: the loss of a step
    stays a sum over responses. The sums are float64, on the rewards' device.
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64)
        self._step: Tensor | None = None  # of the step at hand, this process

    @property
    def value(self) -> Tensor:
        """0-dim, without gradient."""
        totals, weights = self._sums.view(2, 2).unbind(1)
        return (totals / weights.clamp(min=1)).mean()

    def add(self, metrics: Mapping[str, Metric]) -> None:
        """Rewards of a part of the step at hand."""
        found = [metrics[f"rewards/{side}"] for side in ("chosen", "rejected")]
        sums = torch.stack([part for metric in found for part in metric])
        sums = sums.to(torch.float32 if sums.device.type == "mps" else torch.float64)
        self._step = sums if self._step is None else self._step + sums

    def finish_step(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Count the step's rewards of all processes, which `reduce` sums."""
        if self._step is not None:
            self._sums = self._sums.to(self._step) + reduce(self._step)
            self._step = None

    def state_dict(self) -> list[float]:
        """JSON-able; restores to the bit. Waits for the device."""
        return self._sums.tolist()

    def load_state_dict(self, state: list[float]) -> None:
        self._sums = torch.tensor(state, dtype=torch.float64)


@dataclass
class Surroundings:
    """What the loss of a piece depends on, beyond the piece: of the optimizer step, or of the data set evaluated.

    chosen_tokens   0-dim, all tokens of chosen responses; None: those of the piece
    pairs           that have them, in an evaluation
    kl              0-dim, the estimate of the policy's KL to the reference
    """

    chosen_tokens: Tensor | None = None
    pairs: int = 1
    kl: Tensor | None = None
    shift: RunningShift | None = None


def fused_loss(
    args: DPOConfig, batch: Batch, around: Surroundings, num_items: int | Tensor | None
) -> Callable[[Tensor, Head], LossOutput]:
    """From hidden states (n, H) of a batch's rows, and the head, to its loss: the sum over num_items (or its own)."""
    shift = None if around.shift is None else around.shift.value.to(batch["input_ids"].device)
    given: dict[str, Any] = {} if shift is None else {"shift": shift}
    given |= {
        "num_items": num_items, "token_metrics": args.token_metrics, "backend": args.backend,
        "schedule": args.schedule, "workspace_mb": args.workspace_mb,
    }  # fmt: skip

    def on_pairs(hidden: Tensor, head: Head) -> LossOutput:
        ref_logps = batch.get("ref_logps")
        if args.ld_alpha is not None and ref_logps is not None:
            ref_logps = batch["ref_per_token_logps"]
        tokens = around.chosen_tokens
        if tokens is not None and num_items is None:
            tokens = tokens * num_examples(batch) / around.pairs  # the piece's share, by its pairs
        return linear_dpo_loss(
            hidden, head.weight, ref_logps=None if ref_logps is None else ref_logps.to(hidden.device),
            num_chosen_tokens=tokens if "sft" in args.loss_types else None, **args.loss_options(), **given,
            **scored_rows(batch, hidden.device), **head.options,
        )  # fmt: skip

    def on_responses(hidden: Tensor, head: Head) -> LossOutput:
        return linear_kto_loss(
            hidden, head.weight, ref_logps=batch["ref_logps"].to(hidden.device),
            labels=batch["labels"].to(hidden.device), kl=around.kl, **args.loss_options(), **given,
            **scored_rows(batch, hidden.device), **head.options,
        )  # fmt: skip

    def loss(hidden: Tensor, head: Head) -> LossOutput:
        output = on_pairs(hidden, head) if args.on_pairs else on_responses(hidden, head)
        if shift is None:
            return output
        count = num_examples(batch) if args.on_pairs else len(batch["lengths"])
        return output._replace(metrics=output.metrics | {"delta": mean_metric(shift.expand(count))})

    return loss


class ResponseMeter(Meter):
    """A Meter of good and bad responses: rewards/margins is the difference of their mean rewards, as TRL logs it.

    Means over good or bad responses, of which there were none, are left out.
    """

    def values(self, reduce: Callable[[Tensor], Tensor] | None = None) -> tuple[dict[str, float], dict[str, Metric]]:
        values, sums = super().values(reduce)
        empty = {name for name, metric in sums.items() if name.endswith(("/chosen", "/rejected")) and not metric.weight}
        values = {name: value for name, value in values.items() if name not in empty}
        good, bad = (values.get(f"rewards/{side}") for side in ("chosen", "rejected"))
        if good is not None and bad is not None:
            values["rewards/margins"] = good - bad
        return values, sums


def learned(batch: Batch) -> Batch:
    """A batch without the mismatched responses, which nothing is learned from."""
    return {name: value for name, value in batch.items() if name != "kl"}


class AfterStep(TrainerCallback):
    """Calls a function between two optimizer steps."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._act()
