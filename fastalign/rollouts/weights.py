"""A policy's weights as another engine wants them: whole, under the names of its checkpoint, adapters merged in."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from fastalign.models.head import base_causal_lm
from fastalign.models.inference import refuse_token_adapters

_CHECKPOINTED = "_checkpoint_wrapped_module."


@torch.no_grad()
def checkpoint_weights(model: nn.Module) -> dict[str, Tensor]:
    """name → tensor, as `save_pretrained` of the merged model would write them; tied weights once.

    model: a transformers causal LM or a PeftModel around one. Active LoRA is added to copies, W + s·B·A, in the wider
    of the two dtypes: the policy's own weights are neither touched nor rounded, as merging and unmerging would.
    FSDP2's sharded tensors are gathered, a collective: every process must call this. Everything else is no copy.

    Raises ValueError, naming the parameter or layer: parameters that are sharded otherwise (FSDP1, ZeRO-3) or
    quantised, adapters that are not plain LoRA on linear layers and embeddings.
    """
    refuse_token_adapters(model)
    base = base_causal_lm(model)
    _refuse_untied(base)
    found: dict[str, Tensor] = {}
    seen: set[nn.Parameter] = set()
    for name, tensor in _tensors(base, ""):
        if isinstance(tensor, nn.Parameter):
            if tensor in seen:
                continue
            seen.add(tensor)
        found[name.replace(_CHECKPOINTED, "")] = _whole(name, tensor)
    return dict(revert_weight_conversion(base, found))


def _refuse_untied(base: PreTrainedModel) -> None:
    if not base.config.get_text_config(decoder=True).tie_word_embeddings:
        return
    for module in (base.get_input_embeddings(), base.get_output_embeddings()):
        adapted = isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not module.disable_adapters
        if adapted and module.active_adapters:
            raise ValueError(
                f"{type(base).__name__} ties its head to its embeddings, and an adapter is on one of them: an engine "
                "that ties them too cannot have both; leave them out of target_modules and modules_to_save"
            )


def _tensors(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(module, ModulesToSaveWrapper):
        off = module.disable_adapters or not module.active_adapters
        module = module.original_module if off else module.modules_to_save[module.active_adapters[0]]
    elif isinstance(module, AuxiliaryTrainingWrapper):
        raise ValueError(f"{prefix[:-1]} is wrapped in {type(module).__name__}, whose weights cannot be merged")
    if isinstance(module, BaseTunerLayer):
        yield from _merged(module, prefix)
        return
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter
    for name, child in module._modules.items():
        if child is not None:
            yield from _tensors(child, f"{prefix}{name}.")


def _merged(layer: BaseTunerLayer, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The base layer's parameters, the weight with the active adapters added."""
    base = layer.get_base_layer()
    active = [] if layer.disable_adapters or layer.merged else _active_lora(layer, prefix)
    for name, parameter in base.named_parameters(recurse=False):
        added: list[Tensor] = []
        if name == "weight":
            added = [layer.get_delta_weight(adapter) for adapter in active]
        elif name == "bias":
            biases = [
                (layer.lora_B[adapter].bias, layer.scaling[adapter]) for adapter in active if layer.lora_bias[adapter]
            ]
            added = [bias * scaling for bias, scaling in biases]
        yield prefix + name, _sum(_whole(prefix + name, parameter), added) if added else parameter


def _active_lora(layer: BaseTunerLayer, prefix: str) -> list[str]:
    names = [name for names in layer.adapter_layer_names for name in getattr(layer, names)]
    active = [name for name in layer.active_adapters if name in names]
    if not active:
        return []
    plain = type(layer) in (lora.Linear, lora.Embedding) and not any(name in layer.lora_variant for name in active)
    if not plain:
        raise ValueError(
            f"the adapter on {prefix[:-1]} is a {type(layer).__module__}.{type(layer).__name__} or a LoRA variant: "
            "only plain LoRA on linear layers and embeddings can be merged into copies of the weights"
        )
    return active


def _sum(weight: Tensor, added: list[Tensor]) -> Tensor:
    return sum((part.to(weight.device) for part in added), start=weight)


def _whole(name: str, tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    if hasattr(tensor, "ds_id") or type(tensor).__name__ == "FlatParameter":
        raise ValueError(
            f"parameter {name} is sharded by DeepSpeed ZeRO-3 or FSDP1: gather the model's parameters first"
        )
    if not tensor.is_floating_point() or type(tensor).__name__ in ("Params4bit", "Int8Params"):
        raise ValueError(
            f"parameter {name} is quantised ({tensor.dtype}): only floating-point weights can be handed over"
        )
    return tensor.detach()
