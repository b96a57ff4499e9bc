"""What makes a reference's log-probs what they are, and nothing else: the part of a key that is not the sequence.

An identity is a JSON dict; its SHA-256 is the *reference digest*.

    weights      digest of the base model's tensors (dtypes and shapes included), without any adapter's
    adapter      None, or digest of the reference's own adapter, its scalings and its forward-relevant settings
    config       the forward-relevant configuration, see below
    attention    attention implementation: some ignore what others honour (softcaps, windows), beyond rounding
    autocast     None, or the dtype that autocast computes in
    head         temperature, logit_scale, softcap
    dtype        the weights' dtypes in words (they are in `weights` already)

Configuration fields are *left out* by name, never picked: a new architecture's field that nobody here knows enters the
key. A field too many costs a computation; one too few gives a wrong number. Values of None are dropped, so that a field
which a new version of transformers adds, unused, changes nothing.

The policy, its adapters, the loss and its settings, the device and the batch size are not in the identity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fastalign.models import find_head
from fastalign.models.attention import PREFIX
from fastalign.models.head import base_causal_lm
from fastalign.reference.files import canonical_json, sha256
from fastalign.reference.weights import base_tensors, float_dtypes, tensors_digest

_SCHEME = 1  # part of every digest: raise it when the identity or the hashing changes meaning

# Where a checkpoint came from and how it was stored. The tensors that were loaded are hashed themselves.
_PROVENANCE = {"transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "architectures", "auto_map"}
_STORAGE = {"dtype", "torch_dtype", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
# What a forward returns beside hidden states, or keeps for the next token.
_OUTPUTS = {
    "use_cache",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "torchscript",
}
# Ids that tokenizers, generation and trainers read and set (Trainer copies the tokenizer's into the config).
_SPECIAL_IDS = {"bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"}
# Initialisation and auxiliary losses: neither is in the log-probs of finished weights.
_TRAINING = {"initializer_range", "initializer_factor", "init_std", "router_aux_loss_coef", "aux_loss_coef"}
_TRAINING |= {"gradient_checkpointing", "router_jitter_noise", "router_z_loss_coef"}
# Heads for other tasks.
_TASKS = {"id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"}
_TASKS |= {"summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"}
_LEFT_OUT = _PROVENANCE | _STORAGE | _OUTPUTS | _SPECIAL_IDS | _TRAINING | _TASKS
# Dropout is off when a reference is scored. (`token_dropout` of ESM rescales embeddings in evaluation too, and stays.)
_DROPOUT = ("dropout", "pdrop", "layerdrop", "drop_path")
_NOT_DROPOUT = {"token_dropout"}
# Models that count positions from the padding id: there it matters.
_POSITIONS_FROM_PADDING = {"roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "xmod"}
_POSITIONS_FROM_PADDING |= {"data2vec-text", "kosmos-2", "kosmos-2.5"}

# PEFT: how an adapter was initialised, and where it is (its tensors' names say that).
_ADAPTER_LEFT_OUT = {"task_type", "auto_mapping", "init_lora_weights", "init_weights", "loftq_config", "eva_config"}
_ADAPTER_LEFT_OUT |= {"corda_config", "lora_ga_config", "target_modules", "exclude_modules", "modules_to_save"}
_ADAPTER_LEFT_OUT |= {"layers_to_transform", "layers_pattern", "target_parameters", "ensure_weight_tying", "bias"}


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, FSDP1, DeepSpeed or torch.compile; PEFT's wrapper stays."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def model_identity(model: nn.Module, adapter: str | None) -> dict[str, Any]:
    """The part of an identity that the model gives: weights, adapter, config, attention, dtype, head.

    model: a transformers causal LM or a PeftModel around one, wrapped or not. adapter: None for the base model with
    every adapter off, or the name of the PeftModel's adapter that belongs to the reference. Raises ValueError for an
    unknown adapter, merged adapters and weights that cannot be read. Reads every tensor.
    """
    model = unwrap(model)
    base, head = base_causal_lm(model), find_head(model)
    tensors = base_tensors(base)
    return {
        "weights": tensors_digest(tensors),
        "adapter": None if adapter is None else _adapter_identity(model, adapter),
        "config": forward_config(base.config.to_dict()),
        "attention": base.config.get_text_config(decoder=True)._attn_implementation.removeprefix(PREFIX),
        "dtype": float_dtypes(tensors.values()),
        "head": {"logit_scale": head.logit_scale, "softcap": head.softcap},
    }


def complete_identity(part: Mapping[str, Any], temperature: float, autocast: torch.dtype | None) -> dict[str, Any]:
    """`model_identity` with the settings of the scoring."""
    head = {**part["head"], "temperature": float(temperature)}
    return {**part, "head": head, "autocast": None if autocast is None else str(autocast).removeprefix("torch.")}


def identity_digest(identity: Mapping[str, Any]) -> str:
    """The reference digest: 64 hexadecimal digits."""
    return sha256(canonical_json({**identity, "scheme": _SCHEME}))


def forward_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration dict, nested ones too, without the fields that finished log-probs do not depend on."""
    left_out = _LEFT_OUT
    if config.get("model_type") in _POSITIONS_FROM_PADDING:
        left_out = left_out - {"pad_token_id"}
    return {
        str(name): _plain(value)
        for name, value in config.items()
        if value is not None and name not in left_out and not _is_dropout(str(name))
    }


def _is_dropout(name: str) -> bool:
    return name not in _NOT_DROPOUT and any(word in name for word in _DROPOUT)


def _plain(value: Any) -> Any:
    """A JSON value: one and the same for equal settings."""
    if isinstance(value, Mapping):
        return forward_config(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=repr)
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)  # an unlimited time step, say: JSON has no word for it
    return value if isinstance(value, bool | int | float | str) or value is None else repr(value)


def _adapter_identity(model: nn.Module, adapter: str) -> dict[str, Any]:
    settings = checked_adapter(model, adapter).to_dict()
    tensors = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    scalings = {
        name: float(module.scaling[adapter])
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and adapter in getattr(module, "scaling", {})
    }
    return {
        "weights": tensors_digest(tensors),
        "scalings": sha256(canonical_json(scalings)),
        "config": {name: value for name, value in forward_config(settings).items() if name not in _ADAPTER_LEFT_OUT},
    }


def checked_adapter(model: nn.Module, adapter: str) -> PeftConfig:
    """The adapter's configuration. Raises ValueError unless `model` (unwrapped) can be scored with it."""
    if not isinstance(model, PeftModel):
        raise ValueError(f"adapter={adapter!r} was given, but {type(model).__name__} is not a PeftModel")
    if adapter not in model.peft_config:
        raise ValueError(f"adapter={adapter!r} is not in the model; it has {', '.join(sorted(model.peft_config))}")
    config = model.peft_config[adapter]
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(
            f"adapter {adapter!r} is {config.peft_type.value}, which adds tokens: it cannot be a cached reference"
        )
    return config


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Where two identities differ, in words: 'config.rope_theta 10000.0 → 500000.0'. Digests are only named."""
    found = []
    for name in sorted(set(one) | set(other)):
        a, b, path = one.get(name), other.get(name), f"{prefix}{name}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{path}.")
        elif a != b:
            digest = name in ("weights", "scalings") or any(isinstance(value, Mapping) for value in (a, b))
            found.append(path if digest else f"{path} {a} → {b}")
    return found
