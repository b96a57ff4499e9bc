"""The first half of a PPO phase: prompts → completions → scores, log-probs and values → experience."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastalign.losses import RunningMoments, deviation_metrics
from fastalign.models.actor_critic import ActorCritic
from fastalign.models.inference import inference
from fastalign.models.layouts import plan_layout, run_layout
from fastalign.reference import score
from fastalign.rollouts import Completion, Sampler, sampler_gap, score_completions
from fastalign.trainers.batches import ROW_NUMBERS, Batch, grouped_by_prompt, split_batch
from fastalign.trainers.config import by_device
from fastalign.trainers.experience import Experience, make_experience
from fastalign.trainers.ppo_config import DEFAULT_ROLLOUT_BATCH_TOKENS, PPOConfig
from fastalign.trainers.reward_functions import Rewards, Samples, token_sequences
from fastalign.types import Metric

ReadColumns = Callable[[Sequence[int]], dict[str, list[Any]]]


class PromptSet(torch.utils.data.Dataset[dict[str, Any]]):
    """Tokenised prompts, each with its row's number.

    read_columns: from row numbers to the rows' other columns, for a data set with a `row` column; None for one that has
    its other columns itself, whose rows are its own.
    """

    def __init__(self, dataset: Any, read_columns: ReadColumns | None = None) -> None:
        self.dataset, self._read_columns = dataset, read_columns

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.dataset[index]
        row = index if self._read_columns is None else int(example["row"])
        return {"prompt_ids": [int(token) for token in example["prompt_ids"]], "row": row}

    def columns(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        """What the data says of these rows beside the ids: a list by name, of one value per row."""
        if self._read_columns is not None:
            return self._read_columns(rows)
        plain = self.dataset.with_format(None)
        names = [name for name in plain.column_names if name not in ("prompt_ids", "row")]
        examples = [plain[int(row)] for row in rows]
        return {name: [example[name] for example in examples] for name in names}

    def __getstate__(self) -> dict[str, Any]:
        """For a loader's workers, which need the ids alone: a reader may hold what cannot be pickled."""
        reader = None if self._read_columns is None else _unread
        return {"dataset": self.dataset, "_read_columns": reader}


def _unread(rows: Sequence[int]) -> dict[str, list[Any]]:
    raise ValueError("columns are read where the data set was made, not in a worker")


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """The prompts of a phase in one process, by row. No mapping, so that moving batches to a device leaves it alone;
    nothing but numbers, so that a loader's workers can hand it over."""

    prompt_ids: list[list[int]]
    rows: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def collate(cls, examples: list[dict[str, Any]]) -> PromptBatch:
        return cls([example["prompt_ids"] for example in examples], [example["row"] for example in examples])

    def first(self, count: int) -> PromptBatch:
        return PromptBatch(self.prompt_ids[:count], self.rows[:count])


