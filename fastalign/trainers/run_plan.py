"""From a run's config, or from a trainer, to the plans of its steps (fastalign.planning)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from fastalign.planning import HeadSettings, ModelSettings, layout_of, meta_model
from fastalign.trainers.base import FusedTrainer
from fastalign.trainers.config import TrainerConfig
from fastalign.trainers.dpo_config import DPOConfig
from fastalign.trainers.examples import Examples
from fastalign.trainers.loading import autocast_dtype
from fastalign.trainers.phase_plan import PhasePlan
from fastalign.trainers.ppo import PPOTrainer
from fastalign.trainers.ppo_config import PPOConfig
from fastalign.trainers.reward_functions import RewardModel
from fastalign.trainers.run_data import made_examples, read_examples
from fastalign.trainers.run_settings import (
    Planned,
    checkpoint_dtype,
    held_model,
    named_config,
    named_model,
    optimizer_settings,
    reference_bytes,
)
from fastalign.trainers.sft_config import SFTConfig
from fastalign.trainers.step_plan import RunPlan


def run_plan(
    args: TrainerConfig,
    *,
    data: tuple[Dataset, Examples] | None = None,
    tokens: int | None = None,
    device_type: str | None = None,
) -> RunPlan:
    """What plans of a run are made from. Of the models that it names only config.json is read.

    data: tokenised training examples, and what makes batches of them; default: those that the config names, or made
        ones of `tokens` tokens a sequence. device_type: default the one of args.

    Raises ValueError: no model or data, a trainer or a model that cannot be planned, see `meta_model`.
    """
    name = args.model_name_or_path
    if name is None:
        raise ValueError("model_name_or_path is missing: the model whose step is planned")
    model = named_model(args, name)
    if data is None:
        data = read_examples(args, name) if tokens is None else made_examples(args, tokens)
    beside = _named_beside(args, model) if isinstance(args, PPOConfig) else {}
    return _made(args, model, data, device_type, beside)


def trainer_plan(trainer: FusedTrainer) -> RunPlan:
    """The same of a trainer: of the models that it holds, its training data and its token layout.

    Raises ValueError: see `run_plan`; a trainer without training data.
    """
    args: Any = trainer.args
    if trainer.train_dataset is None:
        raise ValueError("there is no train_dataset to plan for")
    if isinstance(trainer, PPOTrainer):
        both, data = trainer.actor_critic, (trainer.train_dataset.dataset, trainer.prompts.examples)
        model, beside = held_model(args, both.policy), _held_beside(trainer)
    else:
        model, data, beside = held_model(args, trainer.model), (trainer.train_dataset, trainer._examples), {}
    model = (model[0], replace(model[1], layout=trainer.token_layout))
    return _made(args, model, data, None, beside)


def _made(
    args: TrainerConfig, model: Planned, data: tuple[Dataset, Examples], device_type: str | None, beside: dict[str, Any]
) -> RunPlan:
    """Of a run whose model and data are known. beside: what a `PhasePlan` has beyond a `RunPlan`."""
    config, settings = model
    device_type = device_type or ("cpu" if args.device.type == "cpu" else "cuda")
    if settings.layout == "auto":
        padded = args.pad_to_multiple_of is not None
        settings = replace(settings, layout="padded" if padded else layout_of(meta_model(config, settings), "auto"))
    streamed, by_token = True, isinstance(args, SFTConfig)
    if isinstance(args, DPOConfig):
        streamed = not args.couples_batch
    elif isinstance(args, PPOConfig):
        _refuse_unplannable(args)
        by_token = args.importance_sampling_level == "token"
    kind: Any = PhasePlan if isinstance(args, PPOConfig) else RunPlan
    made: RunPlan = kind(
        args=args, config=config, data=data[0], examples=data[1], device_type=device_type, model=settings,
        head=HeadSettings(
            device_type=device_type, streamed=streamed, by_token=by_token, workspace_mb=args.workspace_mb,
            schedule=args.schedule,
        ),
        optimizer=optimizer_settings(args, device_type), autocast=autocast_dtype(args),
        reference_bytes=reference_bytes(args, settings), **beside,
    )  # fmt: skip
    return made


def _refuse_unplannable(args: PPOConfig) -> None:
    for name, value, reason in (
        ("policy_loss", "trpo", "its steps differentiate twice"),
        ("use_vllm", True, "the engine takes a share of the GPU for itself"),
    ):
        if getattr(args, name) == value:
            raise ValueError(f"{name}={value!r} cannot be planned: {reason}; measure a run instead")


# What is in memory beside a policy ------------------------------------------------------------------------------------


def _named_beside(args: PPOConfig, policy: Planned) -> dict[str, Any]:
    """The models of a PPO run by the names in its config."""
    rewards = [_frozen(args, name, scalar=True) for name in args.reward_model_path or []]
    critic = None
    if args.advantage_estimator == "gae" and not args.value_head:
        shared = [config for config, _ in rewards if config.vocab_size == policy[0].vocab_size]
        given = args.value_model_path
        config = named_config(args, given)[0] if given is not None else (shared or [policy[0]])[0]
        critic = (config, replace(policy[1], scalar=True, dtype=torch.float32, pure_16bit=False, adapter=None))
    reference = None
    if args.needs_reference and args.ref_model_name_or_path is not None:
        reference = _frozen(args, args.ref_model_name_or_path)
    elif args.needs_reference and not args.use_peft:
        reference = policy
    return {"critic": critic, "reference": reference, "with_reference": args.needs_reference, "rewards": rewards}


def _frozen(args: PPOConfig, name: str, *, scalar: bool = False) -> Planned:
    config, _ = named_config(args, name)
    given = ModelSettings(scalar=scalar, dtype=checkpoint_dtype(config), pure_16bit=True)
    return config, replace(given, attn_implementation=args.attn_implementation)


def _held_beside(trainer: PPOTrainer) -> dict[str, Any]:
    """The models that a PPOTrainer holds beside its policy."""
    args, both, collector = trainer.args, trainer.actor_critic, trainer.collector
    reference = None
    if collector.reference is not None and collector.reference[0] is not both.policy:
        reference = held_model(args, collector.reference[0])
    models = [reward.model for reward in collector.rewards.sources.values() if isinstance(reward, RewardModel)]
    return {
        "critic": None if both.critic is None else _held_scalar(args, both.critic), "reference": reference,
        "with_reference": collector.reference is not None, "rewards": [_held_scalar(args, model) for model in models],
    }  # fmt: skip


def _held_scalar(args: PPOConfig, model: nn.Module) -> Planned:
    config, settings = held_model(args, model)
    return config, replace(settings, scalar=True)
