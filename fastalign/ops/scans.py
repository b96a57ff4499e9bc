"""Recurrences over the tokens of a sequence in plain PyTorch; the contract of the backends' scans."""

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
