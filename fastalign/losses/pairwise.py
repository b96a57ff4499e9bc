"""The variants of the pairwise preference loss, and the one list of them.

Notation, for one pair (w chosen, l rejected), log-probs summed over the completion's tokens:

    s_w = logps_w − ref_logps_w,   s_l likewise,   Δ = s_w − s_l,   |y| = completion tokens, end-of-sequence included

β·s is the implicit reward. A new variant is a function of `Pairs` and an entry of `DPO_LOSSES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pairs(NamedTuple):
    """What a variant may look at, each (P,), float32 or float64."""

    chosen: Tensor  # s_w
    rejected: Tensor  # s_l
    chosen_lengths: Tensor | None  # |y_w|
    rejected_lengths: Tensor | None  # |y_l|
    length_alpha: float

    def logits(self, beta: float) -> Tensor:
        """βΔ + α(|y_w| − |y_l|), the log-odds that the chosen response is the better one."""
        logits = beta * (self.chosen - self.rejected)
        if self.length_alpha:  # α = 0 is DPO to the bit
            assert self.chosen_lengths is not None
            assert self.rejected_lengths is not None
            logits = logits + self.length_alpha * (self.chosen_lengths - self.rejected_lengths)
        return logits

    def mean_difference(self) -> Tensor:
        """s_w/|y_w| − s_l/|y_l|. An empty response has s = 0 and counts as 0."""
        assert self.chosen_lengths is not None
        assert self.rejected_lengths is not None
        return self.chosen / self.chosen_lengths.clamp(min=1) - self.rejected / self.rejected_lengths.clamp(min=1)


def _sigmoid(pairs: Pairs, beta: float, label_smoothing: float) -> Tensor:
    logits = pairs.logits(beta)
    if not label_smoothing:
        return -F.logsigmoid(logits)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def _robust(pairs: Pairs, beta: float, label_smoothing: float) -> Tensor:
    logits = pairs.logits(beta)
    losses = -(1 - label_smoothing) * F.logsigmoid(logits) + label_smoothing * F.logsigmoid(-logits)
    return losses / (1 - 2 * label_smoothing)


def _hinge(pairs: Pairs, beta: float, label_smoothing: float) -> Tensor:
    return torch.relu(1 - pairs.logits(beta))


def _ipo(pairs: Pairs, beta: float, label_smoothing: float) -> Tensor:
    return (pairs.mean_difference() - 1 / (2 * beta)).square()


def _sigmoid_norm(pairs: Pairs, beta: float, label_smoothing: float) -> Tensor:
    return -F.logsigmoid(beta * pairs.mean_difference())


@dataclass(frozen=True, slots=True, kw_only=True)
class DPOLoss:
    """A variant of the pairwise loss, and which options it honours; `dpo_loss` refuses the others.

    `accepts_length_alpha` holds where the loss is a function of the reward difference βΔ alone: there the implicit
    reward βs becomes βs + α|y| and nothing else changes.
    """

    fn: Callable[[Pairs, float, float], Tensor]  # (pairs, beta, label_smoothing) -> (P,)
    formula: str  # with z = βΔ + α(|y_w| − |y_l|) and ε = label_smoothing
    source: str
    needs_lengths: bool = False
    accepts_label_smoothing: bool = False
    accepts_length_alpha: bool = False


DPO_LOSSES: dict[str, DPOLoss] = {
    "sigmoid": DPOLoss(
        fn=_sigmoid,
        formula="−(1−ε)·log σ(z) − ε·log σ(−z)",
        source="DPO, arXiv 2305.18290 eq. 7; with ε cDPO, E. Mitchell 2023; with α R-DPO, arXiv 2403.19159 eq. 9",
        accepts_label_smoothing=True,
        accepts_length_alpha=True,
    ),
    "robust": DPOLoss(
        fn=_robust,
        formula="[−(1−ε)·log σ(z) + ε·log σ(−z)] / (1 − 2ε)",
        source="rDPO, arXiv 2403.00409",
        accepts_label_smoothing=True,
        accepts_length_alpha=True,
    ),
    "hinge": DPOLoss(
        fn=_hinge,
        formula="max(0, 1 − z)",
        source="SLiC-HF, arXiv 2305.10425, on DPO's rewards as in RSO, arXiv 2309.06657",
        accepts_length_alpha=True,
    ),
    "ipo": DPOLoss(
        fn=_ipo,
        formula="(s_w/|y_w| − s_l/|y_l| − 1/(2β))²",
        source="IPO, arXiv 2310.12036 eq. 17, averaged over the length as its authors confirmed",
        needs_lengths=True,
    ),
    "sigmoid_norm": DPOLoss(
        fn=_sigmoid_norm,
        formula="−log σ(β(s_w/|y_w| − s_l/|y_l|))",
        source="length-normalised DPO, Tülu 3, arXiv 2411.15124",
        needs_lengths=True,
    ),
}
"""`loss_type` -> variant. Config choices, error messages, documentation and the test grid are made from this dict."""


def check_dpo_options(
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    length_alpha: float = 0.0,
    has_lengths: bool = True,
) -> DPOLoss:
    """The variant called `loss_type`, or a ValueError that names the option it cannot honour."""
    if loss_type not in DPO_LOSSES:
        raise ValueError(f"loss_type={loss_type!r} is unknown: accepted are {', '.join(map(repr, DPO_LOSSES))}")
    variant = DPO_LOSSES[loss_type]
    if not 0 < beta < math.inf:
        raise ValueError(f"beta={beta}: it must be positive and finite")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}: the share of flipped preferences must be in [0, 0.5)")
    if not -math.inf < length_alpha < math.inf:
        raise ValueError(f"length_alpha={length_alpha}: it must be finite")
    for option, value in (("label_smoothing", label_smoothing), ("length_alpha", length_alpha)):
        if value and not getattr(variant, f"accepts_{option}"):
            able = ", ".join(repr(name) for name, entry in DPO_LOSSES.items() if getattr(entry, f"accepts_{option}"))
            raise ValueError(f"loss_type={loss_type!r} does not take {option} (given {value}): {able} do")
    if not has_lengths and (variant.needs_lengths or length_alpha):
        reason = f"loss_type={loss_type!r}" if variant.needs_lengths else f"length_alpha={length_alpha}"
        raise ValueError(f"{reason} needs chosen_lengths and rejected_lengths (P,), the numbers of completion tokens")
    return variant
