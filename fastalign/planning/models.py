"""Models without weights: built from a config on the meta device, then filled with tensors that have no memory."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    masking_utils,
)

from fastalign.models import attention, disable_dropout, fuse_head, upcast_trainable
from fastalign.models.head import base_causal_lm
from fastalign.models.packing import check_packable

_MIXTURE = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How a run loads the model that it trains.

    scalar                  one score for each row (a reward model) instead of a language-model head
    dtype                   of the weights as they are loaded; trainable 16-bit ones become float32 unless pure_16bit
    attn_implementation     transformers' name, None for its default
    checkpointing           recompute activations in the backward; checkpointing_kwargs go to torch's function
    layout                  "padded", "packed" or "shared" (fastalign.models.layouts); see `layout_of` for "auto"
    adapter                 the PEFT adapter that trains, the base being frozen
    frozen                  names of parameters that do not train, of a model without an adapter
    """

    scalar: bool = False
    dtype: torch.dtype = torch.float32
    pure_16bit: bool = False
    attn_implementation: str | None = None
    checkpointing: bool = True
    checkpointing_kwargs: dict[str, Any] | None = None
    layout: str = "padded"
    adapter: PeftConfig | None = None
    disable_dropout: bool = True
    freeze_backbone: bool = False
    frozen: frozenset[str] = frozenset()


def meta_model(config: PretrainedConfig, settings: ModelSettings) -> nn.Module:
    """The model of a run, on the meta device, with its adapter, in the precision that each parameter trains in.

    Raises ValueError: a quantised model, a mixture of experts, an encoder-decoder.
    """
    refuse_unplannable(config)
    config = copy.deepcopy(config)  # models write to it
    auto = AutoModelForSequenceClassification if settings.scalar else AutoModelForCausalLM
    if settings.scalar:
        config.num_labels = 1
    attention_name = settings.attn_implementation
    if attention_name is not None and attention_name.startswith("flash_attention"):
        attention_name = "sdpa"  # which keeps as much for the backward, and needs no package and no GPU
    given = {} if attention_name is None else {"attn_implementation": attention_name}
    with torch.device("meta"):
        model: nn.Module = auto.from_config(config, dtype=settings.dtype, **given)
        if settings.disable_dropout:
            disable_dropout(model)
        if settings.adapter is not None:
            model = get_peft_model(model, _without_numbers(settings.adapter))
    if settings.freeze_backbone:
        base_causal_lm(model).base_model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name in settings.frozen:
            parameter.requires_grad_(False)
    if settings.adapter is not None or not settings.pure_16bit:
        upcast_trainable(model)
    return model


def _without_numbers(adapter: PeftConfig) -> PeftConfig:
    """The adapter as it starts without a look at the weights: some are initialised from them, in the same shapes."""
    adapter = copy.deepcopy(adapter)  # PEFT writes to it
    if hasattr(adapter, "init_lora_weights"):
        adapter.init_lora_weights = True
    return adapter


def refuse_unplannable(config: PretrainedConfig) -> None:
    """ValueError for a model whose memory does not follow from its shapes."""
    text = config.get_text_config(decoder=True)
    for name in _MIXTURE:
        if (getattr(text, name, None) or 0) > 1:
            raise ValueError(
                f"{config.model_type} is a mixture of {getattr(text, name)} experts: which tokens an expert gets, and "
                "so its memory, depends on the data; measure it with `fastalign bench step`"
            )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{config.model_type} is quantised: its kernels' memory is unknown here; measure it")
    if config.is_encoder_decoder:
        raise ValueError(f"{config.model_type} is an encoder-decoder, not a causal language model")


def materialise(model: nn.Module) -> None:
    """Replace a meta model's parameters and buffers by fake CPU tensors; call it under a FakeTensorMode. Ties stay."""
    made: dict[int, Tensor] = {}

    def made_of(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        return made[id(tensor)]

    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    own[name] = made_of(tensor)  # type: ignore[assignment]


def prepare(model: nn.Module, settings: ModelSettings) -> nn.Module:
    """As a trainer prepares it for its steps: checkpointing, fused head, packed attention. No number is computed.

    The proofs that a fused head and packed attention are exact need numbers; the trainer makes them.
    """
    base = base_causal_lm(model)
    if settings.checkpointing:
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable(dict(settings.checkpointing_kwargs or {}) or None)
        if settings.adapter is not None and (settings.checkpointing_kwargs or {}).get("use_reentrant"):
            base.enable_input_require_grads()
    if settings.scalar:
        base.forward = MethodType(_backbone_only, base)
    else:
        fuse_head(model, verify=False)
    if settings.layout != "padded":
        attention.install(base)
        with contextlib.suppress(ValueError):  # the last layer is computed for every token then
            attention.skip_unneeded(base)
    model.train()
    return model


def _backbone_only(self: PreTrainedModel, *, head_fn: Callable[[Tensor, Any], Any], **inputs: Any) -> Any:
    """The forward of a fused scalar model looks at the numbers of the rows that it scores; this one has `head_fn`."""
    return head_fn(self.base_model(use_cache=False, **inputs)[0], None)


@contextlib.contextmanager
def nothing_packed() -> Iterator[None]:
    """Inside, transformers takes positions for those of whole sequences, as they are in a padded batch.

    It would read them to find out; where they have no numbers it plans for the worst, a mask, which the run never has.
    """
    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda *args, **kwargs: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


def layout_of(model: nn.Module, layout: str) -> str:
    """What the layout "auto" comes to for a model, as far as its class tells: "shared" or "padded"."""
    if layout != "auto":
        return layout
    try:
        check_packable(base_causal_lm(model))
    except ValueError:
        return "padded"
    return "shared"
