"""From a run's config to the plan of its steps (fastalign.planning): its model, its data's lengths, its settings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftConfig
from transformers import AutoConfig, PretrainedConfig, Trainer

from fastalign.planning import (
    HeadSettings,
    ModelSettings,
    OptimizerSettings,
    StepPlan,
    auto_micro_batch_tokens,
    count_tokens,
    layout_of,
    memory_budget,
    meta_model,
    parts_of,
    record_step,
    scaled_flops,
)
from fastalign.trainers.batches import Batch, split_batch
from fastalign.trainers.config import DEFAULT_MICRO_BATCH_TOKENS, TrainerConfig
from fastalign.trainers.dpo_config import DPOConfig
from fastalign.trainers.examples import Examples
from fastalign.trainers.loading import (
    adapter_base,
    autocast_dtype,
    loading_arguments,
    lora_config,
    resolve_dtype,
)
from fastalign.trainers.reward import scalar_adapter_config
from fastalign.trainers.reward_config import RewardConfig
from fastalign.trainers.run_data import made_examples, read_examples
from fastalign.trainers.sft_config import SFTConfig
from fastalign.trainers.token_batches import example_tokens

_AS_FULL = 0.95
# Passes of a step that are recorded: the largest, and some more with gradients there; on the CPU several, until
# malloc's holes are as they will be.
_RECORDED = {"cpu": 4, "cuda": 2}


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What plans are made from. `with_settings` changes one thing; `plan` takes a micro batch other than the run's.

    args            the run's config
    config          of its model
    examples        tokenised training examples, and what makes batches of them
    device_type     of the run that is planned, which need not be this machine's
    """

    args: TrainerConfig
    config: PretrainedConfig
    data: Dataset
    examples: Examples
    device_type: str
    model: ModelSettings
    head: HeadSettings
    optimizer: OptimizerSettings
    autocast: torch.dtype | None
    reference_bytes: Callable[[int, int], int]

    @property
    def micro_batch_tokens(self) -> int:
        given = self.args.micro_batch_tokens
        if isinstance(self.args, DPOConfig) and self.args.couples_batch:
            return 0
        return DEFAULT_MICRO_BATCH_TOKENS[self.device_type] if given is None else given

    @property
    def _narrow(self) -> bool:
        """Whether products are in 16 bits."""
        return self.autocast is not None or (
            self.model.dtype != torch.float32 and (self.model.pure_16bit or self.model.adapter is not None)
        )

    @cached_property
    def sizes(self) -> np.ndarray:
        """(n,) computed tokens of each example."""
        return example_tokens(self.data).computed(self.model.layout)

    def heaviest(self, micro_batch_tokens: int) -> np.ndarray:
        """Numbers of the examples of a device batch that holds a pass as full as the data allow, again and again.

        A pass takes whole examples. How many of about one length fill it is found over the data's own lengths; of
        what fills it about as well, the longest examples are taken, because more passes then follow the first with
        gradients in memory. Where nothing is cut, these are the longest examples of all.
        """
        count = self.args.per_device_train_batch_size
        order = np.argsort(-self.sizes, kind="stable")
        if not micro_batch_tokens:
            return np.resize(order[:count], count)
        candidates = [order[:1]]
        for number in range(1, min(count, len(order)) + 1):
            start = int(np.searchsorted(-self.sizes[order], -(micro_batch_tokens // number)))
            candidates.append(order[start : start + number])
        fills = np.array([int(self.sizes[chosen].sum()) for chosen in candidates])
        return np.resize(candidates[int(np.argmax(fills >= _AS_FULL * fills.max()))], count)

    def batch(self, micro_batch_tokens: int) -> Batch:
        """The heaviest device batch."""
        chosen = self.data.select(self.heaviest(micro_batch_tokens))
        batch = self.examples.collator([chosen[i] for i in range(len(chosen))])
        return {name: value for name, value in batch.items() if name != "kl"}

    def plan(self, micro_batch_tokens: int | None = None) -> StepPlan:
        """The plan of an optimizer step over the heaviest batch."""
        limit = self.micro_batch_tokens if micro_batch_tokens is None else micro_batch_tokens
        layout, accumulated = self.model.layout, self.args.gradient_accumulation_steps
        pieces = split_batch(self.batch(limit), limit, layout=layout, multiple_of=self.args.pad_to_multiple_of)
        passes = pieces * accumulated
        recorded = passes[: _RECORDED[self.device_type]]
        record = record_step(
            self.config, recorded, model=self.model, head=self.head, optimizer=self.optimizer, autocast=self.autocast
        )
        tokens = count_tokens(passes, layout)
        beside = {"reference": self.reference_bytes(record.parameters, record.trainable)}
        if self.args.world_size > 1:
            beside["processes"] = record.trainable * 4
        return StepPlan(
            model=self.config.model_type,
            parameters=record.parameters,
            trainable=record.trainable,
            device_type=self.device_type,
            layout=layout,
            checkpointing=self.model.checkpointing,
            micro_batch_tokens=limit,
            parts=parts_of(record, self.device_type, narrow=self._narrow, **beside),
            flops=scaled_flops(record, tokens["computed"]),
            tokens=tokens,
            passes=len(passes),
            pass_tokens=max(count_tokens([piece], layout)["computed"] for piece in pieces),
            head=str(record.plans[0]) if record.plans else "a score of each sequence",
        )

    def auto(self, memory_gb: float | None = None, device_bytes: int | None = None) -> tuple[int, StepPlan]:
        """`micro_batch_tokens` that a memory budget allows, and its plan; see `auto_micro_batch_tokens`."""
        budget = memory_budget(self.device_type, memory_gb, device_bytes)
        largest = int(self.sizes.max()) * self.args.per_device_train_batch_size
        return auto_micro_batch_tokens(self.plan, budget, largest=largest)

    def alternatives(self) -> list[tuple[str, StepPlan]]:
        """Plans with one setting changed that would need less."""
        limit = self.micro_batch_tokens
        found = []
        if not self.model.checkpointing:
            found.append(("gradient_checkpointing", replace(self, model=replace(self.model, checkpointing=True))))
        if self.model.adapter is None and not self.model.scalar:
            adapter = lora_config(replace_fields(self.args, use_peft=True), None)
            frozen = replace(self.model, adapter=adapter, dtype=checkpoint_dtype(self.config))
            found.append(("use_peft", replace(self, model=frozen, reference_bytes=lambda *_: 0)))
        if self.autocast is None:
            found.append(("bf16", replace(self, autocast=torch.bfloat16)))
        plans = [(words, other.plan()) for words, other in found]
        if limit > 1 and self.args.per_device_train_batch_size > 1:
            plans.append((f"micro_batch_tokens {limit // 2}", self.plan(limit // 2)))
        return plans


def replace_fields(args: TrainerConfig, **fields: Any) -> Any:
    """A shallow copy of a config with other fields, without its checks."""
    changed = copy.copy(args)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def checkpoint_dtype(config: PretrainedConfig) -> torch.dtype:
    """What a checkpoint is saved in."""
    given = getattr(config, "dtype", None)
    return getattr(torch, given) if isinstance(given, str) else given or torch.float32


def model_config(args: TrainerConfig, model: str) -> tuple[PretrainedConfig, PeftConfig | None]:
    """The config.json of a model by name or folder, and the adapter that is saved there instead of a model."""
    arguments = loading_arguments(args)
    base = adapter_base(model)
    config = AutoConfig.from_pretrained(
        base or model, revision=arguments.get("revision"), trust_remote_code=args.trust_remote_code
    )
    return config, None if base is None else PeftConfig.from_pretrained(model)


def run_plan(
    args: TrainerConfig,
    *,
    model: str | None = None,
    data: tuple[Dataset, Examples] | None = None,
    tokens: int | None = None,
    device_type: str | None = None,
) -> RunPlan:
    """What plans of a run are made from. Of the model only config.json is read.

    model: name or folder, default args.model_name_or_path. data: tokenised training examples; default: those that the
    config names, or made ones of `tokens` tokens a sequence. device_type: default the one of args.

    Raises ValueError: no model or data, a trainer or a model that cannot be planned, see `meta_model`.
    """
    name = model or args.model_name_or_path
    if name is None:
        raise ValueError("model_name_or_path is missing: the model whose step is planned")
    config, adapter = model_config(args, name)
    if data is None:
        count = args.per_device_train_batch_size
        data = read_examples(args, name) if tokens is None else made_examples(args, tokens, count)
    device_type = device_type or ("cpu" if args.device.type == "cpu" else "cuda")
    model_settings = _model_settings(args, config, adapter)
    if model_settings.layout == "auto":
        padded = args.pad_to_multiple_of is not None
        layout = "padded" if padded else layout_of(meta_model(config, model_settings), "auto")
        model_settings = replace(model_settings, layout=layout)
    couples = isinstance(args, DPOConfig) and args.couples_batch
    return RunPlan(
        args=args, config=config, data=data[0], examples=data[1], device_type=device_type, model=model_settings,
        head=HeadSettings(
            device_type=device_type, streamed=not couples, by_token=isinstance(args, SFTConfig),
            workspace_mb=args.workspace_mb, schedule=args.schedule,
        ),
        optimizer=_optimizer_settings(args, device_type), autocast=autocast_dtype(args),
        reference_bytes=_reference_bytes(args, model_settings),
    )  # fmt: skip


def _model_settings(args: TrainerConfig, config: PretrainedConfig, adapter: PeftConfig | None) -> ModelSettings:
    scalar = isinstance(args, RewardConfig)
    if adapter is None:
        adapter = scalar_adapter_config(args, None) if isinstance(args, RewardConfig) else lora_config(args, None)
    name = resolve_dtype(args, loading_arguments(args), adapter is not None)
    enabled = getattr(args, "activation_checkpointing", None)
    kwargs = getattr(args, "activation_checkpointing_kwargs", None)
    return ModelSettings(
        scalar=scalar,
        dtype=checkpoint_dtype(config) if name == "auto" else getattr(torch, name),
        pure_16bit=args.dtype in ("bfloat16", "float16"),
        attn_implementation=args.attn_implementation,
        checkpointing=bool(args.gradient_checkpointing if enabled is None else enabled),
        checkpointing_kwargs=args.gradient_checkpointing_kwargs if kwargs is None else kwargs,
        layout=args.token_layout,
        adapter=adapter,
        disable_dropout=args.disable_dropout,
        freeze_backbone=bool(getattr(args, "freeze_backbone", False)),
    )


def _optimizer_settings(args: TrainerConfig, device_type: str) -> OptimizerSettings:
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    if device_type == "cuda" and "foreach" in cls.__init__.__code__.co_varnames and not kwargs.get("fused"):
        kwargs = kwargs | {"foreach": True}  # torch's default there, and it takes more
    return OptimizerSettings(cls=cls, kwargs=kwargs, max_grad_norm=args.max_grad_norm or 0.0)


def _reference_bytes(args: TrainerConfig, model: ModelSettings) -> Callable[[int, int], int]:
    """From the numbers of parameters and of trainable ones to the bytes of a reference beside the policy."""
    live = isinstance(args, DPOConfig) and args.needs_reference and not args.precompute_ref_log_probs
    if not live or model.adapter is not None:  # an adapter is switched off to score the reference
        return lambda parameters, trainable: 0
    size = torch.empty((), dtype=model.dtype).element_size()
    return lambda parameters, trainable: parameters * size
