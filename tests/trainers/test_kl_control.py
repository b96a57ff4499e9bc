"""KL controllers against sequences worked out by hand, what they carry in a checkpoint, and what they refuse."""

from __future__ import annotations

import json
import math

import pytest

from fastalign.losses import ppo_penalty_loss
from fastalign.trainers.kl_control import AdaptiveKLController, FixedKLController, PenaltyController


def run(controller, kls, n_episodes):
    coefs = []
    for kl in kls:
        controller.update(kl, n_episodes)
        coefs.append(controller.coef)
    return coefs


def test_fixed():
    assert run(FixedKLController(0.05), [0.0, 100.0, -3.0], 8) == [0.05] * 3
    assert FixedKLController(0).coef == 0


def test_adaptive_by_hand():
    """init 0.2, target 6, horizon 1000, 100 episodes: a step is error/10, and the error is clipped at ±0.2.

    KL 6: error 0.     6.6: error 0.1, ×1.01.    60: clipped to 0.2, ×1.02.    5.4: error −0.1, ×0.99.
    KL 0 and KL −2 (an estimate may be negative): clipped to −0.2, ×0.98.
    """
    coefs = run(AdaptiveKLController(0.2, target=6, horizon=1000), [6.0, 6.6, 60.0, 5.4, 0.0, -2.0], 100)
    expected = [0.2, 0.202, 0.20604, 0.2039796, 0.199900008, 0.19590200784]
    assert coefs == pytest.approx(expected, rel=1e-12)


def test_the_horizon_is_counted_in_episodes():
    """KL at twice the target: over a horizon of episodes the coefficient grows by exp(0.2), however they are split."""
    for n in (1, 10, 50):
        controller = AdaptiveKLController(1.0, target=3, horizon=1000)
        run(controller, [6.0] * (1000 // n), n)
        assert controller.coef == pytest.approx(math.exp(0.2), rel=2e-3)


def test_adaptive_holds_a_policy_at_its_target():
    """A policy whose KL answers to the coefficient as 1/coef² (that of a Gaussian reward): it settles at the target."""
    controller = AdaptiveKLController(0.01, target=5.0, horizon=500)
    for _ in range(400):
        controller.update(min(2.0 / controller.coef**2, 1e6), 64)
    assert 2.0 / controller.coef**2 == pytest.approx(5.0, rel=1e-3)


def test_penalty_by_hand():
    """Target 0.03: the band is 0.02 to 0.045, its ends included."""
    controller = PenaltyController(1.0, target=0.03)
    kls = [0.03, 0.046, 0.1, 0.045, 0.0200001, 0.0199, 0.0, -0.01, 0.03]
    assert run(controller, kls, 1) == [1.0, 2.0, 4.0, 4.0, 4.0, 2.0, 1.0, 0.5, 0.5]


def test_the_penalty_takes_the_coefficient():
    import torch

    controller = PenaltyController(3.0, target=0.01)
    logps = torch.tensor([[0.0, 0.1]])
    out = ppo_penalty_loss(logps, torch.zeros(1, 2), torch.zeros(1, 2), penalty_coef=controller.coef)
    kl = float(out.metrics["approx_kl_k3"].value)
    assert float(out.loss) == pytest.approx(3.0 * kl)
    controller.update(kl, 1)
    assert controller.coef == 1.5  # exp(0.1) − 1.1 = 0.0052, halved over two tokens: below 0.0067


CONTROLLERS = {
    "fixed": lambda: FixedKLController(0.05),
    "adaptive": lambda: AdaptiveKLController(0.05, 6.0, 100),
    "penalty": lambda: PenaltyController(0.05, 6.0),
}


@pytest.mark.parametrize("make", CONTROLLERS.values(), ids=CONTROLLERS)
def test_resumes_to_the_bit_through_json(make):
    whole, resumed = make(), make()
    run(whole, [1.0, 3.7, 11.3], 7)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert run(whole, [2.2, 9.0], 7) == run(resumed, [2.2, 9.0], 7)


@pytest.mark.parametrize("make", CONTROLLERS.values(), ids=CONTROLLERS)
@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
def test_a_kl_that_is_not_finite_is_named_and_changes_nothing(make, kl):
    controller = make()
    with pytest.raises(ValueError, match=f"kl={kl}: the measured KL is not finite; the coefficient stays 0.05"):
        controller.update(kl, 4)
    assert controller.coef == 0.05


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FixedKLController(-0.1), "coef=-0.1"),
        (lambda: FixedKLController(math.nan), "coef=nan"),
        (lambda: AdaptiveKLController(0.0, 6, 100), "init_coef=0.0: it must be positive"),
        (lambda: AdaptiveKLController(0.1, -6, 100), "target=-6: it must be positive"),
        (lambda: AdaptiveKLController(0.1, 6, math.inf), "horizon=inf: it must be positive and finite"),
        (lambda: PenaltyController(0.1, 0), "target=0"),
        (lambda: PenaltyController(0.1, 1).update(1.0, 0), "n_episodes=0: it must be at least 1"),
        (lambda: AdaptiveKLController(0.1, 6, 100).update(1.0, 500), "horizon must exceed 100"),
        (lambda: FixedKLController(0.1).load_state_dict(PenaltyController(0.1, 1).state_dict()), "'PenaltyController'"),
        (lambda: PenaltyController(0.1, 1).load_state_dict({"coef": 0.1}), "that of None, accepted is 'PenaltyCon"),
        (
            lambda: PenaltyController(0.1, 1).load_state_dict({"controller": "PenaltyController", "coef": "0.1"}),
            "state coef='0.1'",
        ),
        (
            lambda: FixedKLController(0.1).load_state_dict(FixedKLController(0.2).state_dict()),
            "the fixed coefficient 0.2, this controller 0.1; set it to 0.2",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
