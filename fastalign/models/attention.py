"""Attention over packed batches: sequences that share a row do not see each other.

    enable_segments(model)
    model(input_ids=ids, position_ids=positions, attention_mask=mask, segments=Segments(lengths, width))

transformers' attention interface hands the keyword `segments` down to one registered function, which attends within
each segment by the implementation that the model had before: FlashAttention's variable-length kernel where the model
uses FlashAttention; torch's own (`torch.nn.attention.varlen`) on a GPU in 16 bits; elsewhere one causal call a segment.
No mask as large as the square of a row is ever made. Restarting position_ids alone does not separate sequences.

Calls without `segments` go to the former implementation, with the masks it needs, so generation and evaluation are
untouched. The name of ours is not saved with a model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastalign.models.head import base_causal_lm
from fastalign.models.segments import Segments

PREFIX = "fastalign_segments_over_"
_HOOKS = "_fastalign_segment_hooks"
_MASKED_SOFTMAX_EXTRAS = ("softcap", "s_aux", "position_bias")  # of the softmax, which torch's kernel knows nothing of

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

    hooks = (
        backbone.register_forward_pre_hook(before, with_kwargs=True),
        backbone.register_forward_hook(after, always_call=True),
    )
    setattr(backbone, _HOOKS, (former, hooks))


def uninstall(base: PreTrainedModel) -> None:
    """Undo `install`."""
    former, hooks = getattr(base.base_model, _HOOKS)
    for hook in hooks:
        hook.remove()
    delattr(base.base_model, _HOOKS)
    base.config._attn_implementation = former


@contextmanager
def watched(seen: list[int | None]) -> Iterator[None]:
    """Inside, each call of the function with segments adds its sliding window to `seen`."""
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
        if segments is None:
            return implementation(module, query, key, value, attention_mask, **kwargs)
        return segment_attention(module, query, key, value, segments, former, implementation, **kwargs), None

    return attention


def _implementation(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """transformers' attention function of that name; the eager one is each model's own."""
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    found = getattr(inspect.getmodule(type(module)), "eager_attention_forward", None)
    if found is None:
        raise ValueError(f"{type(module).__name__} has no eager attention function; set attn_implementation='sdpa'")
    return found


# The function ---------------------------------------------------------------------------------------------------------


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    former: str,
    implementation: Callable[..., tuple[Tensor, Tensor | None]],
    *,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Causal attention within each segment, as `implementation` computes it; (B, T, heads, D), 0 in the padding.

    query (B, heads, T, D), key and value (B, key heads, T, D) as transformers' attention functions take them.

    Raises ValueError: attention that is not causal, keys of another length (a cache), or segments of another batch.
    """
    if not kwargs.get("is_causal", getattr(module, "is_causal", True)):
        raise ValueError(f"{type(module).__name__} does not attend causally, so a packed batch cannot go through it")
    batch, _, width, _ = query.shape
    if key.shape[2] != width or segments.shape != (batch, width):
        raise ValueError(
            f"segments of a batch {segments.shape} were given with queries {(batch, width)} and {key.shape[2]} keys; "
            "packed batches take no cache"
        )
    if (seen := _watch.get()) is not None:
        seen.append(sliding_window)
    flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]  # (B·T, heads, D)
    kwargs = kwargs | {"sliding_window": sliding_window}
    if former.startswith("flash_attention_"):
        return _scattered(_flash(module, flat, segments, implementation, **kwargs), segments, query.device)
    if _takes_varlen(flat, segments, former, **kwargs):
        return _scattered(_varlen(flat, segments, kwargs.get("scaling")), segments, query.device)
    return _one_by_one(module, flat, segments, former, implementation, **kwargs)


def _one_by_one(
    module: nn.Module, flat: list[Tensor], segments: Segments, former: str, implementation: Callable[..., Any],
    **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Split and concatenated once: slicing would cost a whole gradient a segment in the backward."""
    parts = []
    value = flat[2]
    for inside, *block in zip(
        segments.is_segment, *(tensor.split(segments.block_sizes) for tensor in flat), strict=True
    ):
        if inside:
            q, k, v = (tensor.transpose(0, 1)[None] for tensor in block)
            mask = _causal_mask(q.shape[2], kwargs["sliding_window"], former, q)
            parts.append(implementation(module, q, k, v, mask, **kwargs)[0][0])  # (L, heads, D)
        else:
            parts.append(value.new_zeros(len(block[0]), flat[0].shape[1], value.shape[2]))
    return torch.cat(parts).unflatten(0, segments.shape)


def _causal_mask(length: int, window: int | None, former: str, like: Tensor) -> Tensor | None:
    """(1, 1, L, L) in the form that the implementation takes; None where it needs none to be causal."""
    cut = window is not None and length > window
    if former == "sdpa" and not cut:
        return None
    allowed = torch.ones(length, length, dtype=torch.bool, device=like.device).tril_()
    if cut:
        assert window is not None
        allowed = allowed.triu_(1 - window)
    if former == "sdpa":
        return allowed[None, None]
    lowest = torch.finfo(like.dtype).min
    return torch.zeros(length, length, dtype=like.dtype, device=like.device).masked_fill_(~allowed, lowest)[None, None]


def _flash(
    module: nn.Module, flat: list[Tensor], segments: Segments, implementation: Callable[..., Any], **kwargs: Any
) -> Tensor:
    """(N, heads, D) by transformers' FlashAttention function, which takes the boundaries of a row (1, N)."""
    index = segments.varlen(flat[0].device)
    q, k, v = (_gathered(tensor, index.positions).transpose(0, 1)[None] for tensor in flat)
    boundaries = {
        "cu_seq_lens_q": index.cu_seqlens, "cu_seq_lens_k": index.cu_seqlens, "max_length_q": index.longest,
        "max_length_k": index.longest,
    }  # fmt: skip
    return implementation(module, q, k, v, None, **(kwargs | boundaries))[0][0]


def _takes_varlen(
    flat: list[Tensor],
    segments: Segments,
    former: str,
    *,
    sliding_window: int | None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> bool:
    """Whether torch's variable-length kernel computes what the implementation would."""
    query, _, value = flat
    return (
        former == "sdpa"
        and query.device.type == "cuda"
        and torch.version.cuda is not None
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[2] == value.shape[2]
        and query.shape[2] % 8 == 0
        and query.shape[2] <= 256
        and not dropout
        and (sliding_window is None or int(segments.lengths.max()) <= sliding_window)
        and all(kwargs.get(name) is None for name in _MASKED_SOFTMAX_EXTRAS)
    )


def _varlen(flat: list[Tensor], segments: Segments, scaling: float | None) -> Tensor:
    """(N, heads, D) by torch's variable-length kernel."""
    from torch.nn.attention.varlen import varlen_attn

    index = segments.varlen(flat[0].device)
    q, k, v = (_gathered(tensor, index.positions) for tensor in flat)
    output = varlen_attn(
        q, k, v, index.cu_seqlens, index.cu_seqlens, index.longest, index.longest, scale=scaling, window_size=(-1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert isinstance(output, Tensor)
    return output


def _gathered(tensor: Tensor, positions: Tensor | None) -> Tensor:
    return tensor.contiguous() if positions is None else tensor.index_select(0, positions)


def _scattered(output: Tensor, segments: Segments, device: torch.device) -> Tensor:
    """(B, T, heads, D) of an output (N, heads, D), 0 in the padding."""
    positions = segments.varlen(device).positions
    if positions is not None:
        whole = output.new_zeros(segments.shape[0] * segments.shape[1], *output.shape[1:])
        output = whole.index_copy(0, positions, output)
    return output.unflatten(0, segments.shape)
