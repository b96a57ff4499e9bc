"""A task that is learnt in seconds by every variant: one token is good, length costs."""

import numpy as np
import pytest

VARIANTS = {
    "gae": {},
    "value head": {"value_head": True},
    "group": {"advantage_estimator": "group", "num_generations": 4},
    "rloo": {"advantage_estimator": "rloo", "num_generations": 4},
    "reinforce": {"advantage_estimator": "reinforce"},
    "clip higher, KL in the loss": {"cliprange_high": 0.3, "kl_coef": 0.0, "kl_loss_coef": 0.01, "dual_clip": 3.0},
    "penalty": {"policy_loss": "penalty", "penalty_target": 0.1, "learning_rate": 0.01, "max_steps": 14},
    "trpo": {"policy_loss": "trpo", "advantage_estimator": "reinforce", "trpo_max_kl": 0.3, "num_ppo_epochs": 4},
    "trpo with a critic": {"policy_loss": "trpo", "trpo_max_kl": 0.3},
}


def learn(kit, **settings):
    defaults = {
        "max_steps": 8, "per_device_train_batch_size": 16, "num_ppo_epochs": 4, "learning_rate": 0.03,
        "kl_coef": 0.02, "response_length": 4,
    }  # fmt: skip
    model = kit.model(initializer_range=0.1, num_hidden_layers=1)
    if settings.get("policy_loss") == "trpo":
        model.set_attn_implementation("eager")
    trainer = kit.ppo(model, train=kit.prompts(64), **(defaults | settings))
    trainer.train()
    return kit.logs(trainer)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_score_rises(kit, settings):
    """From about −0.2, which is chance, towards 3.8: four times the good token."""
    logs = learn(kit, **settings)
    scores = [entry["objective/scores"] for entry in logs]
    assert abs(scores[0]) < 0.3
    assert scores[-1] > scores[0] + 0.6
    if settings.get("policy_loss") == "trpo":
        assert all(entry["policy/trpo_kl"] <= 0.3 for entry in logs)
        assert any(entry["policy/trpo_accepted"] for entry in logs)


def test_the_critic_learns_to_explain_returns(kit):
    logs = learn(kit, critic_learning_rate=0.01, critic_warmup_steps=6, max_steps=7, vf_coef=1.0, cliprange_value=None)
    assert logs[0]["val/explained_variance"] < 0.2
    assert logs[6]["val/explained_variance"] > logs[0]["val/explained_variance"] + 0.2
    assert logs[6]["objective/kl"] == pytest.approx(0, abs=1e-4)  # all the while the policy stayed as it was


def test_the_kl_controller_holds_its_target(kit):
    """Within a factor of two, from a coefficient that lets the KL run to five times the target at first."""
    logs = learn(
        kit, kl_controller="adaptive", target_kl=2.0, kl_horizon=150, kl_coef=0.2, max_steps=45, learning_rate=0.01,
        num_ppo_epochs=2,
    )  # fmt: skip
    kl = np.array([entry["objective/kl"] for entry in logs])
    assert kl.max() > 2 * 2.0
    assert 1.0 < kl[-12:].mean() < 4.0
    coefficients = [entry["objective/kl_coef"] for entry in logs]
    assert coefficients[-1] != 0.2
    assert logs[-1]["objective/scores"] > logs[0]["objective/scores"]
