"""FSDP2 in the trainers: parameters, gradients and optimizer state shared out over processes, or a clear refusal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from fastalign.models.sharding import is_partitioned, is_sharded, reshard, set_gradient_sync, sharded_names
from fastalign.trainers.batches import Batch
from fastalign.trainers.config import TrainerConfig
from fastalign.trainers.resharding import (
    PLAIN_OPTIMIZER,
    SHARDED_OPTIMIZER,
    is_of_sharded_run,
    load_named_weights,
    load_optimizer_state,
    parameter_names,
    read_state,
)
from fastalign.trainers.zero import check_deepspeed, check_partitioned, load_whole_models


class ShardingTrainer(Trainer):
    """A Trainer that shards its model where `fsdp` asks for it, on the CPU too, and refuses what it cannot honour.

    accelerate applies FSDP2: one unit for each decoder layer, the rest in the root. Every forward and backward is then
    an exchange that all processes take part in, in the same order: see `_alike`.
    """

    args: TrainerConfig
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    _counts = True  # whether the piece of a batch at hand does, see `_alike`

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's; on the CPU accelerate and Trainer would run DistributedDataParallel without a word."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.is_deepspeed_enabled:
            check_deepspeed(state.deepspeed_plugin, self.args)
            load_whole_models()
        elif self.args.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
            raise ValueError(
                f"deepspeed is asked for, and accelerate made a {state.distributed_type.value} run of it: with "
                "use_cpu=True it leaves DeepSpeed out"
            )
        asked = self.args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")
        if asked and not self.is_fsdp_enabled:
            if state.distributed_type != DistributedType.MULTI_CPU:
                raise ValueError(
                    f"fsdp is asked for, and accelerate made a {state.distributed_type.value} run of it, which shards "
                    "nothing: start one process per device with torchrun or accelerate launch"
                )
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**(self.args.fsdp_plugin_args or {}))
            # as accelerate itself does on GPUs; a new AcceleratorState takes the type from PartialState
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled:
            check_fsdp(state.fsdp_plugin, self.args)
            if (layout := getattr(self.accelerator, "parallelism_config", None)) is not None:
                raise ValueError(f"parallelism_config={layout!r} is not supported: every process holds one shard")
            # bf16 is autocast over float32 weights, as in one process and where the reference was scored; accelerate's
            # policy rounds weights, residual stream, losses and gradients
            state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        reshard(self.model)  # the optimizer is made of parameters as they are
        if resume_from_checkpoint is not None and self.is_fsdp_enabled:
            self._load_before_sharding(resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.is_fsdp_enabled:
            check_sharded(self.model, self.args.device)
        if self.is_deepspeed_enabled:
            check_partitioned(self.model)
            load_whole_models()
        return prepared

    @contextlib.contextmanager
    def _evaluation(self) -> Iterator[None]:
        """Inside, a model is sharded that was not trained yet: accelerate does so together with an optimizer alone."""
        if self.is_deepspeed_enabled and not is_partitioned(self.model):
            raise ValueError("an evaluation before train() is not supported with DeepSpeed ZeRO-3: run with fsdp")
        if self.is_fsdp_enabled and not is_sharded(self.model):
            self.accelerator._models.append(fsdp2_prepare_model(self.accelerator, self.model))
            check_sharded(self.model, self.args.device)
        try:
            yield
        finally:
            reshard(self.model)

    # ---- checkpoints of runs that were spread otherwise, see `resharding`

    def _load_before_sharding(self, checkpoint: str) -> None:
        """The model of a run without FSDP2 is loaded as it was there, while it is whole in every process."""
        if is_of_sharded_run(checkpoint):
            return
        if is_sharded(self.model):
            raise ValueError(
                f"{checkpoint} is of a run without FSDP2, and this model is sharded already: resume with a new trainer"
            )
        self.is_fsdp_enabled = False
        try:
            self._load_from_checkpoint(checkpoint)
        finally:
            self.is_fsdp_enabled = True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if is_of_sharded_run(resume_from_checkpoint) == self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif not self.is_fsdp_enabled:  # else it was loaded before the model was sharded
            load_named_weights(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if self.is_fsdp_enabled and best is not None and not is_of_sharded_run(best):
            raise ValueError(f"the best model, {best}, is of a run without FSDP2: load it from there")
        super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        other = PLAIN_OPTIMIZER if self.is_fsdp_enabled else SHARDED_OPTIMIZER
        if checkpoint is None or self.is_deepspeed_enabled or not (Path(checkpoint) / other).is_file():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        names = parameter_names(self.model, self.optimizer)
        state = load_optimizer_state(checkpoint, names, named=self.is_fsdp_enabled)
        if self.is_fsdp_enabled:
            whole = StateDictOptions(full_state_dict=True)  # in every process, each of which takes its share
            set_optimizer_state_dict(self.model, self.optimizer, state, options=whole)
        else:
            self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(read_state(Path(checkpoint) / SCHEDULER_NAME))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.is_fsdp_enabled and state_dict:  # gathered name by name: tied weights are one tensor again
            names: dict[int, str] = {}
            for name, parameter in self.model.named_parameters(remove_duplicate=False):
                first = names.setdefault(id(parameter), name)
                if first != name and {first, name} <= state_dict.keys():
                    state_dict[name] = state_dict[first]
        super()._save(output_dir, state_dict)

    # ---- the pieces of a batch

    def _alike(self, pieces: list[Batch]) -> list[tuple[Batch, bool]]:
        """The pieces of a batch, and whether each counts.

        With FSDP2 and ZeRO-3 every process has as many, since each forward is an exchange: one with fewer goes over its
        last piece again, which does not count. That takes an exchange of one number, and a host synchronisation.
        """
        number = len(pieces)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            most = torch.tensor(number, device=self.args.device)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            number = int(most)
        return [(pieces[min(i, len(pieces) - 1)], i < len(pieces)) for i in range(number)]

    @contextlib.contextmanager
    def _taking(self, counts: bool, model: nn.Module | None = None, *, reduces: bool = True) -> Iterator[None]:
        """Around a piece's forward, and backward through `model`, after which gradients are reduced over processes, as
        they are once a step, or added up."""
        self._counts = counts
        state = self.accelerator.gradient_state
        ends_step = state.sync_gradients
        with contextlib.ExitStack() as stack:
            if model is not None and self.is_fsdp_enabled:
                set_gradient_sync(model, reduces)
            elif model is not None and self.is_deepspeed_enabled:
                state._set_sync_gradients(reduces)  # its backward makes the optimizer's step too
            elif model is not None and not reduces:
                stack.enter_context(self.accelerator.no_sync(model))
            try:
                yield
            finally:
                self._counts = True
                state._set_sync_gradients(ends_step)

    def _ends_step(self) -> bool:
        """Whether this batch is the last of an optimizer step, or accelerate's sync_each_batch treats each so."""
        state = self.accelerator.gradient_state
        return state.sync_gradients or bool(state.plugin_kwargs.get("sync_each_batch"))


