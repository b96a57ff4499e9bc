"""Weights of a checkpoint into a model that is there already.

transformers saves some architectures under other names and shapes than their modules have (experts one by one, a head
under its old name). `from_pretrained` translates them back; `Trainer`, which loads a checkpoint's file into the model
as it is, leaves such weights out with a warning, and a resumed run goes on from weights that were never trained.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def load_renamed_weights(model: nn.Module, folder: str | Path) -> bool:
    """Load a checkpoint by `from_pretrained` where its file names weights otherwise than the model; else do nothing.

    model: a transformers model whose weights `save_pretrained` wrote to the folder, float32 at least there; dtypes and
    devices stay. An adapter's checkpoint is left alone. Returns whether weights were loaded. A second copy of the model
    is on the host meanwhile.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    if saved_names(folder) <= set(model.state_dict()):
        return False
    widest = max((p.dtype for p in model.parameters()), key=lambda dtype: dtype.itemsize)
    dtype = torch.promote_types(widest, torch.float32)  # 16 bits go through it and back unchanged
    fresh = type(model).from_pretrained(str(folder), config=model.config, dtype=dtype)
    model.load_state_dict(fresh.state_dict())
    return True


def saved_names(folder: str | Path) -> set[str]:
    """Names of the weights in a folder that `save_pretrained` wrote; none where it holds no model."""
    folder = Path(folder)
    if (folder / _FILE).is_file():
        with safe_open(folder / _FILE, framework="pt") as file:
            return set(file.keys())
    if (folder / _INDEX).is_file():
        return set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"])
    return set()
