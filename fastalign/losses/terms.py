"""What a preference loss may look at: its options, and the log-probs of pairs or of single responses.

Notation, for one pair (w chosen, l rejected), log-probs summed over the completion's tokens:

    s_w = logps_w − ref_logps_w,   s_l likewise,   |y| = completion tokens, end-of-sequence included

With `ld_alpha` the sums in s weigh the tokens beyond min(|y_w|, |y_l|) by it. f is the derivative of the f-divergence
(`F_DIVERGENCES`), s itself by default, and β·s the implicit reward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_EXPONENT = 40.0
"""Exponents of log-ratios are clamped here: e⁴⁰ is out of reach for any run that works, and its square a float32."""


class DPOOptions(NamedTuple):
    """The options of the preference losses with their defaults. What each means stands in `dpo_loss`, `kto_loss`."""

    beta: float = 0.1
    loss_type: str | Sequence[str] = "sigmoid"
    loss_weights: Sequence[float] | None = None
    label_smoothing: float = 0.0
    length_alpha: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    ld_alpha: float | None = None
    use_weighting: bool = False
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @property
    def loss_types(self) -> tuple[str, ...]:
        """`loss_type` as a tuple, whichever way it was given."""
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)


def _alpha_divergence(s: Tensor, coef: float) -> Tensor:
    if coef == 1.0:
        return s
    return torch.expm1(((coef - 1) * s).clamp(max=MAX_EXPONENT)) / (coef - 1)


F_DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda s, coef: s,
    "forward_kl": lambda s, coef: -torch.expm1((-s).clamp(max=MAX_EXPONENT)),
    "js_divergence": lambda s, coef: math.log(2) + F.logsigmoid(s),
    "alpha_divergence": _alpha_divergence,
}
"""`f_divergence_type` -> f(s, f_alpha_divergence_coef), 0 at s = 0 with slope 1 (js: ½): what s is replaced by.

    reverse_kl  s      forward_kl  1 − exp(−s)      js_divergence  log 2 + log σ(s)
    alpha_divergence  (exp((a − 1)s) − 1)/(a − 1),  its limit s at a = 1;  a = 0 is forward_kl
"""


class Pairs(NamedTuple):
    """What a variant on pairs may look at, each (P,), float32 or float64."""

    chosen_logps: Tensor  # sums over all tokens
    rejected_logps: Tensor
    weighted_logps: tuple[Tensor, Tensor]  # the same, as they enter s
    ref_logps: tuple[Tensor, Tensor] | None  # likewise
    chosen: Tensor  # s_w
    rejected: Tensor  # s_l
    chosen_lengths: Tensor | None  # |y_w|
    rejected_lengths: Tensor | None  # |y_l|
    options: DPOOptions
    shift: float | Tensor = 0.0  # δ of bco_pair
    sft_scale: float | Tensor = 0.0  # pairs over chosen tokens, of the whole batch

    def scores(self) -> tuple[Tensor, Tensor]:
        """f(s_w), f(s_l)"""
        f, coef = F_DIVERGENCES[self.options.f_divergence_type], self.options.f_alpha_divergence_coef
        return f(self.chosen, coef), f(self.rejected, coef)

    def logits(self) -> Tensor:
        """z = β(f(s_w) − f(s_l)) + α(|y_w| − |y_l|), the log-odds that the chosen response is the better one."""
        chosen, rejected = self.scores()
        logits = self.options.beta * (chosen - rejected)
        if self.options.length_alpha:  # α = 0 is DPO to the bit
            n_chosen, n_rejected = self.lengths()
            logits = logits + self.options.length_alpha * (n_chosen - n_rejected)
        return logits

    def rewards(self) -> tuple[Tensor, Tensor]:
        """βs_w, βs_l"""
        return self.options.beta * self.chosen, self.options.beta * self.rejected

    def lengths(self) -> tuple[Tensor, Tensor]:
        assert self.chosen_lengths is not None
        assert self.rejected_lengths is not None
        return self.chosen_lengths, self.rejected_lengths

    def per_token(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        """Both over their lengths. An empty response has the sum 0 and counts as 0."""
        n_chosen, n_rejected = self.lengths()
        return chosen / n_chosen.clamp(min=1), rejected / n_rejected.clamp(min=1)

    def mean_logps(self) -> tuple[Tensor, Tensor]:
        """m_w, m_l: mean log-probs of the policy."""
        return self.per_token(self.chosen_logps, self.rejected_logps)


class Responses(NamedTuple):
    """What a variant on single responses may look at, each (S,), float32 or float64."""

    logratios: Tensor  # s
    labels: Tensor  # bool, True = desirable
    kl: Tensor | None  # z₀, 0-dim, detached, at least 0
    shift: float | Tensor  # δ
    options: DPOOptions

    def weighted(self, desirable: Tensor, undesirable: Tensor) -> Tensor:
        """Each response's own loss, times the weight of its kind."""
        options = self.options
        return torch.where(self.labels, options.desirable_weight * desirable, options.undesirable_weight * undesirable)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − eˣ) for x < 0 without cancellation at either end (M. Mächler, 2012)."""
    near = x > -math.log(2)
    close, far = torch.where(near, x, -1.0), torch.where(near, -1.0, x)
    return torch.where(near, torch.log(-torch.expm1(close)), torch.log1p(-torch.exp(far)))


def log_odds(mean_logps: Tensor) -> Tensor:
    """log(p/(1 − p)) of p = e^m: m − log(1 − eᵐ).

    A certain response (m = 0 up to rounding) has the odds of one whose probability is the largest float below 1.
    """
    m = mean_logps.clamp(max=-torch.finfo(mean_logps.dtype).eps)
    return m - log1mexp(m)
