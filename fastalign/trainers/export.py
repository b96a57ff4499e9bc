"""Saving an adapter merged into its base: no second copy of the model, and the one in training stays as it is."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn


@torch.no_grad()
def save_merged(model: nn.Module, folder: str | Path) -> None:
    """Save base and active adapter as one model that plain transformers loads.

    Base weights that the adapter touches are merged one layer at a time, copied to the host and put back bit for bit.
    Raises ValueError for a model without an adapter, and for wrappers whose weights are not simply base plus update.
    """
    if not isinstance(model, PeftModel):
        raise ValueError("merge_adapter=True, but the model has no adapter")
    base = model.get_base_model()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)}
    wrappers = {name: module for name, module in base.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}
    for name, wrapper in wrappers.items():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            raise ValueError(f"{name} is wrapped in {type(wrapper).__name__}, which cannot be merged into the base")
    touched = [*layers.values(), *wrappers.values()]
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if base.config.tie_word_embeddings and any(module is end for module in touched for end in ends):
        raise ValueError(
            "the adapter changes one of two tied matrices (embeddings and head), and the merged model could not keep "
            "them tied: untie them first (tie_word_embeddings=False), or save the adapter alone (merge_adapter=False)"
        )
    own = base.state_dict()
    state: dict[str, Tensor] = {}
    for name, tensor in own.items():
        if not _inside(name, layers) and not _inside(name, wrappers):
            state[name] = tensor
    for name, layer in layers.items():
        state |= {f"{name}.{part}": tensor for part, tensor in _merged(layer).items()}
    for name, wrapper in wrappers.items():
        trained = wrapper.modules_to_save[wrapper.active_adapters[0]]
        state |= {f"{name}.{part}": tensor for part, tensor in trained.state_dict().items()}
    base.save_pretrained(folder, state_dict=state)


def _inside(name: str, modules: dict[str, torch.nn.Module]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:end]) in modules for end in range(1, len(parts)))


def _merged(layer: BaseTunerLayer) -> dict[str, Tensor]:
    """The base layer's weights with the adapter merged in, on the host; the layer is left as it was."""
    linear = layer.get_base_layer()
    kept = {name: parameter.detach().clone() for name, parameter in linear.named_parameters()}
    layer.merge(safe_merge=True)  # raises on values that are not finite
    try:
        return {name: parameter.detach().cpu().clone() for name, parameter in linear.named_parameters()}
    finally:
        for name, parameter in linear.named_parameters():
            parameter.data.copy_(kept[name])
        layer.merged_adapters.clear()
