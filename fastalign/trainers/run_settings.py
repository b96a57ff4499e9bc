"""What plans have to know of a run's models and optimizer, from its config or from the models that a trainer holds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoConfig, PretrainedConfig, Trainer

from fastalign.models import check_source
from fastalign.models.attention import PREFIX
from fastalign.models.head import base_causal_lm
from fastalign.planning import ModelSettings, OptimizerSettings
from fastalign.trainers.config import TrainerConfig
from fastalign.trainers.dpo_config import DPOConfig
from fastalign.trainers.loading import adapter_base, loading_arguments, lora_config, resolve_dtype
from fastalign.trainers.reward import scalar_adapter_config
from fastalign.trainers.reward_config import RewardConfig

Planned = tuple[PretrainedConfig, ModelSettings]
"""A model to plan for: its config, and how it is loaded and trained."""

_NARROW = (torch.bfloat16, torch.float16)


def replace_fields(args: TrainerConfig, **fields: Any) -> Any:
    """A shallow copy of a config with other fields, without its checks."""
    changed = copy.copy(args)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def config_for(config_class: Any, fields: dict[str, Any], device_type: str | None) -> Any:
    """A config of a run on "cpu" or "cuda", whether this machine has that or not; None: as the fields say.

    transformers asks the machine at hand whether it computes in 16 bits; of a GPU that is only planned for it is
    assumed, so that bf16 is the default there.
    """
    if device_type is None:
        return config_class(**fields)
    if device_type == "cpu" or torch.cuda.is_available():
        return config_class(**(fields | {"use_cpu": device_type == "cpu"}))
    asked = {name: fields.get(name) for name in ("bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval")}
    if asked["bf16"] and asked["fp16"]:
        raise ValueError("bf16 and fp16 are both on: leave out one of the two")
    args = config_class(**{name: value for name, value in fields.items() if name not in asked} | {"use_cpu": True})
    args.fp16 = bool(asked["fp16"])
    args.bf16 = not args.fp16 if asked["bf16"] is None else asked["bf16"]
    return args


def checkpoint_dtype(config: PretrainedConfig) -> torch.dtype:
    """What a checkpoint is saved in."""
    given = getattr(config, "dtype", None)
    return getattr(torch, given) if isinstance(given, str) else given or torch.float32


def named_config(args: TrainerConfig, name: str) -> tuple[PretrainedConfig, PeftConfig | None]:
    """The config.json of a model by name or folder, and the adapter that is saved there instead of a model."""
    arguments = loading_arguments(args)
    check_source(name)
    base = adapter_base(name)
    config = AutoConfig.from_pretrained(
        base or name, revision=arguments.get("revision"), trust_remote_code=args.trust_remote_code
    )
    return config, None if base is None else PeftConfig.from_pretrained(name)


def named_model(args: TrainerConfig, name: str) -> Planned:
    """The model that a run trains, by name."""
    config, adapter = named_config(args, name)
    if adapter is None:
        adapter = scalar_adapter_config(args, None) if isinstance(args, RewardConfig) else lora_config(args, None)
    dtype = resolve_dtype(args, loading_arguments(args), adapter is not None)
    settings = replace(
        _settings(args),
        dtype=checkpoint_dtype(config) if dtype == "auto" else getattr(torch, dtype),
        pure_16bit=args.dtype in ("bfloat16", "float16"),
        attn_implementation=args.attn_implementation,
        adapter=adapter,
        freeze_backbone=bool(getattr(args, "freeze_backbone", False)),
    )
    return config, settings


def held_model(args: TrainerConfig, model: nn.Module) -> Planned:
    """The model that a trainer holds, which need not be the one that its config names. Nothing of it is changed."""
    base = base_causal_lm(model)
    config = copy.deepcopy(base.config)
    adapter = model.peft_config[model.active_adapter] if isinstance(model, PeftModel) else None
    trains = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    settings = replace(
        _settings(args),
        dtype=base.get_input_embeddings().weight.dtype,
        pure_16bit=adapter is None and trains <= set(_NARROW),
        attn_implementation=base.config._attn_implementation.removeprefix(PREFIX),
        adapter=adapter,
        frozen=frozenset(frozen) if adapter is None else frozenset(),
    )
    return config, settings


def _settings(args: TrainerConfig) -> ModelSettings:
    """What does not depend on the model."""
    enabled = getattr(args, "activation_checkpointing", None)
    kwargs = getattr(args, "activation_checkpointing_kwargs", None)
    return ModelSettings(
        scalar=isinstance(args, RewardConfig),
        checkpointing=bool(args.gradient_checkpointing if enabled is None else enabled),
        checkpointing_kwargs=args.gradient_checkpointing_kwargs if kwargs is None else kwargs,
        layout=args.token_layout,
        disable_dropout=args.disable_dropout,
    )


def optimizer_settings(args: TrainerConfig, device_type: str) -> OptimizerSettings:
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    if device_type == "cuda" and "foreach" in cls.__init__.__code__.co_varnames and not kwargs.get("fused"):
        kwargs = kwargs | {"foreach": True}  # torch's default there, and it takes more
    return OptimizerSettings(cls=cls, kwargs=kwargs, max_grad_norm=args.max_grad_norm or 0.0)


def reference_bytes(args: TrainerConfig, model: ModelSettings) -> Callable[[int, int], int]:
    """From the numbers of parameters and of trainable ones to the bytes of a reference beside the policy."""
    live = isinstance(args, DPOConfig) and args.needs_reference and not args.precompute_ref_log_probs
    if not live or model.adapter is not None:  # an adapter is switched off to score the reference
        return lambda parameters, trainable: 0
    size = torch.empty((), dtype=model.dtype).element_size()
    return lambda parameters, trainable: parameters * size
