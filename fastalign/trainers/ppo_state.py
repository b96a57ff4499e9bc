"""What a PPO run carries from phase to phase beside its models: controllers, running statistics, counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastalign.losses import RunningMoments
from fastalign.trainers.kl_control import AdaptiveKLController, FixedKLController, KLController, PenaltyController
from fastalign.trainers.ppo_config import PPOConfig


class PPOState:
    """kl: controller of kl_coef. penalty: of penalty_coef. moments: of all scores, or None. episodes: so far."""

    def __init__(self, args: PPOConfig) -> None:
        assert args.kl_coef is not None  # a config has its loss type's
        self.kl: KLController = FixedKLController(args.kl_coef)
        if args.kl_controller == "adaptive":
            assert args.target_kl is not None
            self.kl = AdaptiveKLController(args.kl_coef, args.target_kl, args.kl_horizon)
        self.penalty: KLController = FixedKLController(args.penalty_coef)
        if args.policy_loss == "penalty":
            self.penalty = PenaltyController(args.penalty_coef, args.penalty_target)
        self.moments = RunningMoments() if args.normalize_scores else None
        self.episodes = 0

    @property
    def follows_kl(self) -> bool:
        return isinstance(self.kl, AdaptiveKLController)

    @property
    def follows_penalty(self) -> bool:
        return isinstance(self.penalty, PenaltyController)

    def coefficients(self) -> dict[str, float]:
        """Those that a phase is about to be trained with, as they are logged."""
        own = {"policy/penalty_coef": self.penalty.coef} if self.follows_penalty else {}
        return {"objective/kl_coef": self.kl.coef} | own

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; restores to the bit."""
        return {
            "episodes": self.episodes,
            "kl_controller": self.kl.state_dict(),
            "penalty_controller": self.penalty.state_dict(),
            "moments": None if self.moments is None else self.moments.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`. Raises ValueError for the state of a run with other controllers."""
        if (self.moments is None) != (state["moments"] is None):
            raise ValueError(
                f"normalize_scores={self.moments is not None}, and the checkpoint is of a run with "
                f"{self.moments is None}: set it as in the first run"
            )
        self.kl.load_state_dict(state["kl_controller"])
        self.penalty.load_state_dict(state["penalty_controller"])
        if self.moments is not None:
            self.moments.load_state_dict(state["moments"])
        self.episodes = state["episodes"]
