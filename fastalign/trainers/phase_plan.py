"""The plan of a PPO phase: sampling, scoring, and the passes over its mini-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from fastalign.models.batches import plan_batches
from fastalign.planning import ModelSettings, StepPlan, count_tokens, parts_of, scaled_flops
from fastalign.planning.phases import SAMPLING, SCORING, PhaseModels, Planned, SampledBatch, record_phase
from fastalign.trainers.batches import Batch, grouped_by_prompt, select_examples, split_batch
from fastalign.trainers.ppo_config import DEFAULT_ROLLOUT_BATCH_TOKENS, PPOConfig
from fastalign.trainers.reference import list_lengths
from fastalign.trainers.step_plan import RECORDED, RunPlan


@dataclass(frozen=True, kw_only=True)
class PhasePlan(RunPlan):
    """As RunPlan; a step is a phase, all of whose completions are as long as they can be.

    data            tokenised prompts
    critic, reference, rewards, with_reference: see `PhaseModels`
    """

    args: PPOConfig
    critic: Planned | None
    reference: Planned | None
    with_reference: bool
    rewards: Sequence[Planned]

    @property
    def _each(self) -> int:
        """Completions of a prompt that go through the model together, at most."""
        alone = self.model.layout != "shared"
        return 1 if alone else min(self.args.num_generations, self.args.mini_batch_size)

    @property
    def batch_examples(self) -> int:
        return max(self.args.mini_batch_size // self._each, 1)

    @cached_property
    def sizes(self) -> np.ndarray:
        """(n,) computed tokens of the completions of each prompt that go through together."""
        return self._prompt_tokens + self._each * self.args.response_length

    @cached_property
    def _prompt_tokens(self) -> np.ndarray:
        return list_lengths(self.data, "prompt_ids").astype(np.int64)

    def step_data(self) -> list[dict[str, Any]]:
        """The prompts of a phase."""
        return self._rows(self._phase_prompts(self.micro_batch_tokens))

    def _phase_prompts(self, limit: int) -> np.ndarray:
        return np.resize(self.heaviest(limit), self.args.prompts_per_phase)

    def batch(self, micro_batch_tokens: int) -> Batch:
        """A mini-batch as heavy as can be."""
        return self._completions(self.heaviest(micro_batch_tokens), self._each)

    def _completions(self, prompts: np.ndarray, each: int) -> Batch:
        """The padded batch of `each` completions of some prompts, grouped as the layout asks for."""
        answer = [0] * self.args.response_length
        examples = []
        for prompt in self.data.select(prompts)["prompt_ids"]:
            mask = [False] * len(prompt) + [True] * len(answer)
            examples += [{"input_ids": [*prompt, *answer], "completion_mask": mask}] * each
        batch = self.examples.collator(examples)
        batch["prompts"] = np.repeat(np.arange(len(prompts)), each)
        return batch

    def _pieces(self, batch: Batch, limit: int) -> list[Batch]:
        if self.model.layout == "shared":
            batch = grouped_by_prompt(batch)
        return split_batch(batch, limit, layout=self.model.layout, multiple_of=self.args.pad_to_multiple_of)

    def _mini_batches(self, limit: int) -> Iterator[list[Batch]]:
        """The passes of each mini-batch of a pass over a phase, drawn as the trainer draws them."""
        args = self.args
        phase = self._completions(self._phase_prompts(limit), args.num_generations)
        order = np.random.default_rng(args.seed).permutation(args.rollout_batch_size)
        for start in range(0, len(order), args.mini_batch_size):
            yield self._pieces(select_examples(phase, np.sort(order[start : start + args.mini_batch_size])), limit)

    def plan(self, micro_batch_tokens: int | None = None) -> StepPlan:
        """The plan of a phase."""
        limit = self.micro_batch_tokens if micro_batch_tokens is None else micro_batch_tokens
        args, layout = self.args, self.model.layout
        tokens, passes = dict.fromkeys(("padded", "real", "computed", "scored"), 0), 0
        for pieces in self._mini_batches(limit):
            passes += len(pieces) * args.num_ppo_epochs
            for name, count in count_tokens(pieces, layout).items():
                tokens[name] += count * args.num_ppo_epochs
        full = self._pieces(self.batch(limit), limit)
        recorded = full[: RECORDED[self.device_type]]
        mini_batches = [recorded] * min(args.num_mini_batches * args.num_ppo_epochs, 2)
        sampled, scored = self._sampled(), self._scored()
        record = record_phase(
            self._models(), mini_batches, sampled=sampled, scored=scored, head=self.head, optimizer=self.optimizer,
            autocast=self.autocast,
        )  # fmt: skip
        count = args.rollout_batch_size
        flops = {
            SAMPLING: record.flops[SAMPLING] * count // sampled.rows,
            SCORING: record.flops[SCORING] * count // len(scored["lengths"]),
        } | scaled_flops(record, tokens["computed"])
        return StepPlan(
            model=self.config.model_type, parameters=record.parameters, trainable=record.trainable,
            device_type=self.device_type, layout=layout, checkpointing=self.model.checkpointing,
            micro_batch_tokens=limit,
            parts=parts_of(record, self.device_type, with_scoring=False, **self.exchanged(record.trainable)),
            flops=flops, tokens=tokens, passes=passes,
            pass_tokens=max(count_tokens([piece], layout)["computed"] for piece in full),
            head=str(record.plans[0]), peaks=record.peaks,
        )  # fmt: skip

    def _models(self) -> PhaseModels:
        policy = self.model

        def like_policy(model: Planned) -> Planned:
            return model[0], replace(model[1], checkpointing=policy.checkpointing, layout=policy.layout)

        return PhaseModels(
            policy=(self.config, policy),
            critic=None if self.critic is None else like_policy(self.critic),
            value_head=self.args.value_head,
            reference=None if self.reference is None else like_policy(self.reference),
            with_reference=self.with_reference,
            rewards=[like_policy(model) for model in self.rewards],
        )

    @property
    def _rollout_tokens(self) -> int:
        given = self.args.rollout_batch_tokens
        return DEFAULT_ROLLOUT_BATCH_TOKENS[self.device_type] if given is None else given

    def _sampled(self) -> SampledBatch:
        """The largest batch of prompts that is sampled from."""
        prompt = int(self._prompt_tokens.max())
        lengths = np.full(self.args.rollout_batch_size, prompt + self.args.response_length)
        rows = len(plan_batches(lengths, self._rollout_tokens)[0])
        return SampledBatch(rows=rows, prompt_tokens=prompt, new_tokens=self.args.response_length)

    def _scored(self) -> Batch:
        """The largest batch of completions that is scored."""
        each = self.args.num_generations if self.model.layout == "shared" else 1
        number = self.args.rollout_batch_size // each
        longest = np.argsort(-self._prompt_tokens, kind="stable")
        return self._pieces(self._completions(np.resize(longest, number), each), self._rollout_tokens)[0]

    def _adapted(self, model: ModelSettings) -> PhasePlan:
        return replace(self, model=model, reference=None)
