"""What a run carries: built by the config, saved as JSON, restored to the bit, never into another run."""

import json

import pytest
import torch

from fastalign.trainers.kl_control import AdaptiveKLController, FixedKLController, PenaltyController
from fastalign.trainers.ppo_state import PPOState

FULL = {
    "kl_controller": "adaptive", "target_kl": 2.0, "kl_horizon": 100, "policy_loss": "penalty",
    "normalize_scores": True,
}  # fmt: skip


def test_what_a_config_asks_for(kit):
    plain = PPOState(kit.ppo_config())
    assert type(plain.kl) is type(plain.penalty) is FixedKLController
    assert plain.moments is None
    assert not plain.follows_kl
    assert not plain.follows_penalty
    assert plain.coefficients() == {"objective/kl_coef": 0.05}
    full = PPOState(kit.ppo_config(**FULL))
    assert isinstance(full.kl, AdaptiveKLController)
    assert (full.kl.target, full.kl.horizon) == (2.0, 100)
    assert isinstance(full.penalty, PenaltyController)
    assert full.follows_kl
    assert full.follows_penalty
    assert full.coefficients() == {"objective/kl_coef": 0.05, "policy/penalty_coef": 1.0}


def test_it_comes_back_from_json(kit):
    state, again = PPOState(kit.ppo_config(**FULL)), PPOState(kit.ppo_config(**FULL))
    state.kl.update(3.1, 7)
    state.penalty.update(1.0, 7)
    state.moments.update(torch.tensor([0.1, 0.7, -3.0]))
    state.episodes = 7
    again.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert again.state_dict() == state.state_dict()
    assert again.coefficients() == state.coefficients()
    assert again.episodes == 7
    assert again.kl.coef != 0.05
    assert again.penalty.coef == 2.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "normalize_scores=False, and the checkpoint is of a run with True"),
        ({"normalize_scores": True}, "'AdaptiveKLController', accepted is 'FixedKLController'"),
        (FULL | {"policy_loss": "clip"}, "'PenaltyController', accepted is 'FixedKLController'"),
    ],
    ids=["moments", "controller", "penalty"],
)
def test_another_run_is_refused(kit, settings, message):
    state = PPOState(kit.ppo_config(**FULL)).state_dict()
    with pytest.raises(ValueError, match=message):
        PPOState(kit.ppo_config(**settings)).load_state_dict(state)
