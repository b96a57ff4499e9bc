"""The second half of a PPO phase: passes over its mini-batches, each with an optimizer step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from fastalign.losses import merge_metrics
from fastalign.trainers.actor_critic import ActorCriticTrainer
from fastalign.trainers.batches import Batch, grouped_by_prompt, select_examples, split_batch
from fastalign.trainers.ppo_config import PPOConfig
from fastalign.trainers.ppo_state import PPOState
from fastalign.trainers.ppo_trpo import policy_trpo_step, trpo_metrics
from fastalign.trainers.ppo_update import policy_value_loss, scored_sequences
from fastalign.types import IGNORE_INDEX, LossOutput, Metric

KL = "policy/approxkl_k3"
_NO_LOSS = "a batch of prompts has no loss: a step samples, scores and updates. Call train(), or evaluate() for metrics"


class PassesTrainer(ActorCriticTrainer):
    """`update_on(model, batch)` trains on a phase's batch, up to the last optimizer step, which is Trainer's."""

    args: PPOConfig
    run: PPOState

    def update_on(self, model: nn.Module, batch: Batch, kept: np.ndarray | None = None) -> LossOutput:
        """num_ppo_epochs passes over a phase: the mean loss of its mini-batches, and what is known of them as a whole.

        kept: (S,) bool, the completions to train on, where there is a filter; None: all of them. A phase of which
        nothing is kept, in any process, changes nothing and has no metrics.

        Metrics: val/ratio_var, the variance of the mini-batches' mean ratios (TRL's), and val/first_approxkl, that of
        the first mini-batch, before any update. Those of each mini-batch go to the trainer's meter.
        """
        warmup = self._warms_up
        if self.args.policy_loss == "trpo" and not warmup:
            result = policy_trpo_step(self.actor_critic.policy, split_batch(batch, self.micro_batch_tokens), self.args)
            self._train_meter.update(trpo_metrics(result, self.args.device))
            if not self.actor_critic.has_critic:
                return LossOutput(torch.full((), -result.improvement, device=self.args.device), {})
        members = self._members(len(batch["lengths"]), kept)
        if not members:
            return LossOutput(torch.zeros((), device=self.args.device), {})
        outputs = []
        for index, part in enumerate(members):
            outputs.append(self._mini_batch(model, _selected(batch, part)))
            self._train_meter.update(outputs[-1].metrics)
            if index < len(members) - 1:
                if self.args.max_grad_norm > 0:
                    self._norm = self._clip_grad_norm(model)
                if self.admit(model):
                    self.optimizer.step()
                model.zero_grad()
        last_pass = outputs[-len(members) // self.args.num_ppo_epochs :]
        if self.run.follows_penalty and not warmup:
            kl = merge_metrics(*({KL: output.metrics[KL]} for output in last_pass))[KL]
            self.run.penalty.update(float(self._over_processes([kl])[0].value), len(batch["lengths"]))
        loss = torch.stack([output.loss for output in outputs]).mean()
        return LossOutput(loss, self._summary([output.metrics for output in outputs]))

    @property
    def _warms_up(self) -> bool:
        """The critic is trained alone, the policy stays as it is."""
        return self.state.global_step < self.args.critic_warmup_steps

    def _members(self, count: int, kept: np.ndarray | None = None) -> list[np.ndarray]:
        """The completions of each mini-batch, pass after pass, ascending; drawn from the seed and the step, one by one
        or, with whole_groups, prompt by prompt.

        With a filter there are as many mini-batches as without, of about equal size, unless some process has fewer
        completions (prompts) than that; the number is the same in all of them. A process with none takes part with
        empty ones.
        """
        rng = np.random.default_rng([self.args.seed, self.state.global_step, self.accelerator.process_index])
        units = np.arange(count).reshape(-1, self.args.drawn_together)
        size = self.args.mini_batch_size // self.args.drawn_together
        orders = [rng.permutation(len(units)) for _ in range(self.args.num_ppo_epochs)]
        if kept is None:
            return [np.sort(units[order[i : i + size]].ravel()) for order in orders for i in range(0, len(units), size)]
        left = np.logical_or.reduce(kept[units], axis=1)
        number = self._filtered_mini_batches(math.ceil(len(units) / size), int(left.sum()))
        if number == 0:
            return []
        parts = [units[part].ravel() for order in orders for part in np.array_split(order[left[order]], number)]
        return [np.sort(part[kept[part]]) for part in parts]

    def _filtered_mini_batches(self, unfiltered: int, kept: int) -> int:
        """Of a pass, in every process; each has a completion in some process. 0 where nothing is kept.

        kept: completions of this process, or prompts with any.
        """
        each = torch.zeros(self.accelerator.num_processes, device=self.args.device)
        each[self.accelerator.process_index] = kept
        fewest, most = self._sum_over_processes(each).aminmax()
        return min(unfiltered, max(int(fewest), 1)) if most else 0

    def _mini_batch(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Forward and backward of a mini-batch in pieces of at most `micro_batch_tokens`; in the shared layout
        completions of one prompt are in one piece, unless they have more tokens than that.

        The loss, detached, is this process's share times their number: its mean over processes is that of the whole.
        """
        processes, warmup = self.accelerator.num_processes, self._warms_up
        counts = torch.tensor(
            [len(batch["rows"]), scored_sequences(batch)], dtype=torch.float32, device=self.args.device
        )
        tokens, sequences = self._sum_over_processes(counts)
        policy_coef: float | None = 1.0
        if self.args.policy_loss == "trpo" or (warmup and processes == 1):
            policy_coef = None
        elif warmup:
            policy_coef = 0.0
        losses, metrics = [], []
        if self.token_layout == "shared":
            batch = grouped_by_prompt(batch, self.micro_batch_tokens)
        pieces = self._pieces(batch)
        for index, (piece, taken) in enumerate(pieces):
            with self._taking(taken, model, reduces=index == len(pieces) - 1):
                with self.compute_loss_context_manager():
                    output = policy_value_loss(
                        model, piece, self.args, tokens=tokens, sequences=sequences,
                        penalty_coef=self.run.penalty.coef, policy_coef=policy_coef,
                        with_value=self.actor_critic.has_critic, layout=self._planned(piece, seen=0),
                    )  # fmt: skip
                self.accelerator.backward(output.loss * (processes * taken))
            if not taken:
                continue
            losses.append(output.loss.detach() * processes)
            self.show(piece, losses[-1])
            metrics.append(output.metrics)
        if warmup:
            critic = set(map(id, self.actor_critic.critic_parameters()))
            for parameter in self.actor_critic.parameters():
                if id(parameter) not in critic:
                    parameter.grad = None
        return LossOutput(torch.stack(losses).sum(), merge_metrics(*metrics))

    def _summary(self, mini_batches: list[dict[str, Metric]]) -> dict[str, Metric]:
        if "val/ratio" not in mini_batches[0]:
            return {}
        ratios = torch.stack([ratio.value for ratio in self._over_processes([m["val/ratio"] for m in mini_batches])])
        one = torch.ones((), device=ratios.device)
        variance = ratios.double().var(correction=min(1, len(ratios) - 1)).float()
        return {"val/ratio_var": Metric(variance, one), "val/first_approxkl": mini_batches[0][KL]}

    def _over_processes(self, metrics: list[Metric]) -> list[Metric]:
        sums = self._sum_over_processes(torch.stack([torch.stack([*metric]) for metric in metrics]))
        return [Metric(total, weight) for total, weight in sums]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(_NO_LOSS)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(_NO_LOSS)


def _selected(batch: Batch, part: np.ndarray) -> Batch:
    """Some completions of a phase; in place of none the first one, without a token that counts, so that a process
    without completions of its own has a loss to take part with."""
    if len(part):
        return select_examples(batch, part)
    empty = select_examples(batch, np.zeros(1, dtype=np.int64))
    rows = ("rows", "old_logps", "advantages", "ref_logps", "sampler_logps", "old_values", "returns")
    empty |= {name: empty[name][:0] for name in rows if name in empty}
    return empty | {
        "targets": torch.full_like(empty["targets"], IGNORE_INDEX), "cu_seqlens": np.zeros(2, dtype=np.int32)
    }  # fmt: skip