def check_fsdp(plugin: FullyShardedDataParallelPlugin, args: TrainerConfig) -> None:
    """ValueError, naming it, for a setting of FSDP that cannot be honoured."""
    if plugin.fsdp_version != 2:
        raise ValueError(f"FSDP{plugin.fsdp_version} is not supported: set fsdp_version to 2 (FSDP2) in the config")
    state_dict = plugin.state_dict_type.name
    refused = (
        ("cpu_ram_efficient_loading", plugin.cpu_ram_efficient_loading, "a process needs the weights to score with"),
        ("cpu_offload", isinstance(plugin.cpu_offload, CPUOffloadPolicy), "parameters stay on their device"),
        ("state_dict_type", state_dict != "FULL_STATE_DICT" and state_dict, "accepted is FULL_STATE_DICT"),
        ("ignored_modules", plugin.ignored_modules, "every parameter is sharded"),
        ("fp16", args.fp16, "use bf16"),
        ("merge_adapter", getattr(args, "merge_adapter", False), "the adapter is saved, merge it afterwards"),
        ("auto_find_batch_size", args.auto_find_batch_size, "set per_device_train_batch_size"),
    )
    for name, value, reason in refused:
        if value:
            raise ValueError(f"{name}={value!r} is not supported with FSDP2: {reason}")


def check_shardable(model: nn.Module) -> None:
    """ValueError for a model that cannot be sharded here: quantised, or sharded already."""
    for module in model.modules():
        if (method := getattr(module, "quantization_method", None)) is not None:
            raise ValueError(f"a model quantised by {method} is not supported with FSDP2: run DistributedDataParallel")
    if names := sharded_names(model):
        raise ValueError(f"{names[0]} of the model is sharded already: hand in a whole model, and fsdp=True shards it")


def check_sharded(model: nn.Module, device: torch.device) -> None:
    """ValueError unless every parameter is a DTensor on `device`: what ran would be something else than was asked."""
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            raise ValueError(
                f"fsdp is asked for, and {name} is a {type(parameter).__name__} in every process after the model was "
                "prepared: accelerate has not sharded it"
            )
        if parameter.device.type != device.type:
            raise ValueError(f"fsdp has put {name} on {parameter.device}, and this run computes on {device}")
