"""Loading and preparing policies: precision of trainable and frozen weights, dropout."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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

    Raises ValueError: no such folder, or one without a model; a checkpoint that lacks weights of the model, a backbone
    without its head for one, which transformers would fill with random numbers (not with output_loading_info, which
    tells the caller).
    """
    check_source(name_or_path)
    told = kwargs.pop("output_loading_info", False)
    with short_refusal(name_or_path):
        model, info = AutoModelForCausalLM.from_pretrained(
            name_or_path, dtype=dtype, output_loading_info=True, **kwargs
        )
    if told:
        return model, info
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{name_or_path} has no values for {len(missing)} tensors of {type(model).__name__}, the first is "
            f"{missing[0]}: they would be random"
        )
    return model


@contextmanager
def short_refusal(name: str | os.PathLike[str]) -> Iterator[None]:
    """transformers names all hundreds of classes that a model is none of; here it is said in a line."""
    try:
        yield
    except ValueError as error:
        said, listed, _ = str(error).partition("Model type should be one of")
        if not listed:
            raise
        raise ValueError(f"{os.fspath(name)} is no model of this kind: {' '.join(said.split())}") from error


def check_source(name: str | os.PathLike[str], setting: str = "model") -> None:
    """Raise ValueError for a path where no model is: transformers would take it for a name on the hub and ask there.

    setting: what the name was given as. A name without a folder that can be one on the hub, "owner/name", passes.
    """
    path, text = Path(name), os.fspath(name)
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise ValueError(f"{setting}={text!r}: the folder has no config.json, so there is no model in it")
    elif path.exists():
        raise ValueError(f"{setting}={text!r} is a file; accepted are a folder and a name on the hub")
    elif not text.strip() or path.is_absolute() or text.startswith((".", "~")) or len(path.parts) > 2:
        raise ValueError(f"{setting}={text!r}: there is no such folder")


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
