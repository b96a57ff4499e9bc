"""Generalised advantage estimation beside its peers; run by ppo_step.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import torch
from torch import Tensor

GAMMA, LAM = 0.99, 0.95


def tokens_one_by_one(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Python numbers, a token at a time."""
    advantages = []
    for r, v, m in zip(rewards.tolist(), values.tolist(), mask.tolist(), strict=True):
        row, following, ahead = [0.0] * len(r), 0.0, 0.0
        for t in range(len(r) - 1, -1, -1):
            if m[t]:
                ahead = r[t] + GAMMA * following - v[t] + GAMMA * LAM * ahead
                row[t], following = ahead, v[t]
        advantages.append(row)
    found = torch.tensor(advantages, device=rewards.device)
    return found, torch.where(mask, found + values, 0)


def positions_one_by_one(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A loop over positions, all sequences at once, as TRL's PPOTrainer had it."""
    rewards, values = rewards * mask, values * mask
    ahead, reversed_advantages, T = 0.0, [], rewards.shape[1]
    for t in reversed(range(T)):
        following = values[:, t + 1] if t < T - 1 else 0.0
        ahead = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * ahead
        reversed_advantages.append(ahead)
    advantages = torch.stack(reversed_advantages[::-1], dim=1) * mask
    return advantages, advantages + values


def doubling_scan(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A_t = δ_t + γλ·A_{t+1} in log2 T vectorised steps: after step k a sum spans 2^k tokens."""
    rewards, values = rewards * mask, values * mask
    advantages = rewards - values
    advantages[:, :-1] += GAMMA * values[:, 1:]
    step, factor = 1, GAMMA * LAM
    while step < advantages.shape[1]:
        advantages[:, :-step] += factor * advantages[:, step:].clone()
        step, factor = 2 * step, factor * factor
    advantages *= mask
    return advantages, advantages + values


def fused(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    from fastalign.ops import gae

    return gae(rewards, values, mask, gamma=GAMMA, lam=LAM)


GAE: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "python loop over tokens": tokens_one_by_one,
    "torch loop over positions": positions_one_by_one,
    "torch log-step scan": doubling_scan,
    "fastalign": fused,
}


def run(device: str, timing: dict[str, Any], B: int = 512, T: int = 2048) -> list[dict[str, Any]]:
    g = torch.Generator(device).manual_seed(0)
    rewards, values = torch.randn(2, B, T, device=device, generator=g)
    lengths = torch.randint(T // 2, T + 1, (B, 1), device=device, generator=g)
    given = rewards, values, torch.arange(T, device=device) < lengths
    expected = tokens_one_by_one(*given)
    for name, provider in GAE.items():
        for mine, true in zip(provider(*given), expected, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    calls = {name: lambda provider=provider: provider(*given) for name, provider in GAE.items()}
    times = harness.interleaved(calls, device=device, **timing)
    scan = harness.median(times["torch log-step scan"])
    rows = []
    for name, seconds in times.items():
        middle = harness.median(seconds)
        row = {"provider": name, "seconds": middle, "fastest": min(seconds), "over_scan": middle / scan}
        rows.append({"task": "gae", "shape": f"{B}x{T}", "dtype": "float32"} | row)
    return rows
