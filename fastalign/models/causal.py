"""Causal language models whose forward hands hidden states to a function instead of building logits.

    fuse_head(model)
    score = lambda hidden, head: linear_logps(hidden, head.weight, targets, **head.options)
    logps = model(input_ids=ids, attention_mask=mask, head_fn=score).logps

`head_fn` runs inside the (wrapped) model's own forward: under DDP, FSDP or PEFT the wrapper's hooks see it, autocast
applies to it, and parameters are where the wrapper put them. Without `head_fn` the forward is the original one, so
generation is untouched.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastalign.models.head import Head, attach_head, base_causal_lm, find_head, head_modules
from fastalign.models.inference import evaluating
from fastalign.models.quantised import allow_packing, check_unpacked, prevent_packing, unpacked
from fastalign.models.sharding import call_within

__all__ = ["Head", "attach_head", "find_head", "fuse_head", "has_router_loss", "run_head", "unfuse_head"]

Model = TypeVar("Model", bound=nn.Module)
HeadFn = Callable[[Tensor, Head], Any]

_ORIGINAL = "_fastalign_original_forward"
_MARK = "_fastalign_fused_forward"
_PACKABLE = "_fastalign_packable_layers"
_PROBE_LOGIT = 100.0  # the probe is amplified until some logit reaches this, so that an unknown softcap shows


def fuse_head(model: Model, *, verify: bool = True) -> Model:
    """Give a transformers causal LM the forward argument `head_fn`; in place, idempotent.

    The model may be inside PEFT's, DistributedDataParallel's or torch.compile's wrapper.

    `model(..., head_fn=fn)` runs the backbone and returns `fn(hidden, head)`: hidden (B, T, H), the backbone's last
    hidden states; head a `Head`. With `output_router_logits=True` (Mixture-of-Experts models, see `has_router_loss`)
    it returns `(fn(hidden, head), aux_loss)`, aux_loss the model's own load-balancing loss (0-dim, not yet weighted).

    verify: compare hidden states through `Head` with the model's own logits on a few tokens (two small forwards in
        evaluation mode, no random numbers drawn).

    Raises ValueError, naming the model's class: the head is not one linear layer, its numbers differ from the model's
    own logits (an operation between backbone and logits that is unknown here), these are not finite, or the weights are
    on the meta device.
    """
    base = base_causal_lm(model)
    if is_fused(base):
        return model
    if base.config.is_encoder_decoder or base.base_model is base:
        raise ValueError(f"{type(base).__name__} is not a causal language model with a separate backbone")
    if verify:
        verify_head(model)
    if layers := prevent_packing(base):
        setattr(base, _PACKABLE, layers)
    wrapped = base.__dict__.get("forward")  # another library's instance-level forward, kept and restored
    setattr(base, _ORIGINAL, wrapped if wrapped is not None else MethodType(type(base).forward, base))
    base.forward = MethodType(_fused_forward(type(base)), base)
    return model


def unfuse_head(model: Model) -> Model:
    """Undo `fuse_head`, in place; a model that is not fused is left alone.

    Where another library has wrapped the forward since, as accelerate does for mixed precision, what `fuse_head` put
    inside that stays and passes everything on: taking it out would take out the wrapper.
    """
    base = base_causal_lm(model)
    if not is_fused(base):
        return model
    if not hasattr(getattr(base.__dict__.get("forward"), "__func__", None), _MARK):
        return model
    original = getattr(base, _ORIGINAL)
    if getattr(original, "__func__", None) is type(base).forward:
        del base.forward
    else:
        base.forward = original
    delattr(base, _ORIGINAL)
    allow_packing(base.__dict__.pop(_PACKABLE, []))
    return model


def is_fused(model: nn.Module) -> bool:
    return _ORIGINAL in base_causal_lm(model).__dict__


def original_forward(base: PreTrainedModel) -> Any:
    """The forward as it is without `fuse_head`."""
    return base.__dict__.get(_ORIGINAL, base.forward)


def has_router_loss(model: nn.Module) -> bool:
    """Whether the model is a Mixture of Experts with a load-balancing loss that transformers can compute for it."""
    base = base_causal_lm(model)
    return (
        hasattr(base.config.get_text_config(decoder=True), "output_router_logits") and _router_loss_fn(base) is not None
    )


def verify_head(model: nn.Module) -> None:
    """Raise ValueError unless the head reproduces the model's own logits on a few tokens, plain and amplified."""
    base = base_causal_lm(model)
    name = type(base).__name__
    weight = find_head(model).weight
    if weight.is_meta:
        raise ValueError(f"the head of {name} is on the meta device: load the weights before fusing")
    input_ids = torch.arange(8, device=base.get_input_embeddings().weight.device).view(2, 4) % weight.shape[0]
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False), unpacked(base), evaluating(base):
        factor = 1.0
        for _ in range(2):
            hidden, own = _own_logits(base, input_ids, factor)
            hidden, head = attach_head(model, hidden)
            ours = _reference_logits(hidden, head)
            if not own.isfinite().all():
                if factor != 1.0:  # amplified beyond what float16 holds
                    break
                raise ValueError(
                    f"{name} has logits that are nan or infinite on a few tokens: its weights are no numbers to train"
                )
            # 16-bit models round their logits, TF32 products their inputs; a missing operation differs by far more
            tolerance = (2e-3 if own.dtype == torch.float32 else 3e-2) * own.float().abs().max() + 1e-6
            if own.shape != ours.shape or not torch.allclose(own.float(), ours, rtol=0.0, atol=float(tolerance)):
                raise ValueError(
                    f"the logits of {name} are not those of its hidden states and head (logit_scale="
                    f"{head.logit_scale}, softcap={head.softcap}): something more happens between backbone and logits, "
                    "so the head cannot be fused"
                )
            raw = hidden.float() @ head.weight.float().T * head.logit_scale
            factor = _PROBE_LOGIT / max(float(raw.abs().max()), 1e-6)


