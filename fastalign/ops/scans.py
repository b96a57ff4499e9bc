"""Recurrences and sums over the tokens of sequences in plain PyTorch; the contract of the backends' own."""

from __future__ import annotations

import torch
from torch import Tensor


def gae_torch(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """The recurrence in plain PyTorch, all sequences at once, token by token."""
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    advantages = torch.zeros_like(values)
    next_value, next_advantage = values.new_zeros(len(values)), values.new_zeros(len(values))
    for t in range(values.shape[1] - 1, -1, -1):
        valid, value = mask[:, t], values[:, t]
        advantage = rewards[:, t] + gamma * next_value - value + gamma * lam * next_advantage
        next_advantage = torch.where(valid, advantage, next_advantage)
        next_value = torch.where(valid, value, next_value)
        advantages[:, t] = torch.where(valid, advantage, 0)
    return advantages, advantages + values


def segment_sums_torch(values: Tensor, mask: Tensor | None, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of values (N,) between consecutive offsets (S + 1,) int64, and how many tokens they are of.

    mask (N,) bool leaves tokens out, whatever they hold. Summed in float64, which costs nothing on a vector: a margin
    is the small difference of two large sums. -> (S,) in values' dtype, differentiable; (S,) int64.
    """

    def sums(tokens: Tensor) -> Tensor:
        return torch.segment_reduce(tokens.double(), "sum", offsets=offsets, axis=0, initial=0.0, unsafe=True)

    if mask is None:
        return sums(values).to(values.dtype), offsets.diff()
    return sums(torch.where(mask, values, 0)).to(values.dtype), sums(mask).to(torch.int64)
