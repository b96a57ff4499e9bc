"""The first half of a PPO phase: prompts → completions → scores, log-probs and values → experience."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastalign.losses import RunningMoments
from fastalign.models.actor_critic import ActorCritic
from fastalign.reference import score
from fastalign.rollouts import Completion, Sampler, sampler_gap, score_completions
from fastalign.trainers.batches import Batch, split_batch
from fastalign.trainers.config import by_device
from fastalign.trainers.experience import Experience, make_experience
from fastalign.trainers.ppo_config import DEFAULT_ROLLOUT_BATCH_TOKENS, PPOConfig
from fastalign.trainers.reward_functions import Rewards, Samples, token_sequences
from fastalign.types import Metric

ReadColumns = Callable[[Sequence[int]], dict[str, list[Any]]]


class PromptSet(torch.utils.data.Dataset[dict[str, Any]]):
    """Tokenised prompts, each with its row's number and a way to the row's other columns."""

    def __init__(self, dataset: Any, columns: ReadColumns | None) -> None:
        self.dataset, self.columns = dataset, columns

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.dataset[index]
        prompt_ids = [int(token) for token in example["prompt_ids"]]
        return {"prompt_ids": prompt_ids, "row": int(example.get("row", index)), "columns": self.columns}


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """The prompts of a phase. No mapping, so that moving batches to a device leaves it alone."""

    prompt_ids: list[list[int]]
    rows: list[int]
    columns: ReadColumns | None

    @classmethod
    def collate(cls, examples: list[dict[str, Any]]) -> PromptBatch:
        columns = examples[0]["columns"]
        return cls([e["prompt_ids"] for e in examples], [e["row"] for e in examples], columns)


@dataclass(kw_only=True, eq=False)
class Collector:
    """Samples and scores what a phase trains on.

    model: the ActorCritic, not wrapped. reference: the model whose log-probs the KL is to, and the adapter that is on
    in it (None for none); the policy itself, under LoRA. None: no KL. collate: from examples with input_ids and
    completion_mask to a padded batch. to_device: moves a batch. autocast: the trainer's. reduce: sums over processes.
    process_index: of this process.
    """

    args: PPOConfig
    model: ActorCritic
    sampler: Sampler
    rewards: Rewards
    reference: tuple[nn.Module, str | None] | None
    collate: Callable[[list[dict[str, Any]]], Batch]
    to_device: Callable[[Batch], Batch]
    autocast: torch.dtype | None
    reduce: Callable[[Tensor], Tensor]
    process_index: int

    def __post_init__(self) -> None:
        self.tokens = by_device(self.args.rollout_batch_tokens, DEFAULT_ROLLOUT_BATCH_TOKENS, self.args)

    def collect(
        self, prompts: PromptBatch, seed: Sequence[int], *, kl_coef: float, moments: RunningMoments | None
    ) -> tuple[Batch, Experience]:
        """(the padded batch with old_logps, advantages and what else an update needs (n,), the experience).

        seed: integers that name this phase; with them, the weights and the prompts its completions are determined.
        """
        args = self.args
        whole = np.random.SeedSequence([*seed, self.process_index]).generate_state(1)[0]
        completions = self.sampler.generate(prompts.prompt_ids, num_samples=args.num_generations, seed=int(whole))
        samples = Samples(
            prompt_ids=_repeated(prompts.prompt_ids, args.num_generations),
            completions=completions,
            rows=_repeated(prompts.rows, args.num_generations),
            read_columns=prompts.columns,
        )
        scores, each = self.rewards(samples)
        batch = self.to_device(self.collate(_examples(samples)))
        logps = self._logps(prompts, completions)
        batch["old_logps"] = self._flat(logps)
        if self.reference is not None:
            batch["ref_logps"] = self._flat(self._ref_logps(samples, *self.reference))
        if self.model.has_critic:
            batch["old_values"] = self._values(batch)
        experience = make_experience(
            args,
            scores=torch.from_numpy(scores).to(args.device),
            finished=torch.tensor([completion.finished for completion in completions], device=args.device),
            cu_seqlens=np.asarray(batch["cu_seqlens"]),
            logps=batch["old_logps"],
            ref_logps=batch.get("ref_logps"),
            values=batch.get("old_values"),
            kl_coef=kl_coef,
            moments=moments,
            reduce=self.reduce,
        )
        batch["advantages"] = experience.advantages
        if experience.returns is not None:
            batch["returns"] = experience.returns
        experience.metrics.update(self._source_metrics(each))
        experience.metrics.update(self._sampler_metrics(completions, logps))
        return batch, experience

    def _logps(self, prompts: PromptBatch, completions: list[Completion]) -> list[np.ndarray]:
        scored = score_completions(
            self.model.policy, prompts.prompt_ids, completions, temperature=self.args.temperature,
            batch_tokens=self.tokens, autocast=self.autocast, backend=self.args.backend,
        )  # fmt: skip
        return [scores.logps for scores in scored]

    def _ref_logps(self, samples: Samples, reference: nn.Module, adapter: str | None) -> list[np.ndarray]:
        return score(
            reference, token_sequences(samples), adapter=adapter, temperature=self.args.temperature,
            autocast=self.autocast, batch_tokens=self.tokens,
        )  # fmt: skip

    def _flat(self, logps: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(logps)).to(self.args.device)

    @torch.no_grad()
    def _values(self, batch: Batch) -> Tensor:
        """(n,) float32, the critic's values at the batch's rows."""
        values = torch.zeros(len(batch["rows"]), device=self.args.device)
        training = self.model.training
        self.model.eval()
        for piece in split_batch(batch | {"position": np.arange(len(values))}, self.tokens):
            with torch.autocast(self.args.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                _, found = self.model(input_ids=piece["input_ids"], rows=piece["rows"])
            values[torch.from_numpy(piece["position"]).to(values.device)] = found
        self.model.train(training)
        return values

    def _source_metrics(self, each: dict[str, np.ndarray]) -> dict[str, Metric]:
        """rewards/{name}/{mean,std} of each of several rewards, unweighted, over the completions it applies to."""
        if len(each) == 1:
            return {}
        metrics = {}
        for name, values in each.items():
            found = values[~np.isnan(values)]
            for what, figure in (("mean", found.mean() if len(found) else 0.0), ("std", found.std())):
                metrics[f"rewards/{name}/{what}"] = self._metric(float(figure), len(found))
        return metrics

    def _sampler_metrics(self, completions: list[Completion], logps: list[np.ndarray]) -> dict[str, Metric]:
        if completions[0].logps is None:
            return {}
        gap = sampler_gap(completions, logps)
        return {name: self._metric(figure, sum(map(len, logps))) for name, figure in gap.items()}

    def _metric(self, value: float, weight: int) -> Metric:
        wide = torch.tensor([value * weight, float(weight)], device=self.args.device)
        return Metric(wide[0], wide[1])


def _repeated(items: Sequence[Any], times: int) -> list[Any]:
    return [item for item in items for _ in range(times)]


def _examples(samples: Samples) -> list[dict[str, Any]]:
    """Of each sample prompt and completion, the completion's tokens being those that count."""
    return [
        {"input_ids": prompt + answer.ids, "completion_mask": [False] * len(prompt) + [True] * len(answer.ids)}
        for prompt, answer in zip(samples.prompt_ids, samples.completions, strict=True)
    ]