def _fused_forward(cls: type[PreTrainedModel]) -> Callable[..., Any]:
    @functools.wraps(cls.forward)  # `generate` and Trainer look at the signature
    def forward(self: PreTrainedModel, *args: Any, head_fn: HeadFn | None = None, **kwargs: Any) -> Any:
        if head_fn is None:
            return getattr(self, _ORIGINAL)(*args, **kwargs)
        return run_head(self, head_fn, args, kwargs)

    setattr(forward, _MARK, True)
    return forward


def run_head(base: PreTrainedModel, head_fn: HeadFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward of a fused model: the backbone on `args` and `kwargs`, then `head_fn(hidden, head)`; see `fuse_head`.

    base: the causal language model itself, without wrappers. Raises ValueError for arguments that need logits.
    """
    for name in ("labels", "logits_to_keep"):
        if (value := kwargs.pop(name, None)) is not None and not (isinstance(value, int) and value == 0):
            raise ValueError(
                f"{name} cannot be combined with head_fn: the function gets every hidden state and no logits exist"
            )
    if torch.is_grad_enabled() and getattr(base, "quantization_method", None) is not None:
        check_unpacked(base)
    kwargs.pop("return_dict", None)
    with_router = bool(kwargs.pop("output_router_logits", False))
    if with_router:
        if not has_router_loss(base):
            raise ValueError(
                f"{type(base).__name__} has no load-balancing loss, so output_router_logits cannot be honoured"
            )
        kwargs["output_router_logits"] = True
    kwargs["use_cache"] = False
    outputs = base.base_model(*args, **kwargs)
    result = call_within(
        head_modules(base), lambda hidden: head_fn(*attach_head(base, hidden)), outputs.last_hidden_state
    )
    if not with_router:
        return result
    return result, _router_loss(base, outputs.router_logits, kwargs.get("attention_mask"))


def _router_loss_fn(base: PreTrainedModel) -> Callable[..., Tensor] | None:
    return getattr(inspect.getmodule(type(base)), "load_balancing_loss_func", None)


def _router_loss(base: PreTrainedModel, router_logits: tuple[Tensor, ...], attention_mask: Tensor | None) -> Tensor:
    """The load-balancing loss as the model's own forward computes it, from the same function of its own module."""
    loss_fn = _router_loss_fn(base)
    assert loss_fn is not None
    config = base.config.get_text_config(decoder=True)
    num_experts = getattr(base, "num_experts", None) or config.num_experts
    top_k = getattr(base, "num_experts_per_tok", None) or config.num_experts_per_tok
    return loss_fn(router_logits, num_experts, top_k, attention_mask)


def _own_logits(base: PreTrainedModel, input_ids: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """The backbone's output multiplied by `factor` (B, T, H), and the logits (B, T, V) the model makes of it."""
    seen: list[Tensor] = []

    def amplify(module: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * factor
        seen.append(output.last_hidden_state)
        return output

    handle = base.base_model.register_forward_hook(amplify)
    try:
        logits = base(input_ids=input_ids, use_cache=False).logits
    finally:
        handle.remove()
    return seen[-1], logits


def _reference_logits(hidden: Tensor, head: Head) -> Tensor:
    u = hidden.float() @ head.weight.float().T
    if head.bias is not None:
        u = u + head.bias.float()
    z = u * head.logit_scale
    return z if head.softcap is None else torch.tanh(z / head.softcap) * head.softcap
