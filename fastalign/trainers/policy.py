"""The policy before training: loading, precision, adapters, tokenizer."""

from __future__ import annotations

import logging
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin

from fastalign.models import load_causal_lm, upcast_trainable
from fastalign.models.head import base_causal_lm
from fastalign.reference import ReferenceModel
from fastalign.trainers.dpo_config import DPOConfig
from fastalign.trainers.reference import reference_adapter

logger = logging.getLogger(__name__)


def load_tokenizer(processing_class: Any, name: str | None, args: DPOConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that was given, or the one saved beside the model. ValueError for anything that is no tokenizer."""
    if processing_class is None:
        if not name:
            raise ValueError("processing_class is missing and the model does not say where it was loaded from")
        return AutoTokenizer.from_pretrained(
            name, revision=args.model_revision, trust_remote_code=args.trust_remote_code
        )
    if isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"processing_class is a {type(processing_class).__name__}; vision-language models are not supported"
        )
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise ValueError(f"processing_class must be a transformers tokenizer, got {type(processing_class).__name__}")
    return processing_class


def loading_arguments(args: DPOConfig, quantization_config: Any = None) -> dict[str, Any]:
    """What `from_pretrained` gets beside name and dtype. ValueError if a setting is given twice."""
    given = args.model_init_kwargs or {}
    if not isinstance(given, dict):
        raise ValueError(f"model_init_kwargs={given!r}: a mapping is accepted")
    settings = {
        "revision": args.model_revision,
        "attn_implementation": args.attn_implementation,
        "trust_remote_code": args.trust_remote_code or None,
        "quantization_config": quantization_config,
    }
    own = {name: value for name, value in settings.items() if value is not None}
    if twice := sorted(own.keys() & given.keys()):
        raise ValueError(f"{twice[0]} is set both by itself and in model_init_kwargs; set it once")
    return own | given


def resolve_dtype(args: DPOConfig, arguments: dict[str, Any], with_adapter: bool) -> str:
    """The precision to load in; see DPOConfig.dtype. A dtype in model_init_kwargs counts as given."""
    given = str(arguments.pop("dtype", arguments.pop("torch_dtype", args.dtype))).removeprefix("torch.")
    if given != "auto":
        return given
    return "auto" if with_adapter else "float32"


def named_reference(ref_model: str | nn.Module | None, args: DPOConfig, with_adapter: bool) -> ReferenceModel | None:
    """A reference of its own, None if it is the policy's initial state. By name it is loaded only when needed."""
    autocast = autocast_dtype(args)
    if ref_model is None:
        return None
    if isinstance(ref_model, str):
        arguments = loading_arguments(args)
        dtype = resolve_dtype(args, arguments, with_adapter)
        return ReferenceModel.from_pretrained(
            ref_model, dtype=dtype, device=args.device, autocast=autocast, **arguments
        )
    base_causal_lm(ref_model)
    if next(ref_model.parameters()).device != args.device and getattr(ref_model, "hf_device_map", None) is None:
        ref_model.to(args.device)
    return ReferenceModel.from_model(ref_model, adapter=reference_adapter(ref_model), autocast=autocast)


def load_policy(
    source: str | nn.Module, args: DPOConfig, peft_config: PeftConfig | None, quantization_config: Any
) -> nn.Module:
    """The policy on its device, in the precision it trains in, before any new adapter."""
    model: nn.Module
    if isinstance(source, str):
        arguments = loading_arguments(args, quantization_config)
        dtype = resolve_dtype(args, arguments, peft_config is not None)
        model = load_causal_lm(source, dtype=dtype, **arguments)
    else:
        model = source
        for name, value in (
            ("model_init_kwargs", args.model_init_kwargs),
            ("quantization_config", quantization_config),
        ):
            if value:
                raise ValueError(f"{name} is for a model given by name, and the model is already in memory")
        if isinstance(model, PeftModel) and peft_config is not None:
            raise ValueError(
                "the model is a PeftModel already and peft_config asks for another adapter: merge the first one "
                "(merge_and_unload), or leave peft_config out to train it on"
            )
        base_causal_lm(model)
    quantized = getattr(model, "quantization_method", None) is not None
    if not quantized and getattr(base_causal_lm(model), "hf_device_map", None) is None:
        model.to(args.device)  # before the reference is scored; Trainer would do it later
    if peft_config is None:
        use_full_precision(model, args)
    return model


def use_full_precision(model: nn.Module, args: DPOConfig) -> None:
    """Trainable 16-bit weights become float32, unless `dtype` asks for pure 16-bit training."""
    if args.dtype in ("bfloat16", "float16"):
        logger.warning(
            "dtype=%s: training in pure 16-bit precision; at a learning rate of %g most updates round to nothing. "
            "bf16=True computes in bfloat16 over float32 weights",
            args.dtype, args.learning_rate,
        )  # fmt: skip
    elif count := upcast_trainable(model):
        logger.warning("%d trainable 16-bit tensors were turned into float32; dtype='bfloat16' keeps them", count)


def lora_config(args: DPOConfig, peft_config: PeftConfig | None) -> PeftConfig | None:
    """The adapter to train: the one given, or LoRA from the config's fields. ValueError for settings without effect."""
    if peft_config is not None:
        if args.use_peft:
            raise ValueError("use_peft=True and peft_config are two ways to say one thing; give one of them")
        if not isinstance(peft_config, PeftConfig):
            raise ValueError(f"peft_config must be a peft.PeftConfig, got {type(peft_config).__name__}")
        if peft_config.is_prompt_learning:
            raise ValueError(
                f"peft_config is {peft_config.peft_type.value}: adapters that add tokens are not supported"
            )
        return peft_config
    if not args.use_peft:
        for name, spec in DPOConfig.__dataclass_fields__.items():
            if name.startswith("lora_") and getattr(args, name) != spec.default:
                raise ValueError(f"{name}={getattr(args, name)!r} has no effect without use_peft=True")
        return None
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules,
        modules_to_save=args.lora_modules_to_save,
    )


def add_adapter(model: nn.Module, peft_config: PeftConfig, args: DPOConfig) -> PeftModel:
    """The policy under a new adapter whose weights are float32."""
    model = get_peft_model(model, peft_config)
    if getattr(base_causal_lm(model), "quantization_method", None) is None:
        use_full_precision(model, args)
    return model


def autocast_dtype(args: DPOConfig) -> torch.dtype | None:
    """What Trainer's autocast computes in, or None."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
