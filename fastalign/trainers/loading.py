"""A model before training: loading, precision, adapters, tokenizer."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from fastalign.models import check_source, has_router_loss, load_causal_lm, upcast_trainable
from fastalign.models.head import base_causal_lm
from fastalign.reference import ReferenceModel
from fastalign.trainers.config import TrainerConfig
from fastalign.trainers.dpo_config import DPOConfig
from fastalign.trainers.reference import reference_adapter

logger = logging.getLogger(__name__)

Config = TypeVar("Config", bound=TrainerConfig)


def checked_arguments(
    model: str | nn.Module | None, ref_model: str | nn.Module | None, args: DPOConfig | None, compute_metrics: Any
) -> tuple[str | nn.Module, DPOConfig]:
    """The model and config of a DPOTrainer, defaults filled in; ValueError for what cannot be."""
    source, args = checked_model(model, args, DPOConfig, compute_metrics)
    if ref_model is source and isinstance(source, nn.Module):
        raise ValueError("ref_model is the model that trains; leave ref_model out for the policy as it is now")
    if ref_model is not None and args.ref_model_name_or_path is not None:
        raise ValueError("ref_model and args.ref_model_name_or_path name two references; give one of them")
    if args.ref_model_name_or_path is not None:
        check_source(args.ref_model_name_or_path, "ref_model_name_or_path")
    return source, args


def checked_model(
    model: str | nn.Module | None, args: Config | None, config_class: type[Config], compute_metrics: Any
) -> tuple[str | nn.Module, Config]:
    """The model and config of a trainer; without a config the default one, with a folder named after the model.

    ValueError: compute_metrics, no model, no model where its name says, or a model or config of another type.
    """
    if compute_metrics is not None:
        raise ValueError("compute_metrics is not supported: no logits exist to compute metrics from")
    setting = "model"
    if model is None:
        setting, model = "model_name_or_path", args.model_name_or_path if args is not None else None
        if model is None:
            raise ValueError("no model: give model, or args.model_name_or_path")
    if isinstance(model, str):
        check_source(model, setting)
    if not isinstance(model, str | nn.Module):
        raise ValueError(f"model must be a name or a model, got {type(model).__name__}")
    if args is None:
        name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
        method = config_class.__name__.removesuffix("Config")
        args = config_class(output_dir=f"{name.rstrip('/').rsplit('/', 1)[-1] or 'policy'}-{method}")
    if not isinstance(args, config_class):
        raise ValueError(f"args must be a {config_class.__name__}, got {type(args).__name__}")
    return model, args


def refuse_logits(**functions: Any) -> None:
    """ValueError for a function that was given and would need logits."""
    for name, function in functions.items():
        if function is not None:
            raise ValueError(f"{name} is not supported: no logits exist to hand to it")


def load_tokenizer(processing_class: Any, model: str | nn.Module, args: TrainerConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that was given, or the one saved beside the model (beside its base model, for a bare adapter).

    Raises ValueError for anything that is no tokenizer.
    """
    if processing_class is None:
        name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", None)
        if not name:
            raise ValueError("processing_class is missing and the model does not say where it was loaded from")
        check_source(name)
        if not (Path(name) / "tokenizer_config.json").is_file() and (base := adapter_base(name)):
            name = base
        revision = loading_arguments(args).get("revision")
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
    if isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"processing_class is a {type(processing_class).__name__}; vision-language models are not supported"
        )
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise ValueError(f"processing_class must be a transformers tokenizer, got {type(processing_class).__name__}")
    return processing_class


def loading_arguments(args: TrainerConfig, quantization_config: Any = None) -> dict[str, Any]:
    """What `from_pretrained` gets beside name and dtype. ValueError if a setting is given twice, differently."""
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
    for name in sorted(own.keys() & given.keys()):
        if own[name] != given[name]:  # scripts written for TRL give some of them twice
            raise ValueError(f"{name} is {own[name]!r} by itself and {given[name]!r} in model_init_kwargs; set it once")
    return own | given


def resolve_dtype(args: TrainerConfig, arguments: dict[str, Any], with_adapter: bool) -> str:
    """The precision to load in; see TrainerConfig.dtype. A dtype in model_init_kwargs counts as given."""
    given = str(arguments.pop("dtype", arguments.pop("torch_dtype", args.dtype))).removeprefix("torch.")
    if given != "auto":
        return given
    return "auto" if with_adapter else "float32"


def separate_reference(
    ref_model: str | nn.Module, args: TrainerConfig, with_adapter: bool, quantization_config: Any
) -> ReferenceModel:
    """A reference that is not the policy's initial state. One given by name is loaded only when it is needed."""
    autocast = autocast_dtype(args)
    if isinstance(ref_model, str):
        arguments = loading_arguments(args, quantization_config)
        dtype = resolve_dtype(args, arguments, with_adapter)
        return ReferenceModel.from_pretrained(
            ref_model, dtype=dtype, device=args.device, autocast=autocast, **arguments
        )
    base_causal_lm(ref_model)
    return ReferenceModel.from_model(ref_model, adapter=reference_adapter(ref_model), autocast=autocast)


