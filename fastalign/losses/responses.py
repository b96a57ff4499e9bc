"""The variants of the preference loss on single responses: functions of `Responses`, listed in `catalogue`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.losses.terms import Responses


def kto(responses: Responses) -> Tensor:
    assert responses.kl is not None
    gap = responses.options.beta * (responses.logratios - responses.kl)
    return responses.weighted(torch.sigmoid(-gap), torch.sigmoid(gap))


def bco(responses: Responses) -> Tensor:
    rewards = responses.options.beta * responses.logratios - responses.shift
    return responses.weighted(-F.logsigmoid(rewards), -F.logsigmoid(-rewards))


def apo_zero_unpaired(responses: Responses) -> Tensor:
    rewards = responses.options.beta * responses.logratios
    return responses.weighted(torch.sigmoid(-rewards), torch.sigmoid(rewards))
