"""Attention on a CPU over the keys of a prefix and a segment's own, without keeping a copy of the prefix.

torch's function for it takes keys in one tensor and keeps that for the backward: a copy of the prefix for every segment
that continues it, in every layer, which for short responses to a long prompt is most of what a layer keeps. Here the
two are kept as they are and put together again in the backward; what computes is torch's own kernel. Torch has no
public name for its backward: where that is missing, or called otherwise, a trial finds it out and torch's function is
used as it is.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastalign.models.trials import in_own_thread

logger = logging.getLogger(__name__)

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
        and works()
    )


@functools.cache
def works() -> bool:
    """Whether torch's kernel and its backward can be called from here, and do what torch's public function does."""
    try:
        in_own_thread(_try)
    except Exception as error:  # whatever another version of torch makes of it
        logger.warning("attention on the CPU keeps a copy of each prefix: torch %s, %s", torch.__version__, error)
        return False
    return True


def _try() -> None:
    """Raise AssertionError unless output and gradients of 2 queries on 3 + 2 keys are torch's, masked and not."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 2, 4, 8), (1, 3, 2, 8), (1, 3, 2, 8), (1, 2, 2, 8), (1, 2, 2, 8)]
    tensors = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    weights = torch.randn(shapes[0], generator=generator)
    query, prefix_key, prefix_value, key, value = tensors
    for mask in (None, torch.tensor([[0.0, 0.0, 0.0, 0.0, float("-inf")], [0.0] * 5])):
        ours = attend_to_prefix(query, (prefix_key, prefix_value), (key, value), mask, 0.3)
        keys, values = _joined(prefix_key, key), _joined(prefix_value, value)
        theirs = F.scaled_dot_product_attention(
            query.transpose(1, 2), keys, values, attn_mask=mask, scale=0.3, enable_gqa=True
        ).transpose(1, 2)
        for output in (ours, theirs):
            assert output.shape == query.shape
        found = [torch.autograd.grad((output * weights).sum(), tensors) for output in (ours, theirs)]
        for mine, wanted in zip((ours, *found[0]), (theirs, *found[1]), strict=True):
            torch.testing.assert_close(mine, wanted)


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
        output, lse = _forward(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
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
        grads = _backward(
            grad.transpose(1, 2), q, k, v, output.transpose(1, 2), lse, 0.0, False, attn_mask=mask, scale=ctx.scale
        )
        grad_query, grad_key, grad_value = (tensor.transpose(1, 2) for tensor in grads)
        sizes = [prefix_key.shape[1], key.shape[1]]
        (prefix_k, own_k), (prefix_v, own_v) = grad_key.split(sizes, dim=1), grad_value.split(sizes, dim=1)
        return grad_query, prefix_k, prefix_v, own_k, own_v, None, None


def _joined(prefix: Tensor, own: Tensor) -> Tensor:
    return torch.cat([prefix, own], dim=1).transpose(1, 2)


def _forward(*args: Any, **kwargs: Any) -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, **kwargs)


def _backward(*args: Any, **kwargs: Any) -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*args, **kwargs)
