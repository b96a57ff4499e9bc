"""Causal attention within each segment of a packed batch, and from a segment to the one that it continues.

A segment's queries see the keys of its prefix and its own, up to themselves: [prefix keys, own keys] under a causal
mask whose diagonal ends in the lower right corner. Nothing as large as the square of a row is ever made.

    a GPU               one call for all segments, by a kernel that `fastalign.models.segment_kernels` chooses
    SDPA and eager      a call a segment; where a mask is needed, one a block of queries, with a view of one small mask
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastalign.models import cpu_attention, segment_kernels
from fastalign.models.cpu_attention import attend_to_prefix
from fastalign.models.segments import Segments
from fastalign.models.varlen_attention import Implementation, Under, flash, scattered

BLOCK = 512
"""Queries of one call under a mask: the mask is (block, keys), and what a block cannot see is not computed."""

_OF_NO_KERNEL = ("s_aux", "position_bias", "cache")


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    former: str,
    implementation: Implementation,
    *,
    sliding_window: int | None = None,
    kernels: bool = True,
    **kwargs: Any,
) -> Tensor:
    """Attention of each token to its segment's tokens up to itself and to those of its prefix; (B, T, heads, D).

    query (B, heads, T, D), key and value (B, key heads, T, D) as transformers' attention functions take them; what the
    softmax is made of is up to `implementation`, transformers' function named `former`. 0 in the padding.
    kernels: False takes that function for each segment, on a GPU too.

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
    flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]  # (B·T, heads, D)
    if former.startswith("flash_attention_"):
        segment_kernels.tell(former)
        kwargs = kwargs | {"sliding_window": sliding_window}
        return scattered(flash(Under(module, former), flat, segments, implementation, **kwargs), segments)
    if kernels and query.device.type in segment_kernels.DEVICES:
        flat = _as_autocast(flat)
        layer = _for_a_kernel(flat, segments, former, sliding_window, kwargs)
        if layer is not None and (name := segment_kernels.choose(layer)) is not None:
            return scattered(segment_kernels.KERNELS[name].run(flat, segments, layer), segments)
    segment_kernels.tell(f"a call of {former} a segment on {query.device.type}")
    return _one_by_one(module, flat, segments, former, implementation, sliding_window=sliding_window, **kwargs)


def _as_autocast(flat: list[Tensor]) -> list[Tensor]:
    """In autocast's dtype, where it is on, as PyTorch does for its own function."""
    device = flat[0].device.type
    if not torch.is_autocast_enabled(device):
        return flat
    dtype = torch.get_autocast_dtype(device)
    return [tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in flat]


def _for_a_kernel(
    flat: list[Tensor], segments: Segments, former: str, window: int | None, kwargs: dict[str, Any]
) -> segment_kernels.Layer | None:
    """What is asked of a kernel in place of `former`; None where it is asked for by name, or does what none does."""
    asked = {name: kwargs.get(name) for name in ("softcap", "scaling")} | {"dropout": kwargs.get("dropout") or 0.0}
    if any(kwargs.get(name) is not None for name in _OF_NO_KERNEL) or (former == "eager" and asked["softcap"] is None):
        return None
    if len({tensor.dtype for tensor in flat}) > 1:
        return None
    return segment_kernels.layer_of(flat, segments, window, **asked)


