"""RewardConfig: TRL's defaults, and every value that cannot be honoured is refused by name."""

import pytest

from fastalign.data import LABEL_TYPES
from fastalign.losses import LABEL_LOSSES
from fastalign.trainers.reward_config import RewardConfig


def config(tmp_path, **settings) -> RewardConfig:
    return RewardConfig(str(tmp_path), use_cpu=True, report_to="none", **settings)


def test_defaults_are_trls(tmp_path):
    args = config(tmp_path)
    assert args.learning_rate == 1e-4
    assert args.center_rewards_coefficient is None
    assert args.max_length == 1024
    assert args.disable_dropout
    assert args.logging_steps == 10


def test_every_type_of_label_has_a_loss():
    assert set(LABEL_TYPES) == set(LABEL_LOSSES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"center_rewards_coefficient": -0.1}, "center_rewards_coefficient=-0.1: it must be at least 0"),
        ({"center_rewards_coefficient": float("nan")}, "center_rewards_coefficient=nan"),
        ({"label_type": "real"}, "label_type='real': accepted are auto, scalar, binary"),
        ({"normalize_rewards": "std"}, "normalize_rewards='std': accepted are none, mean, mean_std"),
        ({"freeze_backbone": True, "use_peft": True}, "choose one"),
        ({"reward_reference_name": "x"}, "reward_reference_name='x' has no effect without normalize_rewards"),
        ({"normalize_rewards": "mean", "reward_reference_split": "test"}, "'test' of no data set: name one"),
        ({"reward_reference_samples": 0}, "reward_reference_samples=0: it must be at least 1"),
        ({"chat_template_path": "x.jinja"}, "chat_template_path='x.jinja' is not supported yet; .* Set tokenizer"),
        ({"eos_token": "</s>"}, "Set tokenizer.eos_token"),
        ({"backend": "torch"}, "A scalar head has no row kernels"),
        ({"schedule": "streamed"}, "A scalar head has no schedule"),
        ({"workspace_mb": 16.0}, "A scalar head needs none"),
        ({"router_aux_loss_coef": 0.1}, "no load-balancing loss"),
    ],
)
def test_what_cannot_be_honoured_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)
