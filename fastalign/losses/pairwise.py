"""The variants of the preference loss on pairs: functions of `Pairs`, listed in `catalogue`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.losses.terms import MAX_EXPONENT, Pairs, log_odds


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    if not label_smoothing:
        return -F.logsigmoid(logits)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


# ---- functions of the reward difference


def sigmoid(pairs: Pairs) -> Tensor:
    return _smoothed(pairs.logits(), pairs.options.label_smoothing)


def robust(pairs: Pairs) -> Tensor:
    logits, eps = pairs.logits(), pairs.options.label_smoothing
    losses = -(1 - eps) * F.logsigmoid(logits) + eps * F.logsigmoid(-logits)
    return losses / (1 - 2 * eps)


def hinge(pairs: Pairs) -> Tensor:
    return torch.relu(1 - pairs.logits())


def exo_pair(pairs: Pairs) -> Tensor:
    logits, eps = pairs.logits(), pairs.options.label_smoothing
    chosen = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-eps))
    return chosen + torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(eps))


def discopop(pairs: Pairs) -> Tensor:
    logits, tau = pairs.logits(), pairs.options.discopop_tau
    # m·exp(−z) as one exponential: where exp(−z) overflows, m has long vanished
    exponent = (F.logsigmoid(logits / tau) - logits).clamp(max=MAX_EXPONENT)
    return -torch.sigmoid(-logits / tau) * F.logsigmoid(logits) + torch.exp(exponent)


def ipo(pairs: Pairs) -> Tensor:
    chosen, rejected = pairs.per_token(*pairs.scores())
    return (chosen - rejected - 1 / (2 * pairs.options.beta)).square()


def sigmoid_norm(pairs: Pairs) -> Tensor:
    chosen, rejected = pairs.per_token(*pairs.scores())
    return -F.logsigmoid(pairs.options.beta * (chosen - rejected))


# ---- functions of the two rewards


def nca_pair(pairs: Pairs) -> Tensor:
    chosen, rejected = pairs.rewards()
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(pairs: Pairs) -> Tensor:
    chosen, rejected = pairs.rewards()
    return -F.logsigmoid(chosen - pairs.shift) - F.logsigmoid(pairs.shift - rejected)


def sppo_hard(pairs: Pairs) -> Tensor:
    target = 0.5 / pairs.options.beta
    return (pairs.chosen - target).square() + (pairs.rejected + target).square()


def apo_zero(pairs: Pairs) -> Tensor:
    chosen, rejected = pairs.rewards()
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(pairs: Pairs) -> Tensor:
    chosen, rejected = pairs.rewards()
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


# ---- functions of the whole batch: the k-th loss is of the k-th smallest values, not of the k-th pair


def aot(pairs: Pairs) -> Tensor:
    assert pairs.ref_logps is not None
    policy, reference = torch.sub(*pairs.weighted_logps), torch.sub(*pairs.ref_logps)
    difference = policy.sort().values - reference.sort().values
    return _smoothed(pairs.options.beta * difference, pairs.options.label_smoothing)


def aot_unpaired(pairs: Pairs) -> Tensor:
    difference = pairs.chosen.sort().values - pairs.rejected.sort().values
    return _smoothed(pairs.options.beta * difference, pairs.options.label_smoothing)


# ---- without a reference


def sft(pairs: Pairs) -> Tensor:
    return -pairs.chosen_logps * pairs.sft_scale


def simpo(pairs: Pairs) -> Tensor:
    options = pairs.options
    chosen, rejected = pairs.mean_logps()
    return _smoothed(options.beta * (chosen - rejected) - options.simpo_gamma, options.label_smoothing)


def orpo(pairs: Pairs) -> Tensor:
    chosen, rejected = pairs.mean_logps()
    return -chosen - pairs.options.beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def cpo(pairs: Pairs) -> Tensor:
    options = pairs.options
    logits = options.beta * (pairs.chosen_logps - pairs.rejected_logps)
    return _smoothed(logits, options.label_smoothing) - options.cpo_alpha * pairs.mean_logps()[0]