# A call a segment -----------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """Queries start … stop of a segment, on keys first … of [its prefix, its own] up to the last query's own.

    diagonal: the key of the first query among these; None where causality needs no mask.
    """

    start: int
    stop: int
    first: int
    diagonal: int | None


def _calls(length: int, prefix: int, window: int | None, former: str) -> list[_Call]:
    """The calls of one segment of `length` tokens behind a prefix of `prefix`."""
    cut = window is not None and prefix + length > window
    if length == 1 and not cut:
        return [_Call(0, 1, 0, None)]
    if former == "sdpa" and not (prefix or cut):
        return [_Call(0, length, 0, None)]
    calls = []
    for start in range(0, length, BLOCK):
        first = max(0, prefix + start - window + 1) if cut and window is not None else 0
        calls.append(_Call(start, min(start + BLOCK, length), first, prefix + start - first))
    return calls


def _one_by_one(
    module: nn.Module, flat: list[Tensor], segments: Segments, former: str, implementation: Implementation,
    **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Split and concatenated once: slicing would cost a whole gradient a segment in the backward.

    A prefix's keys are put before those of each segment that continues it. Two calls merged by their log-sum-exps save
    these copies and the mask, but were not faster; one call over a whole group under a dense mask was slower.
    """
    window = kwargs["sliding_window"]
    blocks = list(zip(*(tensor[None].split(segments.block_sizes, dim=1) for tensor in flat), strict=True))
    of_segment = [block for inside, block in zip(segments.is_segment, blocks, strict=True) if inside]
    plan = segments.cached(("calls", window, former), lambda: _plan(segments, window, former))
    band = segments.cached(
        ("mask", window, former, flat[0].dtype, flat[0].device), lambda: _band(plan, window, former, flat[0])
    )
    attend: Implementation = _sdpa if former == "sdpa" and _plain(flat[0].device, kwargs) else implementation
    frugal = attend is _sdpa and not kwargs.get("dropout") and cpu_attention.takes(*flat)
    parts, steps = [], iter(plan)
    for inside, (q, *own) in zip(segments.is_segment, blocks, strict=True):  # (1, L, heads, D) each
        if not inside:
            parts.append(q.new_zeros(1, q.shape[1], q.shape[2], own[1].shape[3]))
            continue
        number, calls = next(steps)
        prefix = of_segment[number][1:] if number >= 0 else None
        if prefix is not None and not frugal:
            own = [torch.cat(pair, dim=1) for pair in zip(prefix, own, strict=True)]
            prefix = None
        before = 0 if prefix is None else prefix[0].shape[1]
        behind = own[0].shape[1] + before - q.shape[1]  # keys before the segment's own
        for call in calls:
            rows, stop = _cut(q, call.start, call.stop), behind + call.stop
            mask = None
            if call.diagonal is not None and band is not None:
                mask = band.view(call.diagonal, rows.shape[1], stop - call.first)
            k, v = (_cut(tensor, max(call.first - before, 0), stop - before) for tensor in own)
            if prefix is not None and call.first < before:
                prefix_k, prefix_v = (_cut(tensor, call.first, before) for tensor in prefix)
                parts.append(attend_to_prefix(rows, (prefix_k, prefix_v), (k, v), mask, kwargs.get("scaling")))
            else:
                inputs = (tensor.transpose(1, 2) for tensor in (rows, k, v))
                parts.append(attend(module, *inputs, mask, **kwargs)[0])
    return torch.cat(parts, dim=1)[0].unflatten(0, segments.shape)


def _cut(tensor: Tensor, start: int, stop: int) -> Tensor:
    """tensor[:, start:stop], which in the backward costs a gradient of the whole: not where it is the whole."""
    return tensor if start == 0 and stop == tensor.shape[1] else tensor[:, start:stop]


def _plan(segments: Segments, window: int | None, former: str) -> list[tuple[int, list[_Call]]]:
    sizes = zip(segments.prefixes.tolist(), segments.lengths.tolist(), segments.prefix_lengths.tolist(), strict=True)
    return [(prefix, _calls(length, before, window, former)) for prefix, length, before in sizes]


def _plain(device: torch.device, kwargs: dict[str, Any]) -> bool:
    """Whether torch's CPU kernel, which reads a key for several query heads under a mask too, does all that is asked
    of transformers' SDPA function. That one copies keys and values for each query head, as GPU kernels need it.
    """
    return device.type == "cpu" and all(kwargs.get(name) is None for name in (*_OF_NO_KERNEL, "softcap"))


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    dropout: float = 0.0, scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' function on a CPU, without copies of keys and values."""
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling,
        is_causal=attention_mask is None and query.shape[2] == key.shape[2] > 1,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return output.transpose(1, 2), None


class _Band:
    """Additive masks of every shape that a plan needs, as views of one: allowed[i, j] = −window < j − i − diagonal ≤ 0.

    (rows, columns) long enough for the largest; a smaller one begins in its first row, further right.
    """

    def __init__(self, rows: int, diagonal: int, window: int | None, lowest: float, like: Tensor) -> None:
        self.diagonal = diagonal
        allowed = torch.ones(rows, rows + diagonal, dtype=torch.bool, device=like.device).tril_(diagonal)
        if window is not None:
            allowed = allowed.triu_(diagonal + 1 - window)
        zeros = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device)
        self.mask = zeros.masked_fill_(~allowed, lowest)
        self._views: dict[tuple[int, int, int], Tensor] = {}

    def view(self, diagonal: int, rows: int, columns: int) -> Tensor:
        """(1, 1, rows, columns) whose row i ends at column i + diagonal."""
        key = diagonal, rows, columns
        if key not in self._views:
            first = self.diagonal - diagonal
            part = self.mask[:rows, first : first + columns][None, None]
            if part.device.type != "cpu":
                return part.contiguous()  # GPU kernels want rows that are aligned
            self._views[key] = part
        return self._views[key]


def _band(plan: list[tuple[int, list[_Call]]], window: int | None, former: str, like: Tensor) -> _Band | None:
    masked = [
        (call.stop - call.start, call.diagonal) for _, calls in plan for call in calls if call.diagonal is not None
    ]
    if not masked:
        return None
    lowest = float("-inf") if former == "sdpa" else torch.finfo(like.dtype).min
    return _Band(max(rows for rows, _ in masked), max(diagonal for _, diagonal in masked), window, lowest, like)
