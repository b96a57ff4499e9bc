"""A TRPO step of a PPO phase: the policy's part of the update, on plain logits, for small models."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from fastalign.losses import ppo_loss
from fastalign.models import Head
from fastalign.trainers.batches import Batch
from fastalign.trainers.fisher import categorical_kl
from fastalign.trainers.ppo_config import PPOConfig
from fastalign.trainers.trpo import TRPOResult, trpo_step
from fastalign.types import Metric


def policy_trpo_step(policy: nn.Module, pieces: list[Batch], args: PPOConfig) -> TRPOResult:
    """One natural-gradient step of a fused policy on a whole phase, with a mean KL per token of at most trpo_max_kl.

    pieces: the phase's padded batch cut by `split_batch`, with advantages (n,). Of every piece the logits
    of its completion tokens are held, (n, V) float32, twice. Raises ValueError as `trpo_step`.
    """
    tokens = sum(len(piece["rows"]) for piece in pieces)
    scored = [_Piece(policy, piece, args.temperature) for piece in pieces]

    def surrogate(piece: _Piece) -> Callable[[], Tensor]:
        return lambda: ppo_loss(
            piece.logps()[None], piece.old_logps[None], piece.advantages[None], epsilon_low=1.0,
            epsilon_high=math.inf, num_items=tokens,
        ).loss  # fmt: skip

    def kl(piece: _Piece) -> Callable[[], Tensor]:
        return lambda: categorical_kl(piece.old, piece.logits(), num_items=tokens)

    return trpo_step(
        policy.parameters(), [surrogate(piece) for piece in scored], [kl(piece) for piece in scored],
        max_kl=args.trpo_max_kl,
    )  # fmt: skip


def trpo_metrics(result: TRPOResult, device: torch.device) -> dict[str, Metric]:
    """policy/trpo_*: of one step each."""
    one = torch.ones((), device=device)
    figures = {
        "accepted": float(result.accepted), "kl": result.kl, "improvement": result.improvement,
        "step_fraction": result.step_fraction, "cg_residual": result.cg_residual,
    }  # fmt: skip
    return {f"policy/trpo_{name}": Metric(one * figure, one) for name, figure in figures.items()}


class _Piece:
    """A piece of the phase, and the policy's distributions at its tokens before the step."""

    def __init__(self, policy: nn.Module, batch: Batch, temperature: float) -> None:
        self._policy, self._temperature, self._input_ids = policy, temperature, batch["input_ids"]
        self._rows = torch.from_numpy(np.asarray(batch["rows"])).to(self._input_ids.device)
        self._targets = batch["targets"].flatten()[self._rows]
        self.advantages = batch["advantages"]
        with torch.no_grad():
            self.old = self.logits().log_softmax(-1)
            # both sides of the ratio from one computation, so that it is 1 to the bit before the step
            self.old_logps = self.old.gather(1, self._targets[:, None])[:, 0]

    def logits(self) -> Tensor:
        """(n, V) float32, divided by the temperature."""
        return self._policy(input_ids=self._input_ids, head_fn=self._plain_head)

    def _plain_head(self, hidden: Tensor, head: Head) -> Tensor:
        logits = hidden.flatten(0, 1)[self._rows].float() @ head.weight.float().T
        if head.bias is not None:
            logits = logits + head.bias.float()
        logits = logits * head.logit_scale
        if head.softcap is not None:
            logits = torch.tanh(logits / head.softcap) * head.softcap
        return logits / self._temperature

    def logps(self) -> Tensor:
        """(n,) log-probs of the sampled tokens."""
        return self.logits().log_softmax(-1).gather(1, self._targets[:, None])[:, 0]
