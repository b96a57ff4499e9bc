"""Options of a policy loss: what a loss_type stands for, what takes its place, and what is refused."""

from __future__ import annotations

import pytest
import torch

from fastalign.losses import ppo_loss
from fastalign.losses.policy_options import POLICY_LOSSES, PolicyOptions, check_policy_options


@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_what_is_not_given_is_the_variants_own(loss_type):
    own = POLICY_LOSSES[loss_type]
    constant = {"max_completion_length": 9} if own.aggregation == "constant" else {}
    options = check_policy_options(loss_type=loss_type, **constant)
    for name in ("objective", "importance_sampling_level", "aggregation", "epsilon_low", "epsilon_high"):
        assert getattr(options, name) == getattr(own, name)
    assert own.source
    assert own.formula
    given = {
        "aggregation": "sequence_sum",
        "epsilon_low": 0.0,
        "epsilon_high": 0.0,
        "importance_sampling_level": "token",
    }
    options = check_policy_options(loss_type=loss_type, **given)
    assert {name: getattr(options, name) for name in given} == given


def test_the_defaults_are_ppos():
    assert check_policy_options() == PolicyOptions()


REFUSED = {
    "loss_type='dpo': accepted are 'ppo', 'rloo', 'grpo', 'dr_grpo', 'dapo', 'gspo', 'cispo'": {"loss_type": "dpo"},
    "importance_sampling_level='batch': accepted are 'token', 'sequence', 'sequence_token'": {
        "importance_sampling_level": "batch"
    },
    "importance_sampling_level=''": {"importance_sampling_level": ""},
    "loss_type='cispo' does not take dual_clip \\(given 3.0\\)": {"loss_type": "cispo", "dual_clip": 3.0},
    "take 'sequence' or 'token'": {"loss_type": "cispo", "importance_sampling_level": "sequence_token"},
    "that of loss_type='dr_grpo'\\): give both or neither": {"loss_type": "dr_grpo"},
    "give both or neither": {"loss_type": "grpo", "max_completion_length": 3},
    "max_completion_length=0": {"loss_type": "dr_grpo", "max_completion_length": 0},
    "epsilon_low=1.5": {"loss_type": "cispo", "epsilon_low": 1.5},
    "epsilon_high=-1": {"loss_type": "cispo", "epsilon_high": -1},
    "sampler_correction='clip': accepted are 'token_truncate'": {"sampler_correction": "clip"},
    "sampler_cap=0.5": {"sampler_cap": 0.5, "sampler_logps": torch.zeros(3, 6)},
    "sampler_cap=3.0 have no effect without sampler_logps": {"sampler_cap": 3.0},
    r"sampler_logps: shape \(2, 6\)": {"sampler_logps": torch.zeros(2, 6)},
    "sampler_logps requires grad": {"sampler_logps": torch.zeros(3, 6, requires_grad=True)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message):
    arguments = {name: torch.zeros(3, 6) for name in ("logps", "old_logps", "advantages")} | REFUSED[message]
    with pytest.raises(ValueError, match=message):
        ppo_loss(**arguments)
