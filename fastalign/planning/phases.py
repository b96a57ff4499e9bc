"""A phase of reinforcement learning, recorded: completions are sampled and scored, then trained on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from fastalign.models.head import Head, base_causal_lm
from fastalign.models.inference import evaluating
from fastalign.models.layouts import TokenLayout, plan_layout, run_layout
from fastalign.planning.head import HeadSettings, PlannedHead
from fastalign.planning.models import ModelSettings, meta_model, nothing_packed
from fastalign.planning.recorder import END_OF_PASS, WEIGHTS, Recorder
from fastalign.planning.step import (
    Batch,
    OptimizerSettings,
    StepRecord,
    Steps,
    count_tokens,
    largest_group,
    on_device,
    place,
    record_twice,
    recording,
    scores_of,
)

Planned = tuple[PretrainedConfig, ModelSettings]
"""A model to plan for: its config, and how it is loaded and trained."""

SAMPLING, SCORING, UPDATE = "sampling", "scoring", "update"
# Last steps of sampling that are recorded: the cache is largest, and on the CPU a heap's holes are as they will be.
_LAST_STEPS = {"cpu": 8, "cuda": 2}


@dataclass(frozen=True, kw_only=True)
class PhaseModels:
    """What is in memory during a phase.

    critic          of its own, or None; value_head: one on the policy's trunk instead
    reference       a frozen model beside the policy, or None
    with_reference  whether a reference is scored: the policy without its adapter, where none is beside it
    rewards         frozen models that score completions
    """

    policy: Planned
    critic: Planned | None = None
    value_head: bool = False
    reference: Planned | None = None
    with_reference: bool = False
    rewards: Sequence[Planned] = ()


@dataclass(frozen=True, kw_only=True)
class SampledBatch:
    """A batch of prompts that are continued together: its rows, and tokens of prompts and of completions."""

    rows: int
    prompt_tokens: int
    new_tokens: int


def record_phase(
    models: PhaseModels,
    mini_batches: Sequence[Sequence[Batch]],
    *,
    sampled: SampledBatch,
    scored: Batch,
    head: HeadSettings,
    optimizer: OptimizerSettings,
    autocast: torch.dtype | None = None,
) -> StepRecord:
    """Record phases on tensors without memory: one batch is sampled, one scored, then the mini-batches' passes.

    mini_batches: of each the passes, padded batches on the host. Sampling and scoring go through the batches of a phase
    one after the other, so the largest stands for all.

    flops: forward, backward and head of the passes, `sampling` of one batch and `scoring` of one. peaks: of `sampling`,
    `scoring` and `update`.

    Raises ValueError: see `meta_model`; a model that cannot be sampled from without numbers.
    """
    config, settings = models.policy
    policy = meta_model(config, settings)
    with recording(head.device_type) as recorder:
        place(policy, settings, recorder)
        critic = None if models.critic is None else _placed(models.critic, recorder, "critic", trains=True)
        reference = None if models.reference is None else _placed(models.reference, recorder, "reference")
        rewards = [_placed(model, recorder, "rewards") for model in models.rewards]
        trained = _Trained(policy, critic, settings, recorder, value_head=models.value_head)
        steps = _PhaseSteps(trained, settings, recorder, PlannedHead(head, recorder), optimizer, autocast)
        if models.with_reference and reference is None:
            reference = policy
        phase = _Phase(steps, reference, rewards, sampled, scored)
        record = record_twice(
            steps, lambda: phase.run(mini_batches),
            count_tokens([piece for pieces in mini_batches for piece in pieces], settings.layout),
        )  # fmt: skip
        return replace(record, peaks=phase.peaks)


def _placed(model: Planned, recorder: Recorder, name: str, *, trains: bool = False) -> nn.Module:
    made = meta_model(*model)
    place(made, model[1], recorder, name)
    return made if trains else made.requires_grad_(False).eval()


class _Trained(nn.Module):
    """Policy and critic, under one optimizer."""

    def __init__(
        self, policy: nn.Module, critic: nn.Module | None, settings: ModelSettings, recorder: Recorder, *,
        value_head: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.policy, self.critic, self.value_head = policy, critic, None
        if value_head:
            width = base_causal_lm(policy).config.get_text_config(decoder=True).hidden_size
            with recorder.phase(WEIGHTS):
                self.value_head = nn.Linear(width, 1, dtype=torch.promote_types(settings.dtype, torch.float32))


class _PhaseSteps(Steps):
    """Passes of policy and critic."""

    model: _Trained

    def loss(self, batch: Batch, layout: TokenLayout | None, group_rows: int) -> Tensor:
        trained, policy_loss = self.model, self.planned(group_rows)

        def head_fn(hidden: Tensor, head: Head) -> Tensor:
            loss = policy_loss(hidden, head)
            if trained.value_head is not None:
                with torch.autocast("cpu", enabled=False):
                    loss = loss + trained.value_head(hidden.float()).sum()
            return loss

        loss: Tensor = run_layout(trained.policy, batch, layout, head_fn)
        if trained.critic is not None:
            loss = loss + run_layout(trained.critic, batch, layout, scores_of(trained.critic))
        return loss


class _Phase:
    """Runs phases, and keeps the peaks of the latest."""

    def __init__(
        self, steps: _PhaseSteps, reference: nn.Module | None, rewards: Sequence[nn.Module], sampled: SampledBatch,
        scored: Batch,
    ) -> None:  # fmt: skip
        self.steps, self.reference, self.rewards = steps, reference, rewards
        self.sampled, self.scored = sampled, scored
        self.recorder = steps.recorder
        forward = replace(steps.planned.settings, schedule="auto", streamed=False)
        self.forward_head = PlannedHead(forward, self.recorder, steps.planned.workspace)
        self.peaks: dict[str, int] = {}

    def run(self, mini_batches: Sequence[Sequence[Batch]]) -> None:
        with self._part(SAMPLING):
            self._sample()
        with self._part(SCORING):
            self._score()
        with self._part(UPDATE):
            for pieces in mini_batches:
                self.steps.run(pieces)

    @contextlib.contextmanager
    def _part(self, name: str) -> Iterator[None]:
        """What happens inside has its own peak, and before the update its own count of operations."""
        recorder, before = self.recorder, self.recorder.flops.copy()
        recorder.peak = recorder.now
        with recorder.phase(name):
            yield
        self.peaks[name] = recorder.peak
        if name != UPDATE:
            total = sum((recorder.flops - before).values())
            recorder.flops.clear()
            recorder.flops.update(before)
            recorder.flops[name] += total
        recorder.mark(END_OF_PASS)

    @contextlib.contextmanager
    def _inference(self, model: nn.Module) -> Iterator[None]:
        narrow = self.steps.autocast
        with (
            torch.no_grad(), torch.autocast("cpu", dtype=narrow, enabled=narrow is not None), evaluating(model),
            nothing_packed(),
        ):  # fmt: skip
            yield

    # ---- scoring

    def _score(self) -> None:
        """Reward models, the policy, its reference and the critic look at the same batch."""
        trained, rows = self.steps.model, largest_group(self.scored)
        for reward in self.rewards:
            self._look(reward, scores_of(reward))
        self._look(trained.policy, self.forward_head(rows))
        if self.reference is not None:
            self._look(self.reference, self.forward_head(rows))
        if trained.critic is not None:
            self._look(trained.critic, scores_of(trained.critic))
        elif trained.value_head is not None:
            self._look(trained.policy, lambda hidden, head: hidden.float())

    def _look(self, model: nn.Module, head_fn: Callable[[Tensor, Any], Any]) -> None:
        with self._inference(model):
            run_layout(model, on_device(self.scored), plan_layout(self.scored, self.steps.settings.layout), head_fn)

    # ---- sampling

    def _sample(self) -> None:
        base = base_causal_lm(self.steps.model.policy)
        with self._inference(base):
            try:
                _Sampler(base, self.sampled, self.recorder).run(_LAST_STEPS[self.forward_head.settings.device_type])
            except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
                raise ValueError(
                    f"what sampling from {type(base).__name__} takes cannot be planned: {' '.join(str(error).split())}"
                ) from error


class _Sampler:
    """transformers' generation with a cache: the prompts, and the last tokens."""

    def __init__(self, model: PreTrainedModel, batch: SampledBatch, recorder: Recorder) -> None:
        self.model, self.batch, self.recorder = model, batch, recorder
        self.cache = DynamicCache(config=model.config)
        config = model.config.get_text_config(decoder=True)
        kinds = set(getattr(config, "layer_types", None) or ())
        self.masked = not kinds - {"full_attention"}  # prompts are padded on the left to the longest of them
        self.given = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        self._scores: Tensor | None = None  # of the token before

    def run(self, steps: int) -> None:
        """steps: that are recorded behind the prompts'."""
        batch = self.batch
        self._step(batch.prompt_tokens, batch.prompt_tokens)
        last = min(batch.new_tokens - 1, steps)
        if last:
            self._fill(batch.prompt_tokens + batch.new_tokens - 1 - last)
        before = sum(self.recorder.flops.values())
        for step in range(last):
            self._step(1, batch.prompt_tokens + batch.new_tokens - last + step)
        if last:  # the steps that were left out
            work = sum(self.recorder.flops.values()) - before
            self.recorder.flops[SAMPLING] += work * (batch.new_tokens - 1 - last) // last

    def _step(self, tokens: int, total: int) -> None:
        """One forward of so many new tokens, `total` with those in the cache; and the choice of the next."""
        rows = self.batch.rows
        mask = torch.empty(rows, 1, tokens, total, dtype=torch.bool) if self.masked else None
        logits = self.model(
            input_ids=torch.empty(rows, tokens, dtype=torch.int64), attention_mask=mask,
            position_ids=torch.empty(rows, tokens, dtype=torch.int64), past_key_values=self.cache, use_cache=True,
            **self.given,
        ).logits  # fmt: skip
        scores = logits[:, -1].to(torch.float32, copy=True)
        del logits, mask
        self._scores = scores
        torch.softmax(scores, dim=-1)
        self._name_cache()

    def _fill(self, length: int) -> None:
        """As the cache is with so many tokens."""
        for layer in self.cache.layers:
            own = min(length, layer.sliding_window - 1) if layer.is_sliding else length
            for name in ("keys", "values"):
                old: Tensor = getattr(layer, name)
                shape = (*old.shape[:2], own, old.shape[3])
                del old
                setattr(layer, name, None)
                setattr(layer, name, torch.empty(shape, dtype=layer.dtype))
            if layer.is_sliding:
                layer.cumulative_length = length
        self._name_cache()

    def _name_cache(self) -> None:
        self.recorder.rename((part for layer in self.cache.layers for part in (layer.keys, layer.values)), "cache")
