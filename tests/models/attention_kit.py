"""Segments, tensors, and attention within segments by its definitions, for several test files."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fastalign.models.segments import Segments

LENGTHS, WIDTH = np.array([[5, 1, 3], [7, 0, 0], [2, 9, 0]]), 11
PREFIXES = np.array([-1, 0, 0, -1, 3, -1])  # a prefix of several, and one from another row


class Layer(nn.Module):
    """What transformers' attention functions read of an attention module."""

    num_key_value_groups, is_causal, head_dim = 2, True, 8


def make(kind: str) -> Segments:
    return {
        "apart": lambda: Segments(LENGTHS, WIDTH),
        "prefixed": lambda: Segments(LENGTHS, WIDTH, prefixes=PREFIXES),
        "full rows": lambda: Segments(np.array([[5, 6], [11, 0], [2, 9]]), WIDTH),
        "full and prefixed": lambda: Segments(
            np.array([[5, 6], [11, 0], [2, 9]]), WIDTH, prefixes=np.array([-1, 0, -1, 2, -1])
        ),
    }[kind]()


def tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, heads, WIDTH, 8) for heads in (4, 2, 2)]
    return tuple(torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """A softmax over the keys of one's prefix and of one's own segment, up to oneself, within the window."""
    out = torch.zeros(3 * WIDTH, 4, 8, dtype=q.dtype)
    flat_q, flat_k, flat_v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    spans = [range(s, s + n) for s, n in zip(segments.starts.tolist(), segments.lengths.tolist(), strict=True)]
    for span, prefix in zip(spans, segments.prefixes, strict=True):
        before = [] if prefix < 0 else list(spans[prefix])
        for t in span:
            seen = (before + list(span)[: t - span.start + 1])[-(window or 10**6) :]
            for head in range(4):
                scores = flat_k[seen, head // 2] @ flat_q[t, head] * 8**-0.5
                if softcap is not None:
                    scores = torch.tanh(scores / softcap) * softcap
                out[t, head] = scores.softmax(0) @ flat_v[seen, head // 2]
    return out.unflatten(0, (3, WIDTH))


def by_boundaries(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float | None = None, *, left: int = -1,
    softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """(N, heads, D): what a variable-length kernel computes, its causal mask ending in the lower right corner; left:
    the keys that are seen before that diagonal, −1 for all."""
    parts = []
    for q0, q1, k0, k1 in zip(*(cu.tolist()[i:][: len(cu) - 1] for cu in (cu_q, cu_k) for i in (0, 1)), strict=True):
        query, key, value = (x.transpose(0, 1) for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        key, value = (x.repeat_interleave(len(query) // len(key), dim=0) for x in (key, value))
        scores = query @ key.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = torch.tanh(scores / softcap) * softcap if softcap else scores
        ahead = torch.arange(k1 - k0) - torch.arange(q1 - q0)[:, None] - ((k1 - k0) - (q1 - q0))
        hidden = (ahead > 0) | (ahead < -left) if left >= 0 else ahead > 0
        parts.append((scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value).transpose(0, 1))
    return torch.cat(parts)


def with_gradients(output: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weights = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
    return output, *torch.autograd.grad((output * weights).sum(), inputs)
