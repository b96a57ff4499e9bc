"""The variants of the policy loss, the one list of them, and what can be asked of each.

Notation, at token t of a sampled sequence y with advantage A_t:

    ρ_t = exp(logps_t − old_logps_t),    s = exp(mean over y of logps − old_logps),    sg(·) without a gradient

A variant is an objective, a level at which the ratio is taken, an aggregation and a clip range. `POLICY_LOSSES` names
the combinations of the field; each part can be given beside `loss_type` and then takes the place of the variant's own.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "constant")

IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence", "sequence_token")
"""Whose ratio weighs a token: its own, ρ_t; its sequence's, s; or s with the gradient of ρ_t (GSPO-token)."""

KL_ESTIMATORS = {
    "k1": lambda d: d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: torch.expm1(-d) + d,
}
"""Estimators of KL(π‖π_ref) from d = logps − ref_logps at a token sampled from π (J. Schulman 2020); k3 is never
negative."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """A variant: the options that make up the method of its paper.

    objective: "clip", min(ρA, clip(ρ)·A), or "cispo", sg(clip(ρ))·A·logps. epsilon_low, epsilon_high: ρ is clipped to
    [1 − epsilon_low, 1 + epsilon_high] in both. The last four are what `PPOTrainer` takes unless told otherwise: a loss
    is given advantages and coefficients.
    """

    formula: str  # of a token, or with 1/|y| Σ of a sequence
    source: str
    objective: str = "clip"
    importance_sampling_level: str = "token"
    aggregation: str = "token_mean"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    advantage_estimator: str = "group"
    scale_rewards: bool = True
    kl_coef: float = 0.0
    kl_loss_coef: float = 0.0


_CLIP = "−min(ρA, clip(ρ, 1 − ε_low, 1 + ε_high)·A)"

POLICY_LOSSES: dict[str, PolicyLoss] = {
    "ppo": PolicyLoss(
        formula=_CLIP,
        source="PPO, arXiv 1707.06347 eq. 7, averaged over tokens",
        advantage_estimator="gae",
        kl_coef=0.05,
    ),
    "rloo": PolicyLoss(
        formula=_CLIP + ", summed over the sequence; at old_logps its gradient is that of −A·log π(y)",
        source="REINFORCE leave-one-out, arXiv 2402.14740, with PPO's clip for further passes",
        aggregation="sequence_sum",
        advantage_estimator="rloo",
        kl_coef=0.05,
    ),
    "grpo": PolicyLoss(
        formula=_CLIP + ", averaged over each sequence, then over sequences",
        source="GRPO, arXiv 2402.03300, its KL in the loss",
        aggregation="sequence_mean",
        kl_loss_coef=0.04,
    ),
    "dr_grpo": PolicyLoss(
        formula=_CLIP + ", summed, over sequences × max_completion_length",
        source="Dr. GRPO, arXiv 2503.20783: neither the length of an answer nor the spread of a group scales it",
        aggregation="constant",
        scale_rewards=False,
    ),
    "dapo": PolicyLoss(
        formula=_CLIP + " with ε_high > ε_low, averaged over tokens",
        source="DAPO, arXiv 2503.14476: clip-higher and token-level mean",
        epsilon_high=0.28,
    ),
    "gspo": PolicyLoss(
        formula="−min(sA, clip(s, 1 − ε_low, 1 + ε_high)·A), s = exp(1/|y| Σ_t (logps − old_logps))",
        source="GSPO, arXiv 2507.18071; importance_sampling_level='sequence_token' is its GSPO-token",
        importance_sampling_level="sequence",
        aggregation="sequence_mean",
        epsilon_low=3e-4,
        epsilon_high=4e-4,
    ),
    "cispo": PolicyLoss(
        formula="−sg(clip(ρ, 1 − ε_low, 1 + ε_high))·A·logps, averaged over tokens; ε_low = 1: no lower side",
        source="CISPO, MiniMax-M1, arXiv 2506.13585, without a lower bound; the cap 1 + ε_high = 5 of arXiv 2510.13786",
        objective="cispo",
        epsilon_low=1.0,
        epsilon_high=4.0,
    ),
}
"""`loss_type` -> variant. Config choices, error messages, documentation and the test grid are made from this dict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOptions:
    """The options of a policy loss, checked, with the variant's own where none were given."""

    objective: str = "clip"
    importance_sampling_level: str = "token"
    aggregation: str = "token_mean"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float | None = None
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    max_completion_length: int | None = None

    @property
    def by_sequence(self) -> bool:
        """Whether the loss of a token depends on the other log-probs of its sequence."""
        return self.importance_sampling_level != "token"


