"""The linear head of a causal language model: where it is and what is done to its output.

    u = hidden @ weight.T + bias
    logits = softcap · tanh(logit_scale·u / softcap)          (without a softcap: logit_scale·u)

transformers' model classes differ in how they name the two numbers; `find_head` is the one place that knows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from accelerate.utils import is_compiled_module
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


class Head(NamedTuple):
    """weight (V, H) and bias (V,) or None, in the model's dtype; logit_scale and softcap as in the module's formula."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None

    @property
    def options(self) -> dict[str, Any]:
        """The head's settings as the keyword arguments of `linear_logps` and of every `linear_*` loss."""
        return {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}


def base_causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside PEFT's, DistributedDataParallel's and torch.compile's wrappers."""
    if isinstance(model, PreTrainedModel):
        return model
    while (inner := inside(model)) is not None:
        model = inner
    unwrap = getattr(model, "get_base_model", None)
    base = model if unwrap is None else unwrap()
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"expected a transformers causal language model (or a PeftModel around one), got {type(base).__name__}"
        )
    return base


def inside(model: nn.Module) -> nn.Module | None:
    """What DistributedDataParallel or torch.compile wrap; None for anything else."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.module
    return getattr(model, "_orig_mod", None) if is_compiled_module(model) else None


def find_head(model: nn.Module) -> Head:
    """The head of a causal language model (bare or PEFT-wrapped), read afresh: tied or replaced weights are seen.

    LoRA on the head is not in `weight`: `attach_head` adds it, as the fused forward does. Raises ValueError, naming
    the model's and the head's class, for a head that is not one linear layer.
    """
    base = base_causal_lm(model)
    module = _head_module(base)
    linear = _plain_linear(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, base)
    logit_scale, softcap = _logit_settings(base)
    return Head(linear.weight, linear.bias, logit_scale, softcap)


def attach_head(model: nn.Module, hidden: Tensor) -> tuple[Tensor, Head]:
    """`hidden` (..., H) and the head it goes through, adapters on the head included.

    LoRA (W + s·B·A) widens both factors instead of adding up a new weight: hidden' = [hidden, s·A·dropout(hidden)]
    and weight' = [W, B], so that H becomes H + rank. The sum W + s·B·A would lose a small update when it is rounded to
    16 bits. Returns hidden and the head as they are when no adapter acts on it.
    """
    head = find_head(model)
    module = _head_module(base_causal_lm(model))
    if hidden.device != head.weight.device:  # a model spread over devices may end on another one than its head
        hidden = hidden.to(head.weight.device)
    if isinstance(head.weight, DTensor) or (head.weight.numel() == 0 and hasattr(head.weight, "ds_id")):
        raise ValueError(
            f"the head of {type(base_causal_lm(model)).__name__} is sharded where it is used: tensor parallelism is "
            "not supported, and FSDP2 has to shard the model that is called, or its output layer as a whole"
        )
    if not isinstance(module, BaseTunerLayer) or module.disable_adapters or module.merged:
        return hidden, head
    active = [name for name in module.active_adapters if name in getattr(module, "lora_A", ())]
    if not isinstance(module, LoraLayer) or any(name in module.lora_variant for name in active):
        raise ValueError(
            f"the adapter on the language-model head is a {type(module).__module__}.{type(module).__name__} or a LoRA "
            "variant; plain LoRA is supported there: leave the head out of target_modules, or use modules_to_save"
        )
    hidden_parts, weight_parts, bias = [hidden], [head.weight], head.bias
    for name in active:
        lora_a, lora_b, scaling = module.lora_A[name], module.lora_B[name], module.scaling[name]
        hidden_parts.append(lora_a(module.lora_dropout[name](hidden.to(lora_a.weight.dtype))) * scaling)
        weight_parts.append(lora_b.weight)
        if lora_b.bias is not None:
            bias = lora_b.bias * scaling if bias is None else bias + lora_b.bias * scaling
    if len(hidden_parts) == 1:
        return hidden, head
    dtype = torch.promote_types(hidden.dtype, head.weight.dtype)
    widened = torch.cat([part.to(dtype) for part in hidden_parts], dim=-1)
    return widened, head._replace(weight=torch.cat([part.to(dtype) for part in weight_parts], dim=1), bias=bias)


def head_modules(base: PreTrainedModel) -> list[nn.Module]:
    """The output layer as the model has it, what of it acts, and the linear layer inside: one, without an adapter."""
    module = _head_module(base)
    inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return [base.get_output_embeddings(), module, inner]


def _head_module(base: PreTrainedModel) -> nn.Module:
    module = base.get_output_embeddings()
    if module is None:
        raise ValueError(f"{type(base).__name__} has no output embeddings, so there is no language-model head to fuse")
    if isinstance(module, ModulesToSaveWrapper):
        if module.disable_adapters or not module.active_adapters:
            return module.original_module
        return module.modules_to_save[module.active_adapters[0]]
    if isinstance(module, AuxiliaryTrainingWrapper):
        raise ValueError(
            f"the head of {type(base).__name__} is wrapped in {type(module).__name__}, which is not supported"
        )
    return module


def _plain_linear(module: nn.Module, base: PreTrainedModel) -> nn.Linear:
    # a subclass with its own forward (a quantised layer) does not compute hidden @ weight.T
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        raise ValueError(
            f"the head of {type(base).__name__} is a {type(module).__module__}.{type(module).__name__}; "
            "it must be a torch.nn.Linear (keep the head out of quantisation)"
        )
    return module


def _logit_settings(base: PreTrainedModel) -> tuple[float, float | None]:
    """(logit_scale, softcap) from the names under which transformers' configs keep them; None means unused."""
    config = base.config.get_text_config(decoder=True)
    softcap = getattr(config, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere; Muse; Falcon-H1
        if (scale := getattr(config, name, None)) is not None:
            return float(scale), softcap
    scaling = getattr(config, "logits_scaling", None)  # a divisor in Granite, a factor in HyperCLOVA X
    if scaling is None:
        return 1.0, softcap
    return float(scaling if config.model_type == "hyperclovax" else 1.0 / scaling), softcap
