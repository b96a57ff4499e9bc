"""Attention on a CPU over the keys of a prefix and a segment's own, without keeping a copy of the prefix.

torch's function for it takes keys in one tensor and keeps that for the backward: a copy of the prefix for every segment
that continues it, in every layer, which for short responses to a long prompt is most of what a layer keeps. Here the
two are kept as they are and put together again in the backward; what computes is torch's own kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch's scaled_dot_product_attention would take the kernel used here, no dropout given."""
    return (
        query.device.type == "cpu"
        and query.dtype in _DTYPES
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == value.shape[-1]
        and torch.backends.cuda.flash_sdp_enabled()  # of every device, its name notwithstanding
        and not torch.is_autocast_enabled("cpu")
    )


def attend_to_prefix(
    query: Tensor, prefix: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], mask: Tensor | None, scale: float | None
) -> Tensor:
    """(1, L, heads, D): attention to the keys and values of `prefix`, then to those of `own`.

    query (1, L, heads, D); prefix (1, P, key heads, D) and own (1, M, key heads, D), a key and a value each. mask:
    additive, broadcast to (1, heads, L, P + M), of the query's dtype. `takes` says for what inputs.
    """
    output: Tensor = _AttendToPrefix.apply(query, *prefix, *own, mask, scale)
    return output


class _AttendToPrefix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, prefix_key: Tensor, prefix_value: Tensor, key: Tensor, value: Tensor,
        mask: Tensor | None, scale: float | None,
    ) -> Tensor:  # fmt: skip
        q, k, v = query.transpose(1, 2), _joined(prefix_key, key), _joined(prefix_value, value)
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=mask, scale=scale
        )
        output = output.transpose(1, 2)
        ctx.save_for_backward(query, prefix_key, prefix_value, key, value, mask, output, lse)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, prefix_key, prefix_value, key, value, mask, output, lse = ctx.saved_tensors
        q, k, v = query.transpose(1, 2), _joined(prefix_key, key), _joined(prefix_value, value)
        if grad.stride(-1) != 1:
            grad = grad.contiguous()
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad.transpose(1, 2), q, k, v, output.transpose(1, 2), lse, 0.0, False, attn_mask=mask, scale=ctx.scale
        )
        grad_query, grad_key, grad_value = (tensor.transpose(1, 2) for tensor in grads)
        sizes = [prefix_key.shape[1], key.shape[1]]
        (prefix_k, own_k), (prefix_v, own_v) = grad_key.split(sizes, dim=1), grad_value.split(sizes, dim=1)
        return grad_query, prefix_k, prefix_v, own_k, own_v, None, None


def _joined(prefix: Tensor, own: Tensor) -> Tensor:
    return torch.cat([prefix, own], dim=1).transpose(1, 2)
