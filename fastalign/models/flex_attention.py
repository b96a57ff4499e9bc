"""FlexAttention over segments: one compiled kernel on a GPU for what variable-length kernels refuse.

That is float32, softcaps and sizes of heads beyond theirs. What a token sees is a function of segment numbers,

    seen(q, k) = (number[q] == number[k] and k <= q  or  before[q] == number[k])  and  place[k] >= first[q]

with `before` the segment that a token's segment continues, `place` its position behind that, and `first` the place
where its window begins. No mask of tokens by tokens exists; which blocks of keys a block of queries needs is worked out
on the host, once for a layout and window.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from fastalign.models.segments import Segments

BLOCK = 128
"""Queries, and keys, that are needed or not as a whole: FlexAttention's own size of blocks."""


def attend(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, window: int | None, softcap: float | None,
    scaling: float | None, compiled: bool = True,
) -> Tensor:  # fmt: skip
    """(N, heads, D): attention of the tokens of all segments, one after the other, without padding.

    query (N, heads, D), key and value (N, key heads, D), on a GPU; on a CPU without gradients, which FlexAttention
    has not there. compiled: False takes PyTorch's dense version, quadratic in memory, for tests.
    """
    name = ("block mask", window, query.device)
    mask = segments.cached(name, lambda: block_mask(segments, window, query.device))
    settings = (query.device, query.dtype, query.shape[1:], key.shape[1], softcap, scaling, torch.is_grad_enabled())
    function = _compiled(window is None, *settings) if compiled else _attend
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    output: Tensor = function(q, k, v, mask, softcap, scaling)
    return output[0].transpose(0, 1)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, softcap: float | None, scaling: float | None
) -> Any:
    cap = 1.0 if softcap is None else softcap

    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return flex_attention(
        query, key, value, score_mod=None if softcap is None else capped, block_mask=mask, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


@functools.cache
def _compiled(*settings: Any) -> Any:
    """`_attend` compiled for any number of tokens. For each settings from a code object of its own: that is what
    torch counts compilations by, and it gives up on one after a few."""
    code = _attend.__code__.replace(co_name=f"_attend_{_compiled.cache_info().currsize}")
    own = types.FunctionType(code, globals())
    return torch.compile(own, fullgraph=True)


def block_mask(segments: Segments, window: int | None, device: torch.device) -> BlockMask:
    """What the tokens of segments, one after the other, see of each other."""
    total = int(segments.lengths.sum())
    needed, whole = needed_blocks(segments, window)
    lists = [_as_lists(blocks, device) for blocks in (needed & ~whole, whole)]
    numbers, befores, places = segments.columns()
    firsts = places - (total if window is None else window - 1)
    columns = torch.from_numpy(np.stack([numbers, befores, places, firsts]).astype(np.int32))
    number, before, place, first = columns.to(device, non_blocking=True).unbind()

    def seen(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((number[q] == number[k]) & (k <= q)) | (before[q] == number[k])

    def near(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return seen(batch, head, q, k) & (place[k] >= first[q])

    return BlockMask.from_kv_blocks(
        *lists[0], *lists[1], BLOCK_SIZE=BLOCK, mask_mod=seen if window is None else near, seq_lengths=(total, total)
    )


def needed_blocks(segments: Segments, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(blocks, blocks) bool each, queries by keys: where some token sees another one, and where all see all."""
    ends = np.cumsum(segments.lengths)
    starts, count = ends - segments.lengths, -(-int(ends[-1]) // BLOCK)
    needed, whole = np.zeros((2, count, count), bool)
    for number, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        before = int(segments.prefixes[number])
        # flat index of a key at place 0: of the prefix's, and of one's own as if the prefix came right before them
        zero, length = (int(starts[before]), int(segments.lengths[before])) if before >= 0 else (0, 0)
        own_zero = start - length
        for block in range(start // BLOCK, (end - 1) // BLOCK + 1):
            first, last = max(start, block * BLOCK), min(end, (block + 1) * BLOCK) - 1
            # places that the first query of the block sees at least, and those that its last one does not see any more
            low, high = (0, 0) if window is None else (first - own_zero - window + 1, last - own_zero - window + 1)
            low, high = max(low, 0), max(high, 0)
            spans = [(own_zero, max(low, length), last - own_zero)] + [(zero, low, length - 1)] * (before >= 0)
            alone = first == block * BLOCK and last == min((block + 1) * BLOCK, int(ends[-1])) - 1
            for origin, begin, stop in spans:
                if begin > stop:
                    continue
                needed[block, (origin + begin) // BLOCK : (origin + stop) // BLOCK + 1] = True
                if alone:
                    seen_by_all = min(stop, first - own_zero)
                    inner = -(-(origin + max(begin, high)) // BLOCK), (origin + seen_by_all + 1) // BLOCK
                    whole[block, inner[0] : max(inner)] = True
    return needed, whole


def _as_lists(blocks: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each block of queries how many blocks of keys, (1, 1, blocks), and which, first, (1, 1, blocks, blocks)."""
    lists = blocks.sum(axis=1), np.argsort(~blocks, axis=1, kind="stable")
    counts, which = (torch.from_numpy(array.astype(np.int32))[None, None] for array in lists)
    return counts.to(device, non_blocking=True), which.to(device, non_blocking=True)
