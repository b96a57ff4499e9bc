"""PPO and its critic-free relatives on `transformers.Trainer`'s arguments, callbacks, logging and checkpoints."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from typing import Any

import numpy as np
import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import EvalLoopOutput

from fastalign.models.head import base_causal_lm
from fastalign.reference import ReferenceModel
from fastalign.trainers.actor_critic import ActorCriticTrainer
from fastalign.trainers.batches import Batch, select_examples, split_batch
from fastalign.trainers.config import DEFAULT_MICRO_BATCH_TOKENS, by_device
from fastalign.trainers.loading import autocast_dtype, load_tokenizer
from fastalign.trainers.ppo_checks import Warner, phase_warnings
from fastalign.trainers.ppo_config import PPOConfig
from fastalign.trainers.ppo_models import (
    build_actor_critic,
    build_policy,
    build_reference,
    build_rewards,
    build_sampler,
    policy_source,
    prompt_sets,
)
from fastalign.trainers.ppo_rollout import Collector, PromptBatch, PromptSet
from fastalign.trainers.ppo_state import PPOState
from fastalign.trainers.ppo_trpo import policy_trpo_step, trpo_metrics
from fastalign.trainers.ppo_update import policy_value_loss

_EVALUATION = 2**31  # beside the number of a phase in the seed of a rollout


class PPOTrainer(ActorCriticTrainer):
    """Trains a policy by reinforcement learning on its own completions: PPO (arXiv 1707.06347), GRPO, RLOO, REINFORCE.

    A step is one phase: prompts → completions → scores → KL-shaped token rewards → advantages → num_ppo_epochs passes
    over mini-batches. Policy and critic are one module under one optimizer. The head turns hidden states of completion
    tokens into loss and gradients tile by tile: no logits of a rollout ever exist. Checkpoints fall between phases and
    hold policy, critic, optimizer, scheduler, KL controller, running statistics, data position and random states; the
    seeds of a phase follow from args.seed and its number, so a resumed run is the uninterrupted one.

    Args:
        args: a PPOConfig.
        processing_class: the policy's tokenizer; default the model's own.
        model: folder or hub name, a transformers causal LM, or a PeftModel around one; default args.model_name_or_path.
        ref_model: the reference: folder or hub name, or a model. Default: the policy as it is handed in; with an
            adapter that starts at zero the policy without it, otherwise a frozen copy.
        reward_model: a scalar model, by name or in memory; a function; or a list of them. A function is called by
            keyword with what it takes of prompts, completions, prompt_ids, completion_ids, finished and the data's
            other columns (`reference_answer` among them), and returns one value per completion, None where it has none.
            Default: args.reward_model_path and args.reward_funcs.
        train_dataset, eval_dataset: what `fastalign.data.prepare_prompts` takes, or a Dataset with prompt_ids.
            Default: args.dataset_name and its splits.
        value_model: the critic, for advantage_estimator="gae"; see PPOConfig.value_model_path.
        callbacks, optimizers, quantization_config, peft_config: as in DPOTrainer.
        reward_processing_class: tokenizer of a reward model given in memory, or a list; default the policy's.
        sampler: a `rollouts.Sampler`; default transformers' generation, or vLLM by args.use_vllm.

    Attributes: collector, which samples and scores; run, the controllers and statistics; data_reports.

    Raises ValueError, naming it, for anything that cannot be honoured; BadRowsError for bad data.
    """

    args: PPOConfig
    columns = ("prompt_ids", "columns")

    def __init__(
        self,
        args: PPOConfig | None = None,
        processing_class: Any = None,
        model: str | nn.Module | None = None,
        ref_model: str | nn.Module | None = None,
        reward_model: Any = None,
        train_dataset: Any = None,
        value_model: str | nn.Module | None = None,
        eval_dataset: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        reward_processing_class: Any = None,
        sampler: Any = None,
    ) -> None:
        if not isinstance(args, PPOConfig):
            raise ValueError(f"args must be a PPOConfig, got {type(args).__name__}")
        source = policy_source(model, args)
        tokenizer = load_tokenizer(processing_class, source, args)
        self.prompts = prompt_sets(tokenizer, args)
        self.data_reports = self.prompts.examples.reports
        train, evaluation = self.prompts.training(train_dataset), self.prompts.evaluation(eval_dataset)
        if train is None and not evaluation:
            raise ValueError("no data: give train_dataset, or args.dataset_name")
        set_seed(args.seed)  # a new adapter and a new head are initialised at random
        policy, start = build_policy(source, args, quantization_config, peft_config)
        reference = build_reference(ref_model, args, start, quantization_config)
        rewards, reward_models = build_rewards(reward_model, args, tokenizer, reward_processing_class)
        both = build_actor_critic(policy, source, value_model, args, reward_models, tokenizer)
        use_cache = base_causal_lm(policy).config.use_cache
        self._mini_batch_size, phase = args.mini_batch_size, args.rollout_batch_size
        super().__init__(
            actor_critic=both,
            critic_learning_rate=args.critic_learning_rate,
            args=_trainer_args(args),
            data_collator=PromptBatch.collate,
            train_dataset=train,
            eval_dataset=evaluation.get("", evaluation or None),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            micro_batch_tokens=by_device(args.micro_batch_tokens, DEFAULT_MICRO_BATCH_TOKENS, args),
        )
        base_causal_lm(policy).config.use_cache = use_cache
        self._train_batch_size = phase // args.num_generations  # prompts of a phase, in each process
        self.collector = Collector(
            args=self.args,
            model=both,
            sampler=build_sampler(sampler, both, tokenizer, args),
            rewards=rewards,
            reference=reference,
            collate=self.prompts.examples.collator,
            to_device=self._prepare_inputs,
            autocast=autocast_dtype(args),
            reduce=self._sum_over_processes,
            process_index=self.accelerator.process_index,
        )
        self._reference_digest = self._digest()
        self.run = PPOState(args)
        self._phase_tokens = 0
        self._warn = Warner()

    def _digest(self) -> str | None:
        """Of the reference, so that a run is not resumed against another one."""
        if self.collector.reference is None:
            return None
        model, adapter = self.collector.reference
        return ReferenceModel.from_model(model, adapter=adapter).digest()

    # ---- one phase

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        return None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Sample, score and update: everything but the optimizer step of the last mini-batch, which is Trainer's."""
        if self._clock is None:
            self._clock = time.perf_counter()
        step = self.state.global_step
        self.collector.sampler.sync(self.actor_critic.policy)
        batch, experience = self.collector.collect(
            inputs, (self.args.seed, step), kl_coef=self.run.kl.coef, moments=self.run.moments
        )
        self._train_meter.update(experience.metrics)
        self._phase_tokens = int(np.sum(batch["lengths"]))
        self._tokens += self._phase_tokens
        model.train()
        if callable(schedule_free := getattr(self.optimizer, "train", None)):
            schedule_free()
        loss = self._update(model, batch)
        episodes = len(batch["lengths"]) * self.accelerator.num_processes
        self.run.episodes += episodes
        if self.run.follows_kl:
            # processes sample equally many completions, so the mean of means is the mean
            kl = float(self._sum_over_processes(experience.kl)) / self.accelerator.num_processes
            self.run.kl.update(kl, episodes)
        return loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Of the updates of the phase that was just done: 6 a parameter and token; sampling is not counted."""
        parameters = sum(parameter.numel() for parameter in self.actor_critic.parameters())
        return 6 * parameters * self._phase_tokens * self.args.num_ppo_epochs

    def _update(self, model: nn.Module, batch: Batch) -> Tensor:
        """num_ppo_epochs passes over the phase's mini-batches; returns the mean loss."""
        count, size = len(batch["lengths"]), self._mini_batch_size
        if self.args.policy_loss == "trpo" and not self._critic_only:
            pieces = split_batch(batch, self.micro_batch_tokens)
            result = policy_trpo_step(self.actor_critic.policy, pieces, self.args)
            self._train_meter.update(trpo_metrics(result, self.args.device))
            if not self.actor_critic.has_critic:
                return torch.full((), -result.improvement, device=self.args.device)
        rng = np.random.default_rng([self.args.seed, self.state.global_step, self.accelerator.process_index])
        orders = [rng.permutation(count) for _ in range(self.args.num_ppo_epochs)]
        members = [np.sort(order[i : i + size]) for order in orders for i in range(0, count, size)]
        last_pass = len(members) - len(members) // self.args.num_ppo_epochs
        total, moved = torch.zeros((), device=self.args.device), torch.zeros(2, device=self.args.device)
        for index, part in enumerate(members):
            loss, kl = self._mini_batch(model, select_examples(batch, part), first=index == 0)
            total += loss / len(members)
            moved += kl if index >= last_pass else 0
            if index < len(members) - 1:
                if self.args.max_grad_norm > 0:
                    self._clip_grad_norm(model)
                self.optimizer.step()
                model.zero_grad()
        if self.run.follows_penalty:
            kl_sum, tokens = self._sum_over_processes(moved).tolist()
            self.run.penalty.update(kl_sum / max(tokens, 1.0), count)
        return total

    @property
    def _critic_only(self) -> bool:
        """During the warm-up the policy stays as it is."""
        return self.state.global_step < self.args.critic_warmup_steps

    def _mini_batch(self, model: nn.Module, batch: Batch, *, first: bool) -> tuple[Tensor, Tensor]:
        """Forward and backward of a mini-batch in pieces of at most `micro_batch_tokens`.

        Returns its loss and (sum over tokens of KL(π_old‖π), tokens) of this process, detached.
        """
        device, processes = self.args.device, self.accelerator.num_processes
        counts = torch.tensor([len(batch["rows"]), len(batch["lengths"])], dtype=torch.float32, device=device)
        tokens, sequences = self._sum_over_processes(counts)
        total, moved = torch.zeros((), device=device), torch.zeros(2, device=device)
        pieces = split_batch(batch, self.micro_batch_tokens, multiple_of=self.args.pad_to_multiple_of)
        for index, piece in enumerate(pieces):
            last = index == len(pieces) - 1  # gradients are reduced over processes once, with the last piece
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    output = policy_value_loss(
                        model, piece, self.args, tokens=tokens, sequences=sequences,
                        penalty_coef=self.run.penalty.coef,
                        # under several processes every parameter takes part in a backward
                        with_policy=self.args.policy_loss != "trpo" and (not self._critic_only or processes > 1),
                        with_value=self.actor_critic.has_critic,
                    )  # fmt: skip
                self.accelerator.backward(output.loss * processes)
            self._train_meter.update(output.metrics)
            if (ratio := output.metrics.get("val/ratio")) is not None and first:
                self._train_meter.update({"val/first_ratio": ratio})
            if (kl := output.metrics.get("policy/approxkl_k3")) is not None:
                moved += torch.stack([kl.total, kl.weight])
            total += output.loss.detach()
        if self._critic_only:
            critic = set(map(id, self.actor_critic.critic_parameters()))
            for parameter in self.actor_critic.parameters():
                if id(parameter) not in critic:
                    parameter.grad = None
        return total, moved

    # ---- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Scores, KL and lengths of completions sampled from the policy for the evaluation prompts."""
        own = (
            isinstance(eval_dataset, str) and isinstance(self.eval_dataset, dict) and eval_dataset in self.eval_dataset
        )
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self._wrapped(part) for name, part in eval_dataset.items()}
        elif eval_dataset is not None and not own:
            eval_dataset = self._wrapped(eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _wrapped(self, dataset: Any) -> PromptSet:
        if isinstance(dataset, PromptSet):
            return dataset
        return self.prompts.wrap(self.prompts.examples.prepare(dataset, "evaluate"))

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        dataloader = kwargs.get("dataloader", args[0] if args else None)
        self._eval_meter.clear()
        count = 0
        for number, prompts in enumerate(dataloader or ()):
            batch, experience = self.collector.collect(
                prompts, (self.args.seed, _EVALUATION, number), kl_coef=self.run.kl.coef, moments=None
            )
            count += len(batch["lengths"])
            self._eval_meter.update(experience.metrics)
        values, _ = self._eval_meter.values(self._sum_over_processes)
        self._eval_meter.clear()
        self._clock = None  # time spent here is not training time
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=count)

    # ---- logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._train_meter:
            logs |= self.run.logs()
        super().log(logs, start_time)
        if "loss" in logs:
            completions = self._train_batch_size * self.args.num_generations * self.accelerator.num_processes
            found = phase_warnings(
                logs, target_kl=self.args.target_kl, narrow=autocast_dtype(self.args) is not None,
                completions=completions,
            )  # fmt: skip
            self._warn(found, self.state.global_step)

    # ---- saving and resuming

    def run_state(self) -> dict[str, Any]:
        return super().run_state() | self.run.state_dict() | {"reference": self._reference_digest}

    def restore_run_state(self, state: dict[str, Any]) -> None:
        if state["reference"] != self._reference_digest:
            raise ValueError(
                "the checkpoint was trained against another reference than this trainer has: construct it with the "
                "same policy and ref_model as the first run (resume_from_checkpoint loads the trained weights)"
            )
        super().restore_run_state(state)
        self.run.load_state_dict(state)


def _trainer_args(args: PPOConfig) -> PPOConfig:
    """What Trainer's loop sees: a phase is one batch, and gradients are accumulated inside it."""
    args = copy.copy(args)
    if args.total_episodes is not None:
        args.max_steps = math.ceil(args.total_episodes / (args.rollout_batch_size * args.world_size))
    args.gradient_accumulation_steps = 1
    return args