@dataclass(kw_only=True, eq=False)
class Collector:
    """Samples and scores what a phase trains on.

    model: the ActorCritic, not wrapped. reference: the model whose log-probs the KL is to, and the adapter that is on
    in it (None for none); the policy itself, under LoRA. None: no KL. collate: from examples with input_ids and
    completion_mask to a padded batch. to_device: moves a batch. autocast: the trainer's. reduce: sums over processes.
    process_index: of this process. token_layout: of the batches that values are computed of.
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
    token_layout: str = "padded"

    def __post_init__(self) -> None:
        self.tokens = by_device(self.args.rollout_batch_tokens, DEFAULT_ROLLOUT_BATCH_TOKENS, self.args)

    def collect(
        self, prompts: PromptBatch, columns: ReadColumns | None, seed: Sequence[int], *, kl_coef: float,
        moments: RunningMoments | None, learn: bool = True, counts: bool = True,
    ) -> tuple[Batch, Experience]:  # fmt: skip
        """(the padded batch with old_logps, advantages and what else an update needs (n,), the experience).

        columns: from the prompts' rows to the data's other columns. seed: integers that name this phase; with them, the
        weights and the prompts its completions are determined. moments: normalise the scores; with `learn` they take
        them in first. counts: False where this process only takes part, in a phase that others have prompts for.
        """
        args = self.args
        self.sampler.sync(self.model.policy)
        whole = np.random.SeedSequence([*seed, self.process_index]).generate_state(1)[0]
        completions = self.sampler.generate(prompts.prompt_ids, num_samples=args.num_generations, seed=int(whole))
        samples = Samples(
            prompt_ids=_repeated(prompts.prompt_ids, args.num_generations),
            completions=completions,
            rows=_repeated(prompts.rows, args.num_generations),
            read_columns=columns,
        )
        found, each = self.rewards(samples)
        scores = torch.from_numpy(found).to(args.device)
        if moments is not None and learn:
            moments.update(scores, reduce=self.reduce)
        batch = self.to_device(self.collate(_examples(samples)))
        batch["prompts"] = np.repeat(np.arange(len(prompts)), args.num_generations)
        batch[ROW_NUMBERS] = np.array(samples.rows)
        logps = self._logps(prompts, completions)
        batch["old_logps"] = self._flat(logps)
        if self.reference is not None:
            batch["ref_logps"] = self._flat(self._ref_logps(samples, *self.reference))
        if args.sampler_correction is not None:
            batch["sampler_logps"] = self._flat(self._sampler_logps(completions))
        if self.model.has_critic:
            batch["old_values"] = self._values(batch)
        experience = make_experience(
            args,
            scores=scores,
            finished=torch.tensor([completion.finished for completion in completions], device=args.device),
            cu_seqlens=np.asarray(batch["cu_seqlens"]),
            logps=batch["old_logps"],
            ref_logps=batch.get("ref_logps"),
            values=batch.get("old_values"),
            kl_coef=kl_coef,
            moments=moments,
            reduce=self.reduce,
            counts=counts,
        )
        batch["advantages"] = experience.advantages
        if experience.returns is not None:
            batch["returns"] = experience.returns
        experience.metrics.update(self._source_metrics(each, counts))
        experience.metrics.update(self._sampler_metrics(completions, logps, counts))
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

    def _sampler_logps(self, completions: list[Completion]) -> list[np.ndarray]:
        found = [completion.logps for completion in completions if completion.logps is not None]
        if len(found) < len(completions):
            raise ValueError(
                f"sampler_correction={self.args.sampler_correction!r} needs the sampler's log-probs of its tokens, and "
                f"{type(self.sampler).__name__} gave none"
            )
        return found

    def _flat(self, logps: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(logps)).to(self.args.device)

    def _values(self, batch: Batch) -> Tensor:
        """(n,) float32, the critic's values at the batch's rows."""
        values = torch.zeros(len(batch["rows"]), device=self.args.device)
        whole = grouped_by_prompt(batch, self.tokens) | {"position": np.arange(len(values))}
        with inference(self.model, self.args.device, autocast=self.autocast):
            for piece in split_batch(whole, self.tokens, layout=self.token_layout):
                _, found = run_layout(self.model, piece, plan_layout(piece, self.token_layout), scores=True)
                values[torch.from_numpy(piece["position"]).to(values.device)] = found
        return values

    def _source_metrics(self, each: dict[str, np.ndarray], counts: bool) -> dict[str, Metric]:
        """rewards/{name}/{mean,std} of each of several rewards, unweighted, over the completions it applies to."""
        if len(each) == 1:
            return {}
        metrics: dict[str, Metric] = {}
        for name, values in each.items():
            applies = torch.from_numpy(~np.isnan(values) * counts).to(self.args.device)
            found = torch.from_numpy(np.nan_to_num(values)).to(self.args.device)
            metrics[f"rewards/{name}/mean"] = Metric((found * applies).sum(), applies.sum().float())
            metrics |= deviation_metrics(f"rewards/{name}/std", found, applies)
        return metrics

    def _sampler_metrics(
        self, completions: list[Completion], logps: list[np.ndarray], counts: bool
    ) -> dict[str, Metric]:
        """How far the sampler's own log-probs are from ours; of extremes the mean over batches, weighted by tokens."""
        if completions[0].logps is None:
            return {}
        gap = sampler_gap(completions, logps)
        number = torch.full((), float(sum(map(len, logps)) * counts), device=self.args.device)
        return {name: Metric(number * figure, number) for name, figure in gap.items()}


def _repeated(items: Sequence[Any], times: int) -> list[Any]:
    return [item for item in items for _ in range(times)]


def _examples(samples: Samples) -> list[dict[str, Any]]:
    """Of each sample prompt and completion, the completion's tokens being those that count."""
    return [
        {"input_ids": prompt + answer.ids, "completion_mask": [False] * len(prompt) + [True] * len(answer.ids)}
        for prompt, answer in zip(samples.prompt_ids, samples.completions, strict=True)
    ]
