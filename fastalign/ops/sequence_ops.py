"""Custom ops over the tokens of sequences: torch.compile sees one node each, whatever serves it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign.ops import backends
from fastalign.ops.scans import segment_sums_torch


@torch.library.custom_op("fastalign::gae", mutates_args=())
def gae_op(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, backend: str
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), (B, T); arguments as `fastalign.ops.gae` has checked them. Without gradient."""
    return backends.resolve(backend, rewards).gae(rewards, values, mask, gamma, lam)


@gae_op.register_fake
def _(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, backend: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)


@torch.library.custom_op("fastalign::segment_sums", mutates_args=())
def segment_sums(values: Tensor, mask: Tensor | None, offsets: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """`scans.segment_sums_torch`, on CUDA by one kernel; the counts are without gradient."""
    if backends.resolve(backend, values).name == "triton":
        from fastalign.kernels import segments

        return segments.segment_sums(values, mask, offsets)
    return segment_sums_torch(values, mask, offsets)


@segment_sums.register_fake
def _(values: Tensor, mask: Tensor | None, offsets: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return values.new_empty(offsets.shape[0] - 1), offsets.new_empty(offsets.shape[0] - 1)


@torch.library.custom_op("fastalign::spread_segments", mutates_args=())
def spread_segments(values: Tensor, mask: Tensor | None, offsets: Tensor, length: int, backend: str) -> Tensor:
    """values (S,) to every token of its sequence, 0 where the mask is False: the transpose of `segment_sums`."""
    if backends.resolve(backend, values).name == "triton":
        from fastalign.kernels import segments

        return segments.spread_segments(values, mask, offsets, length)
    spread = values.repeat_interleave(offsets.diff(), output_size=length)
    return spread if mask is None else torch.where(mask, spread, 0)


@spread_segments.register_fake
def _(values: Tensor, mask: Tensor | None, offsets: Tensor, length: int, backend: str) -> Tensor:
    return values.new_empty(length)


def _sums_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    values, mask, offsets, ctx.backend = inputs
    ctx.length = values.shape[0]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(mask, offsets)


def _sums_backward(ctx: Any, grad_sums: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_sums is None:
        return None, None, None, None
    mask, offsets = ctx.saved_tensors
    return spread_segments(grad_sums, mask, offsets, ctx.length, ctx.backend), None, None, None


def _spread_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, mask, offsets, _, ctx.backend = inputs
    ctx.save_for_backward(mask, offsets)


def _spread_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    mask, offsets = ctx.saved_tensors
    return segment_sums(grad, mask, offsets, ctx.backend)[0], None, None, None, None


segment_sums.register_autograd(_sums_backward, setup_context=_sums_context)
spread_segments.register_autograd(_spread_backward, setup_context=_spread_context)
