"""PPO and its critic-free relatives on `transformers.Trainer`'s arguments, callbacks, logging and checkpoints."""

from __future__ import annotations

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

from fastalign.models.sharding import whole_weights
from fastalign.reference import ReferenceModel
from fastalign.trainers.loading import autocast_dtype, load_tokenizer
from fastalign.trainers.meters import Meter
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
from fastalign.trainers.ppo_passes import PassesTrainer
from fastalign.trainers.ppo_rollout import Collector, PromptBatch, PromptSet
from fastalign.trainers.ppo_state import PPOState
from fastalign.trainers.vocabulary import check_token_ids
from fastalign.types import Metric

_EVALUATION = 2**31  # beside the number of a phase in the seed of a rollout


class PPOTrainer(PassesTrainer):
    """Trains a policy by reinforcement learning on its own completions: PPO (arXiv 1707.06347), RLOO, REINFORCE, GRPO,
    Dr. GRPO, DAPO, GSPO, CISPO (args.loss_type).

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
        reward_processing_class: tokenizer of reward models given in memory, or a list as long as the rewards, with None
            where it is the policy's; default the policy's.
        sampler: a `rollouts.Sampler`; default transformers' generation, or vLLM by args.use_vllm.

    Attributes: collector, which samples and scores; run, the controllers and statistics; data_reports.

    Raises ValueError, naming it, for anything that cannot be honoured; BadRowsError for bad data.
    """

    args: PPOConfig
    columns = ("prompt_ids",)

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
        check_token_ids(
            policy, tokenizer, *(part.dataset for part in (train, *evaluation.values()) if part is not None)
        )
        reference = build_reference(ref_model, args, source, start, quantization_config)
        rewards, reward_models = build_rewards(reward_model, args, tokenizer, reward_processing_class)
        both = build_actor_critic(policy, source, value_model, args, reward_models)
        super().__init__(
            actor_critic=both,
            critic_learning_rate=args.critic_learning_rate,
            args=_trainer_args(args, train),
            data_collator=PromptBatch.collate,
            train_dataset=train,
            eval_dataset=evaluation.get("", evaluation or None),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._train_batch_size = args.prompts_per_phase  # in each process
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
        trains = [model for model in (policy, both.critic) if model is not None]
        only_padded = "policy_loss='trpo', which differentiates twice" if args.policy_loss == "trpo" else ""
        self._set_layout(*trains, only_padded=only_padded)
        self.collector.token_layout = self.token_layout
        self._reference_digest = self._digest()
        self.run = PPOState(args)
        self._phase_tokens = 0
        self._coefficients: dict[str, float] = {}  # of the latest phase
        self._timed = (0, 0.0)  # episodes and seconds since the last log
        self._warn = Warner()
        dtypes = {parameter.dtype for parameter in policy.parameters()} | {autocast_dtype(args)}
        self._narrow = bool(dtypes & {torch.bfloat16, torch.float16})

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
        start = time.perf_counter()
        self._clock = self._clock or start
        self._coefficients = self.run.coefficients()
        self._optimizer_mode("train")
        with whole_weights(self.actor_critic):
            batch, experience = self.collector.collect(
                inputs, self.train_dataset.columns, (self.args.seed, self.state.global_step), kl_coef=self.run.kl.coef,
                moments=self.run.moments,
            )  # fmt: skip
        count = len(batch["lengths"])
        episodes = count * self.accelerator.num_processes  # as many in each
        self._phase_tokens = int(np.sum(batch["lengths"]))
        self._tokens.add(0, 0, 0, seen=self._phase_tokens)
        model.train()
        output = self.update_on(model, batch, experience.kept)
        phase = Meter()
        for metrics in (experience.metrics, output.metrics):
            phase.update(metrics)
            self._train_meter.update(metrics)
        values, _ = phase.values(self._sum_over_processes)
        if self.run.follows_kl and not self._warms_up:
            self.run.kl.update(values["objective/kl"], episodes)
        self.run.episodes += episodes
        cut = experience.metrics["completions/clipped_ratio"]
        processes = torch.full_like(cut.weight, self.accelerator.num_processes)
        self._train_meter.update({"val/num_eos_tokens": Metric(cut.weight - cut.total, 1 / processes)})  # of a phase
        self._timed = (self._timed[0] + episodes, self._timed[1] + time.perf_counter() - start)
        if self.is_world_process_zero():
            found = phase_warnings(
                values, target_kl=self.args.target_kl, narrow=self._narrow, completions=episodes,
                corrected=self.args.sampler_correction is not None,
            )  # fmt: skip
            self._warn(found, self.state.global_step + 1)
        return output.loss

    def _optimizer_mode(self, mode: str) -> None:
        """A schedule-free optimizer has two sets of weights: one to train, one to evaluate."""
        if callable(switch := getattr(self.optimizer, mode, None)):
            switch()

    def floating_point_ops(self, inputs: Any) -> int:
        """Of the updates of the phase that was just done: 6 a parameter and token; sampling is not counted."""
        parameters = sum(parameter.numel() for parameter in self.actor_critic.parameters())
        return 6 * parameters * self._phase_tokens * self.args.num_ppo_epochs

    # ---- evaluation

    def evaluation_data(self, dataset: Any, name: str) -> PromptSet:
        if isinstance(dataset, PromptSet):
            return dataset
        return self.prompts.wrap(self.prompts.examples.prepare(dataset, name))

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        with self._evaluation(), self._clock_stopped(), whole_weights(self.actor_critic):
            return self._sample_and_score(args[0] if args else kwargs["dataloader"], metric_key_prefix)

    def _sample_and_score(self, dataloader: Any, prefix: str) -> EvalLoopOutput:
        self._optimizer_mode("eval")
        self._eval_meter.clear()
        self.callback_handler.eval_dataloader = dataloader
        moments = self.run.moments if self.run.episodes else None  # there are none before the first phase
        count = torch.zeros(1, device=self.args.device)
        for number, prompts in enumerate(dataloader):
            own = self._own_examples(len(prompts))
            # a process without prompts of its own takes part with weight zero, so that all report the same metrics
            batch, experience = self.collector.collect(
                prompts.first(max(own, 1)), dataloader.dataset.columns, (self.args.seed, _EVALUATION, number),
                kl_coef=self.run.kl.coef, moments=moments, learn=False, counts=own > 0,
            )  # fmt: skip
            count += len(batch["lengths"]) * (own > 0)
            self._eval_meter.update(experience.metrics)
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        values, _ = self._eval_meter.values(self._sum_over_processes)
        self._eval_meter.clear()
        number = int(self._sum_over_processes(count))
        if number > 1:
            values["objective/scores_se"] = values["objective/scores_std"] / math.sqrt(number - 1)
        metrics = {f"{prefix}_{name}": value for name, value in values.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=number)

    # ---- logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the latest phase's coefficients, and under TRL's names episodes, `eps` (a second) and `lr`."""
        if "loss" in logs and self._train_meter:
            episodes, seconds = self._timed
            self._timed = (0, 0.0)
            logs |= {"episode": self.run.episodes, "eps": episodes / max(seconds, 1e-9), "lr": logs["learning_rate"]}
            logs |= self._coefficients
        super().log(logs, start_time)

    # ---- saving and resuming

    def run_state(self) -> dict[str, Any]:
        prompts = self._train_batch_size * self.accelerator.num_processes
        own = {"reference": self._reference_digest, "prompts_per_phase": prompts}
        return super().run_state() | self.run.state_dict() | own

    def restore_run_state(self, state: dict[str, Any]) -> None:
        if state["reference"] != self._reference_digest:
            raise ValueError(
                "the checkpoint was trained against another reference than this trainer has: construct it with the "
                "same policy and ref_model as the first run (resume_from_checkpoint loads the trained weights)"
            )
        prompts = self._train_batch_size * self.accelerator.num_processes
        if state["prompts_per_phase"] != prompts:
            raise ValueError(
                f"the checkpoint is of a run with {state['prompts_per_phase']} prompts a phase, over all processes; "
                f"this one has {prompts}, and its position in the data would be another"
            )
        super().restore_run_state(state)
        self.run.load_state_dict(state)


def _trainer_args(args: PPOConfig, train: PromptSet | None) -> PPOConfig:
    """What Trainer's loop sees: a phase is one batch, and gradients are accumulated inside it."""
    steps, args = args.max_steps, copy.copy(args)
    if args.total_episodes is not None and train is not None:
        prompts = args.prompts_per_phase * args.world_size
        wanted = math.ceil(args.total_episodes / args.num_generations)
        passes, rest = divmod(wanted, len(train))
        steps = passes * math.ceil(len(train) / prompts) + math.ceil(rest / prompts)  # an epoch's last phase is smaller
        if args.dataloader_drop_last:
            steps = math.ceil(wanted / prompts)
    args.max_steps = steps
    args.per_device_train_batch_size, args.gradient_accumulation_steps = args.mini_batch_size, 1
    return args
