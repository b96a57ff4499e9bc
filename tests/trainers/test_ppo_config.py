"""PPOConfig: defaults, what follows from the settings, names of TRL's."""

import pytest

from fastalign.losses.policy_options import POLICY_LOSSES
from fastalign.trainers import PPOConfig


def test_defaults_are_trls_and_the_papers(kit):
    config = PPOConfig(output_dir=str(kit.folder), use_cpu=True)
    assert (config.num_ppo_epochs, config.num_mini_batches, config.kl_coef) == (4, 1, 0.05)
    assert (config.cliprange, config.cliprange_value, config.vf_coef) == (0.2, 0.2, 0.1)
    assert (config.gamma, config.lam, config.kl_estimator) == (1.0, 0.95, "k1")
    assert config.adam_epsilon == 1e-5  # arXiv 2403.17031
    assert (config.temperature, config.top_k, config.top_p) == (1.0, 0, 1.0)


def test_sizes_of_a_phase(kit):
    config = kit.ppo_config(
        per_device_train_batch_size=4, gradient_accumulation_steps=3, num_mini_batches=2, num_generations=6
    )
    assert (config.mini_batch_size, config.rollout_batch_size, config.prompts_per_phase) == (12, 24, 4)


PRESETS = {  # advantages, scaled, level, aggregation, clip range, KL in the rewards and in the loss
    "ppo": ("gae", True, "token", "token_mean", (0.2, 0.2), (0.05, 0.0)),
    "rloo": ("rloo", True, "token", "sequence_sum", (0.2, 0.2), (0.05, 0.0)),
    "grpo": ("group", True, "token", "sequence_mean", (0.2, 0.2), (0.0, 0.04)),
    "dr_grpo": ("group", False, "token", "constant", (0.2, 0.2), (0.0, 0.0)),
    "dapo": ("group", True, "token", "token_mean", (0.2, 0.28), (0.0, 0.0)),
    "gspo": ("group", True, "sequence", "sequence_mean", (3e-4, 4e-4), (0.0, 0.0)),
    "cispo": ("group", True, "token", "token_mean", (1.0, 4.0), (0.0, 0.0)),
}


def of_method(config):
    return (
        config.advantage_estimator, config.scale_rewards, config.importance_sampling_level, config.loss_aggregation,
        (config.cliprange, config.epsilon_high), (config.kl_coef, config.kl_loss_coef),
    )  # fmt: skip


@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_a_loss_type_sets_what_its_paper_says(kit, loss_type):
    groups = {} if loss_type == "ppo" else {"num_generations": 2}
    config = kit.ppo_config(loss_type=loss_type, **groups)
    assert of_method(config) == PRESETS[loss_type]
    assert config.max_completion_length == (6 if loss_type == "dr_grpo" else None)
    assert config.needs_reference is (loss_type in ("ppo", "rloo", "grpo"))


def test_what_is_given_takes_the_place_of_a_loss_types_own(kit):
    config = kit.ppo_config(
        loss_type="gspo", num_generations=2, cliprange=0.1, loss_aggregation="constant", advantage_estimator="rloo",
        kl_coef=0.1, importance_sampling_level="sequence_token",
    )  # fmt: skip
    assert of_method(config) == ("rloo", True, "sequence_token", "constant", (0.1, 4e-4), (0.1, 0.0))
    assert kit.ppo_config(cliprange=0.1).epsilon_high == 0.1
    assert kit.ppo_config(loss_type="grpo", num_generations=2, kl_loss_coef=0.0).needs_reference is False
    plain = kit.ppo_config(loss_type="dr_grpo", num_generations=2, scale_rewards=True)
    assert plain.scale_rewards is True


def test_the_help_names_the_defaults_of_every_loss_type():
    fields = PPOConfig.__dataclass_fields__
    assert (
        fields["loss_aggregation"]
        .metadata["help"]
        .endswith("By default sequence_sum in rloo; constant in dr_grpo; sequence_mean in grpo, gspo; else token_mean.")
    )
    assert "0.28 in dapo, 0.0004 in gspo, 4 in cispo, else cliprange" in fields["cliprange_high"].metadata["help"]
    assert fields["loss_type"].metadata["choices"] == tuple(POLICY_LOSSES)


@pytest.mark.parametrize(
    ("settings", "whitens"),
    [
        ({}, True),
        ({"advantage_estimator": "reinforce"}, True),
        ({"advantage_estimator": "group", "num_generations": 2}, False),
        ({"advantage_estimator": "rloo", "num_generations": 2}, False),
        ({"advantage_estimator": "rloo", "num_generations": 2, "whiten_advantages": True}, True),
        ({"whiten_advantages": False}, False),
    ],
    ids=str,
)
def test_which_advantages_are_whitened(kit, settings, whitens):
    assert kit.ppo_config(**settings).whitens_advantages is whitens


def test_what_follows_from_other_fields(kit):
    assert kit.ppo_config().epsilon_high == 0.2
    assert kit.ppo_config(cliprange_high=0.3).epsilon_high == 0.3
    assert kit.ppo_config().max_completion_length is None
    assert kit.ppo_config(loss_aggregation="constant").max_completion_length == 6
    assert not kit.ppo_config(kl_coef=0.0).needs_reference
    assert kit.ppo_config(kl_coef=0.0, kl_loss_coef=0.1).needs_reference
    assert kit.ppo_config(sft_model_path="m").model_name_or_path == "m"
    assert kit.ppo_config(reward_model_path="r", reward_funcs="a:b").reward_model_path == ["r"]
    assert kit.ppo_config(reward_funcs="a:b").reward_funcs == ["a:b"]


def test_another_estimator_than_k1_in_the_rewards_is_spoken_of(kit, caplog):
    kit.ppo_config(kl_estimator="k1")
    assert "kl_estimator" not in caplog.text
    kit.ppo_config(kl_estimator="k3")
    assert "kl_estimator=k3: in a reward" in caplog.text