def check_policy_options(
    *,
    loss_type: str = "ppo",
    importance_sampling_level: str | None = None,
    epsilon_low: float | None = None,
    epsilon_high: float | None = None,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    aggregation: str | None = None,
    max_completion_length: int | None = None,
    has_reference: bool = True,
    has_entropy: bool = True,
) -> PolicyOptions:
    """The options of `ppo_loss`, with `loss_type`'s own in place of None.

    Raises ValueError for one that cannot be honoured, naming it.
    """
    _check_choice("loss_type", loss_type, POLICY_LOSSES)
    variant = POLICY_LOSSES[loss_type]
    options = PolicyOptions(
        objective=variant.objective,
        importance_sampling_level=_given(importance_sampling_level, variant.importance_sampling_level),
        aggregation=_given(aggregation, variant.aggregation),
        epsilon_low=_given(epsilon_low, variant.epsilon_low),
        epsilon_high=_given(epsilon_high, variant.epsilon_high),
        dual_clip=dual_clip,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        entropy_coef=entropy_coef,
        max_completion_length=max_completion_length,
    )
    _check_choice("importance_sampling_level", options.importance_sampling_level, IMPORTANCE_SAMPLING_LEVELS)
    _check_choice("kl_estimator", kl_estimator, KL_ESTIMATORS)
    _check_choice("aggregation", options.aggregation, AGGREGATIONS)
    _check_clip(options, loss_type)
    for name, value in (("kl_coef", kl_coef), ("entropy_coef", entropy_coef)):
        if not math.isfinite(value):
            raise ValueError(f"{name}={value}: it must be finite")
    if (max_completion_length is not None) != (options.aggregation == "constant"):
        raise ValueError(
            "max_completion_length is the constant of aggregation='constant' (that of loss_type='dr_grpo'): give both "
            "or neither"
        )
    if max_completion_length is not None and max_completion_length < 1:
        raise ValueError(f"max_completion_length={max_completion_length}: it must be at least 1")
    if kl_coef and not has_reference:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logps, the reference's log-probs of the same tokens")
    if entropy_coef and not has_entropy:
        raise ValueError(f"entropy_coef={entropy_coef} needs entropy, of logps' shape")
    return options


def _given(value: T | None, own: T) -> T:
    return own if value is None else value


def _check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: accepted are {', '.join(map(repr, choices))}")


def _check_clip(options: PolicyOptions, loss_type: str) -> None:
    if not 0 <= options.epsilon_low <= 1:
        raise ValueError(
            f"epsilon_low={options.epsilon_low}: the ratio is clipped at 1 − epsilon_low, so it must be in [0, 1]"
        )
    if not options.epsilon_high >= 0:
        raise ValueError(
            f"epsilon_high={options.epsilon_high}: the ratio is clipped at 1 + epsilon_high, so it must be at least 0"
        )
    dual_clip = options.dual_clip
    if dual_clip is not None and not 1 < dual_clip < math.inf:
        raise ValueError(
            f"dual_clip={dual_clip}: it bounds the ratio where the advantage is negative and must exceed 1"
        )
    if options.objective != "cispo":
        return
    if dual_clip is not None:
        able = ", ".join(repr(name) for name, entry in POLICY_LOSSES.items() if entry.objective == "clip")
        raise ValueError(
            f"loss_type={loss_type!r} does not take dual_clip (given {dual_clip}): its weights are capped for either "
            f"sign of the advantage; {able} do"
        )
    if options.importance_sampling_level == "sequence_token":
        raise ValueError(
            f"importance_sampling_level='sequence_token' is 'sequence' with another gradient of the ratio, and "
            f"loss_type={loss_type!r} has none; take 'sequence' or 'token'"
        )
