"""DeepSpeed ZeRO-3 in the trainers: what it can be used for, and a clear refusal of the rest."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

_INSTEAD = "run with fsdp (FSDP2)"


def load_whole_models() -> None:
    """Let `from_pretrained` load whole models again: with ZeRO-3 on, transformers would partition each as it loads it,
    and no process could score its share of a reference, nor compare a head with its model's logits."""
    unset_hf_deepspeed_config()


def check_deepspeed(plugin: Any, args: TrainingArguments) -> None:
    """ValueError, naming it, for what cannot be honoured: another stage than 3, offloading, and everything for which
    processes would forward different numbers of batches."""
    zero = plugin.deepspeed_config.get("zero_optimization", {})
    if plugin.zero_stage != 3:
        raise ValueError(f"DeepSpeed's ZeRO stage {plugin.zero_stage} is not supported: set it to 3, or {_INSTEAD}")
    if not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise ValueError(
            "stage3_gather_16bit_weights_on_model_save is off, and a run would end without a model: set it to true in "
            "the DeepSpeed config"
        )
    for name in ("offload_param", "offload_optimizer"):
        if (zero.get(name) or {}).get("device", "none") != "none":
            raise ValueError(f"DeepSpeed's {name} is not supported: leave it out")
    loss_types = getattr(args, "loss_types", ())
    refused = (
        ("fp16", args.fp16),
        ("merge_adapter", getattr(args, "merge_adapter", False)),
        ("auto_find_batch_size", args.auto_find_batch_size),
        ("load_best_model_at_end", args.load_best_model_at_end),
        ("async_save", getattr(args, "async_save", False)),
        ("normalize_rewards", getattr(args, "normalize_rewards", "none") != "none"),
        ("sync_ref_model", getattr(args, "sync_ref_model", False)),
        ("loss_type='kto'", "kto" in loss_types),
        ("PPO", hasattr(args, "response_length")),
    )
    for name, asked in refused:
        if asked:
            raise ValueError(f"{name} is not supported with DeepSpeed ZeRO-3: leave it out, or {_INSTEAD}")


def check_partitioned(model: nn.Module) -> None:
    """ValueError unless ZeRO-3 manages every parameter: what ran would be something else than was asked."""
    for name, parameter in model.named_parameters():
        if not hasattr(parameter, "ds_id"):
            raise ValueError(f"deepspeed is asked for, and {name} is whole in every process after it was prepared")
