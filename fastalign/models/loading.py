"""Loading and preparing policies: precision of trainable and frozen weights, dropout."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

logger = logging.getLogger(__name__)


def load_causal_lm(name_or_path: str, *, dtype: str | torch.dtype = "float32", **kwargs: Any) -> PreTrainedModel:
    """A causal language model from a folder or the hub.

    dtype: float32 by default. transformers would follow the checkpoint, usually bfloat16, in which AdamW at DPO's
        learning rates rounds most updates to nothing; "auto" asks for that (right for a frozen base or a reference).
    kwargs go to `from_pretrained`.
    """
    return AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, **kwargs)


def upcast_trainable(model: nn.Module) -> int:
    """Turn the trainable 16-bit parameters into float32, in place; returns how many there were. Frozen ones stay."""
    narrow = [p for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    for parameter in narrow:  # a tied parameter is one object, so it is seen and converted once
        parameter.data = parameter.data.float()
    return len(narrow)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0: of nn.Dropout modules and of attributes that attention layers pass on."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if ("dropout" in name or "drop_path" in name or name == "layerdrop") and isinstance(value, float):
                setattr(module, name, 0.0)