@contextmanager
def borrowed(model: str | nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, a model that was handed in is on `device`; afterwards where it came from."""
    if isinstance(model, str) or not is_movable(model):
        yield
        return
    home = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


def is_movable(model: nn.Module) -> bool:
    """Not so a quantised model, or one spread over devices: it stays where it was loaded."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return getattr(base, "quantization_method", None) is None and getattr(base, "hf_device_map", None) is None


def load_model(
    source: str | nn.Module,
    args: TrainerConfig,
    peft_config: PeftConfig | None,
    quantization_config: Any,
    *,
    load: Callable[..., PreTrainedModel] = load_causal_lm,
) -> nn.Module:
    """A model on its device, in the precision it trains in, before any new adapter. `load(name, dtype=)` makes it."""
    model: nn.Module
    if isinstance(source, str):
        model = _load(source, args, peft_config, quantization_config, load)
    else:
        model = source
        for name, value in (
            ("model_init_kwargs", args.model_init_kwargs),
            ("quantization_config", quantization_config),
        ):
            if value:
                raise ValueError(f"{name} is for a model given by name, and the model is already in memory")
        own = getattr(base_causal_lm(model).config, "_attn_implementation", None)
        if args.attn_implementation not in (None, own):
            raise ValueError(
                f"attn_implementation={args.attn_implementation!r}, and the model in memory has {own!r}: load it with "
                "that, or leave it out"
            )
    if isinstance(model, PeftModel) and peft_config is not None:
        raise ValueError(
            "the model is a PeftModel already and peft_config asks for another adapter: merge the first one "
            "(merge_and_unload), or leave peft_config out to train it on"
        )
    if is_movable(model):
        model.to(args.device)  # before the reference is scored; Trainer would do it later
    if peft_config is None:
        use_full_precision(model, args)
    return model


def _load(
    name: str,
    args: TrainerConfig,
    peft_config: PeftConfig | None,
    quantization_config: Any,
    load: Callable[..., PreTrainedModel],
) -> PreTrainedModel | PeftModel:
    """A model by name; a folder with an adapter stands for its base model with that adapter, which is trained on."""
    arguments = loading_arguments(args, quantization_config)
    base = adapter_base(name)
    dtype = resolve_dtype(args, arguments, base is not None or peft_config is not None)
    model = load(base or name, dtype=dtype, **arguments)
    return model if base is None else PeftModel.from_pretrained(model, name, is_trainable=True)


def adapter_base(name: str) -> str | None:
    """The base model of a folder that holds an adapter; None for any other name."""
    file = Path(name) / "adapter_config.json"
    if not file.is_file():
        return None
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{file} names no base_model_name_or_path: load the two and give the PeftModel as model")
    return base


def use_full_precision(model: nn.Module, args: TrainerConfig) -> None:
    """Trainable 16-bit weights become float32, unless `dtype` asks for pure 16-bit training of a whole model."""
    if args.dtype in ("bfloat16", "float16") and not isinstance(model, PeftModel):
        logger.warning(
            "dtype=%s: training in pure 16-bit precision; at a learning rate of %g most updates round to nothing. "
            "bf16=True computes in bfloat16 over float32 weights",
            args.dtype, args.learning_rate,
        )  # fmt: skip
    elif count := upcast_trainable(model):
        logger.warning("%d trainable 16-bit tensors were turned into float32; dtype='bfloat16' keeps them", count)


def lora_config(
    args: TrainerConfig, peft_config: PeftConfig | None, *, task_type: TaskType = TaskType.CAUSAL_LM
) -> PeftConfig | None:
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
        for name, spec in type(args).__dataclass_fields__.items():
            if name.startswith("lora_") and getattr(args, name) != spec.default:
                raise ValueError(f"{name}={getattr(args, name)!r} has no effect without use_peft=True")
        return None
    return LoraConfig(
        task_type=task_type,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules,
        modules_to_save=args.lora_modules_to_save,
    )


def add_adapter(model: nn.Module, peft_config: PeftConfig, args: TrainerConfig) -> PeftModel:
    """The policy under a new adapter whose weights are float32."""
    model = get_peft_model(model, peft_config)
    use_full_precision(model, args)
    return model


def prepare_checkpointing(model: nn.Module, args: TrainerConfig) -> None:
    """Reentrant checkpointing passes gradients only through inputs that require them; a frozen embedding's do not."""
    if (
        isinstance(model, PeftModel)
        and args.gradient_checkpointing
        and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    ):
        model.enable_input_require_grads()


def check_trainable(model: nn.Module) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "no parameter of the model is trainable; a PeftModel is loaded for training with is_trainable=True"
        )


def autocast_dtype(args: TrainerConfig) -> torch.dtype | None:
    """What Trainer's autocast computes in, or None."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def router_coefficient(policy: nn.Module, args: TrainerConfig) -> float:
    """The weight of the load-balancing loss: the config's, or the model's own; 0 for a model without one."""
    given, base = args.router_aux_loss_coef, base_causal_lm(policy)
    if not has_router_loss(policy):
        if given:
            raise ValueError(f"router_aux_loss_coef={given}: {type(base).__name__} has no load-balancing loss")
        return 0.0
    own = getattr(base.config.get_text_config(decoder=True), "router_aux_loss_coef", 0.0)
    return float(own if given is None else given)
