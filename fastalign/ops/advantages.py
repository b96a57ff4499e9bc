"""Advantages of sampled tokens, on the device: GAE, discounted returns, whitening, and baselines over a prompt's group.

Tokens outside the mask do not exist: the token after t is the next *valid* one, and what rewards and values hold there,
NaN included, never enters. Everything here is without gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastalign.ops import backends
from fastalign.ops.sequence_ops import gae_op


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438), one recurrence per sequence, from its last token backwards.

        δ_t = r_t + γ·V_{t+1} − V_t,    A_t = δ_t + γλ·A_{t+1},    returns_t = A_t + V_t;    V after the last token is 0

    Args:
        rewards, values: (B, T) float. 16-bit ones are taken in float32; float64 runs on backend="torch".
        mask: (B, T) bool, True where a token was sampled.
        gamma: γ, lam: λ, both in [0, 1].
        backend: "auto", "torch", "cpu" or "triton".
    Returns:
        (advantages, returns), (B, T), 0 outside the mask.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit, γ or λ outside [0, 1], a backend that cannot run.

    Work: 17 B and 6 FLOP a token, so memory is the floor: 18 MB and 4 µs at 4.3 TB/s for 512 × 2048 tokens.
    """
    _check(rewards, mask, values)
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value}: it must be in [0, 1]")
    dtype = torch.promote_types(torch.promote_types(rewards.dtype, values.dtype), torch.float32)
    rewards, values = rewards.to(dtype), values.to(dtype)
    return gae_op(rewards, values, mask, float(gamma), float(lam), backend)


@torch.no_grad()
def discounted_returns(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0, backend: str = "auto") -> Tensor:
    """Σ_k γ^k r_{t+k} over a sequence's valid tokens, (B, T), 0 outside the mask: GAE with λ = 1 and no critic."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0, backend=backend)[0]


@torch.no_grad()
def whiten(
    values: Tensor, mask: Tensor, *, shift_mean: bool = True, reduce: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """(values − mean)/sqrt(var + 1e-8) over all valid tokens, Bessel-corrected, in two passes; 0 outside the mask.

    Args:
        values: (B, T) float; mask: (B, T) bool.
        shift_mean: False keeps the mean (whitened rewards, arXiv 2403.17031).
        reduce: sums a tensor over processes, so that statistics are those of the whole rollout batch; None: one
            process. With fewer than two valid tokens the variance is taken as 0.
    """
    _check(values, mask)
    total = reduce or (lambda tensor: tensor)
    wide = torch.where(mask, values, 0).double()
    sums = total(torch.stack([wide.sum(), mask.sum().double()]))
    mean, count = sums[0] / sums[1].clamp(min=1), sums[1]
    centered = torch.where(mask, wide - mean, 0)
    variance = total(centered.square().sum()) / (count - 1).clamp(min=1)
    scaled = centered / (variance + 1e-8).sqrt()
    return torch.where(mask, scaled if shift_mean else scaled + mean, 0).to(values.dtype)


@torch.no_grad()
def group_advantages(rewards: Tensor, groups: Tensor, *, estimator: str = "group", scale: bool = True) -> Tensor:
    """Advantages of whole responses from the others to the same prompt.

        group: (r_i − mean)/(std + 1e-4), std Bessel-corrected (GRPO, arXiv 2402.03300); scale=False leaves out the std
            (Dr. GRPO, arXiv 2503.20783)
        rloo:  r_i − mean_{j≠i} r_j (arXiv 2402.14740)

    Args:
        rewards: (S,) float. groups: (S,) int64, prompt of each response, numbered from 0.
    Returns:
        (S,). A response without company gets 0.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown estimator; a group outside 0 … S − 1, on the
            CPU or under FASTALIGN_CHECK_TARGETS=1.
    """
    if estimator not in ("group", "rloo"):
        raise ValueError(f"estimator={estimator!r}: accepted are 'group', 'rloo'")
    if rewards.shape != groups.shape or rewards.dim() != 1:
        raise ValueError(f"rewards {tuple(rewards.shape)} and groups {tuple(groups.shape)} must both be (S,)")
    if not rewards.is_floating_point() or groups.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"rewards must be float and groups int64, got {rewards.dtype} and {groups.dtype}")
    if groups.device != rewards.device:
        raise ValueError(f"groups must be on {rewards.device} as rewards are, got {groups.device}")
    size = max(len(groups), 1)  # numbers run from 0, so there are no more groups than responses
    if (groups.device.type == "cpu" or backends.checks_targets()) and not torch.compiler.is_compiling():
        outside = ((groups < 0) | (groups >= size)).nonzero()[:, 0]
        if len(outside):
            at = int(outside[0])
            raise ValueError(
                f"groups[{at}] = {int(groups[at])} is out of range: {size} responses have prompts 0 to {size - 1}"
            )
    zeros = rewards.new_zeros(size)
    count = zeros.index_add(0, groups, torch.ones_like(rewards))[groups]
    centered = rewards - (zeros.index_add(0, groups, rewards)[groups] / count)
    if estimator == "rloo":
        return torch.where(count > 1, centered * count / (count - 1).clamp(min=1), 0)
    if not scale:
        return centered
    variance = zeros.index_add(0, groups, centered.square())[groups] / (count - 1).clamp(min=1)
    return centered / (variance.sqrt() + 1e-4)


def _check(first: Tensor, mask: Tensor, *others: Tensor) -> None:
    if first.dim() != 2 or not first.is_floating_point():
        raise ValueError(f"accepted are float tensors (B, T), got {first.dtype} {tuple(first.shape)}")
    for other in others:
        if not other.is_floating_point():
            raise ValueError(f"accepted are float tensors (B, T), got {other.dtype}")
    for other in (mask, *others):
        if other.shape != first.shape or other.device != first.device:
            raise ValueError(
                f"all tensors must be {tuple(first.shape)} on {first.device}, got {tuple(other.shape)} on "
                f"{other.device}"
            )
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}")
