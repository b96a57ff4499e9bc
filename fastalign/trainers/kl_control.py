"""How the coefficient of a KL penalty follows the KL that is measured: fixed, adaptive, or PPO-penalty's doubling.

A controller is plain Python on the host: `coef` is read before a rollout is scored or a loss is taken, `update` is
called once afterwards with the KL that came out. Only `coef` is state; target and horizon are settings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class KLController:
    """A coefficient and what moves it. Subclasses say how in `_updated`."""

    def __init__(self, coef: float) -> None:
        self._coef = float(coef)

    @property
    def coef(self) -> float:
        """The coefficient of the KL."""
        return self._coef

    def update(self, kl: float, n_episodes: int) -> None:
        """Take in a measured KL in nats and the number of episodes (completions) that it was measured on.

        Which KL is meant is said by each controller. Raises ValueError for a KL that is not finite or an n_episodes
        below 1; the coefficient then stays.
        """
        if not math.isfinite(kl):
            raise ValueError(f"kl={kl}: the measured KL is not finite; the coefficient stays {self._coef}")
        if n_episodes < 1:
            raise ValueError(f"n_episodes={n_episodes}: it must be at least 1")
        self._coef = self._updated(float(kl), n_episodes)

    def _updated(self, kl: float, n_episodes: int) -> float:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"controller": type(self).__name__, "coef": self._coef}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`. Raises ValueError if it is that of another controller, or holds no number."""
        kind, coef = state.get("controller"), state.get("coef")
        if kind != type(self).__name__:
            raise ValueError(f"the state is that of {kind!r}, accepted is {type(self).__name__!r}")
        if not isinstance(coef, int | float) or not 0 <= coef < math.inf:
            raise ValueError(f"state coef={coef!r}: it must be at least 0 and finite")
        self._coef = float(coef)


class FixedKLController(KLController):
    """A coefficient that does not move, at least 0."""

    def __init__(self, coef: float) -> None:
        if not 0 <= coef < math.inf:
            raise ValueError(f"coef={coef}: it must be at least 0 and finite")
        super().__init__(coef)

    def _updated(self, kl: float, n_episodes: int) -> float:
        return self._coef

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Also refuses a coefficient that is not this one: resuming would ignore one of the two in silence."""
        before = self._coef
        super().load_state_dict(state)
        found, self._coef = self._coef, before
        if found != before:
            raise ValueError(
                f"the state has the fixed coefficient {found}, this controller {before}; set it to {found}"
            )


class AdaptiveKLController(KLController):
    """Proportional control in log space (arXiv 1909.08593 §2.2): the KL of whole completions is held at `target`.

        error = clip(KL/target − 1, −0.2, 0.2),    coef ← coef·(1 + error·n_episodes/horizon)

    Args:
        init_coef: the first coefficient, positive.
        target: nats per completion: the KL to the reference *summed* over each completion, averaged over completions.
        horizon: completions after which an error of 0.2 has moved the coefficient by a factor of about exp(0.2).
    """

    def __init__(self, init_coef: float, target: float, horizon: float) -> None:
        _check_positive(init_coef=init_coef, target=target, horizon=horizon)
        super().__init__(init_coef)
        self.target, self.horizon = float(target), float(horizon)

    def _updated(self, kl: float, n_episodes: int) -> float:
        if not 0.2 * n_episodes < self.horizon:
            raise ValueError(
                f"n_episodes={n_episodes}: with horizon={self.horizon} one update could take the coefficient to 0 or "
                f"below; horizon must exceed {0.2 * n_episodes:g}"
            )
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return self._coef * (1 + error * n_episodes / self.horizon)


class PenaltyController(KLController):
    """PPO-penalty's rule (arXiv 1707.06347 §4): doubled when KL > 1.5·target, halved when KL < target/1.5.

    For `losses.ppo_penalty_loss(penalty_coef=…)`. The KL is that of a policy update, KL(π_old‖π), averaged over
    *tokens*: the loss's metric `approx_kl_k3`, at the end of the update. n_episodes does not enter.

    Args:
        init_coef: the first coefficient, positive.
        target: nats per token.
    """

    def __init__(self, init_coef: float, target: float) -> None:
        _check_positive(init_coef=init_coef, target=target)
        super().__init__(init_coef)
        self.target = float(target)

    def _updated(self, kl: float, n_episodes: int) -> float:
        if kl > 1.5 * self.target:
            return self._coef * 2
        return self._coef / 2 if kl < self.target / 1.5 else self._coef


def _check_positive(**settings: float) -> None:
    for name, value in settings.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value}: it must be positive and finite")
