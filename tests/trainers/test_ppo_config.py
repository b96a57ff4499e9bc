"""PPOConfig: defaults, what follows from the settings, names of TRL's."""

import pytest

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
