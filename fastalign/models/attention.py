"""Attention over packed batches: sequences that share a row do not see each other.

    enable_segments(model)
    model(input_ids=ids, position_ids=positions, attention_mask=mask, segments=Segments(lengths, width))

transformers' attention interface hands the keyword `segments` down to one registered function, which attends within
each segment, and to the one that it continues, as the implementation does that the model had before: where that is
FlashAttention by its variable-length kernel, on a GPU by the kernel that `fastalign.models.segment_kernels` finds,
elsewhere by a call a segment. Restarting position_ids alone does not separate sequences.

Calls without `segments` go to the former implementation, with the masks it needs, so generation and evaluation are
untouched. The name of ours is not saved with a model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastalign.models.head import base_causal_lm
from fastalign.models.last_layer import LastLayer
from fastalign.models.segment_attention import segment_attention
from fastalign.models.segments import Segments
from fastalign.models.varlen_attention import Implementation, Under

PREFIX = "fastalign_segments_over_"
_HOOKS = "_fastalign_segment_hooks"

_without_mask: ContextVar[bool] = ContextVar("fastalign_segments_without_mask", default=False)
_watch: ContextVar[list[int | None] | None] = ContextVar("fastalign_segments_watch", default=None)


# Registration ---------------------------------------------------------------------------------------------------------


def uses_segments(model: nn.Module) -> bool:
    """Whether `enable_segments` is in force."""
    return hasattr(base_causal_lm(model).base_model, _HOOKS)


def install(base: PreTrainedModel) -> None:
    """Put the function of this module over the model's attention implementation; see `enable_segments`."""
    former = base.config._attn_implementation
    if former not in ("eager", "sdpa") and not former.startswith("flash_attention_"):
        raise ValueError(
            f"attn_implementation={former!r}: packed sequences can be kept apart over 'sdpa', 'eager' and "
            "'flash_attention_2' (or 3)"
        )
    name = PREFIX + former
    AttentionInterface.register(name, _attention_over(former))
    AttentionMaskInterface.register(name, _mask_over(former))
    base.config._attn_implementation = name
    backbone = base.base_model
    entered: list[Token[bool]] = []

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        entered.append(_without_mask.set(kwargs.get("segments") is not None))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if entered:
            _without_mask.reset(entered.pop())

    hooks = [
        backbone.register_forward_pre_hook(before, with_kwargs=True),
        backbone.register_forward_hook(after, always_call=True),
    ]
    setattr(backbone, _HOOKS, (former, hooks))


def skip_unneeded(base: PreTrainedModel) -> LastLayer:
    """Compute the last layer for `Segments.needed` alone from now on, until `uninstall`. ValueError: see LastLayer."""
    last_layer = LastLayer(base.base_model)
    getattr(base.base_model, _HOOKS)[1].append(last_layer)
    return last_layer


def keep_unneeded(base: PreTrainedModel, last_layer: LastLayer) -> None:
    """Undo `skip_unneeded`."""
    getattr(base.base_model, _HOOKS)[1].remove(last_layer)
    last_layer.remove()


def uninstall(base: PreTrainedModel) -> None:
    """Undo `install`."""
    former, hooks = getattr(base.base_model, _HOOKS)
    for hook in hooks:
        hook.remove()
    delattr(base.base_model, _HOOKS)
    base.config._attn_implementation = former


@contextmanager
def watched(seen: list[int | None]) -> Iterator[None]:
    """Inside, each call of the function with segments adds its sliding window to `seen`.

    What the model does is watched, and not a GPU's kernels, which have trials of their own: in training they may be
    others, by autocast's precision, and FlexAttention takes long to compile.
    """
    token = _watch.set(seen)
    try:
        yield
    finally:
        _watch.reset(token)


def _mask_over(former: str) -> Callable[..., Any]:
    def mask(*args: Any, **kwargs: Any) -> Any:
        return None if _without_mask.get() else ALL_MASK_ATTENTION_FUNCTIONS[former](*args, **kwargs)

    return mask


def _attention_over(former: str) -> Callable[..., Any]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        segments: Segments | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        implementation = _implementation(former, module)
        if segments is None:  # FlashAttention's function asks the config which package it is to call
            under = Under(module, former) if former.startswith("flash_attention_") else module
            return implementation(under, query, key, value, attention_mask, **kwargs)
        if (seen := _watch.get()) is not None:
            seen.append(kwargs.get("sliding_window"))
        output = segment_attention(
            module, query, key, value, segments, former, implementation, kernels=seen is None, **kwargs
        )
        return output, None

    return attention


def _implementation(name: str, module: nn.Module) -> Implementation:
    """transformers' attention function of that name; the eager one is each model's own."""
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    found = getattr(inspect.getmodule(type(module)), "eager_attention_forward", None)
    if found is None:
        raise ValueError(f"{type(module).__name__} has no eager attention function; set attn_implementation='sdpa'")
    return found
