"""Every refusal of PPOConfig names the field and what was given."""

import pytest

REFUSED = [
    ({"advantage_estimator": "vine"}, "advantage_estimator='vine': accepted are gae, group, rloo, reinforce"),
    ({"loss_type": "bnpo"}, "loss_type='bnpo': accepted are ppo, rloo, grpo, dr_grpo, dapo, gspo, cispo"),
    ({"loss_type": "grpo"}, "advantage_estimator='group' compares .* num_generations=1"),
    ({"importance_sampling_level": "batch"}, "importance_sampling_level='batch'"),
    ({"loss_type": "cispo", "num_generations": 2, "dual_clip": 3.0}, "loss_type='cispo' does not take dual_clip"),
    (
        {"loss_type": "cispo", "num_generations": 2, "importance_sampling_level": "sequence_token"},
        "take 'sequence' or 'token'",
    ),
    ({"sampler_correction": "clip"}, "sampler_correction='clip': accepted are 'token_truncate'"),
    ({"sampler_correction": "token_mask", "sampler_cap": 0.5}, "sampler_cap=0.5"),
    ({"overlong_buffer": 7}, "overlong_buffer=7: it must be positive and at most response_length=6"),
    ({"overlong_buffer": 0}, "overlong_buffer=0"),
    ({"overlong_buffer": 2, "overlong_penalty": -1.0}, "overlong_penalty=-1.0"),
    ({"policy_loss": "dpo"}, "policy_loss='dpo': accepted are clip, penalty, trpo"),
    ({"kl_controller": "pid"}, "kl_controller='pid': accepted are fixed, adaptive"),
    ({"kl_estimator": "k4"}, "kl_estimator='k4'"),
    ({"kl_loss_estimator": "k4", "kl_loss_coef": 0.1}, "kl_estimator='k4'"),
    ({"loss_aggregation": "mean"}, "aggregation='mean'"),
    ({"cliprange": 1.5}, "epsilon_low=1.5"),
    ({"cliprange_high": -0.1}, "epsilon_high=-0.1"),
    ({"dual_clip": 0.9}, "dual_clip=0.9"),
    ({"entropy_coef": float("nan")}, "entropy_coef=nan"),
    ({"num_mini_batches": 0}, "num_mini_batches=0: it must be at least 1"),
    ({"num_ppo_epochs": 0}, "num_ppo_epochs=0"),
    ({"num_generations": 0}, "num_generations=0"),
    ({"response_length": 0}, "response_length=0"),
    ({"kl_coef": -1.0}, "kl_coef=-1.0: it must be at least 0 and finite"),
    ({"kl_loss_coef": -1.0}, "kl_loss_coef=-1.0"),
    ({"vf_coef": float("inf")}, "vf_coef=inf"),
    ({"critic_warmup_steps": -1}, "critic_warmup_steps=-1"),
    ({"gamma": 1.1}, r"gamma=1.1: it must be in \[0, 1\]"),
    ({"lam": -0.1}, "lam=-0.1"),
    ({"temperature": 0.0}, "temperature=0.0: it must be positive"),
    ({"missing_eos_penalty": 0.0}, "missing_eos_penalty=0.0"),
    ({"score_clip": -1.0}, "score_clip=-1.0"),
    ({"kl_horizon": 0.0, "kl_controller": "adaptive", "target_kl": 1.0}, "kl_horizon=0.0"),
    ({"cliprange_value": 0.0}, "cliprange_value=0.0"),
    ({"critic_learning_rate": 0.0}, "critic_learning_rate=0.0"),
    ({"rollout_batch_tokens": 0}, "rollout_batch_tokens=0"),
    ({"policy_loss": "penalty", "penalty_target": 0.0}, "penalty_target=0.0"),
    ({"policy_loss": "trpo", "trpo_max_kl": 0.0}, "trpo_max_kl=0.0"),
    ({"total_episodes": 0}, "total_episodes=0"),
    ({"total_episodes": 8, "max_steps": 2}, "total_episodes and max_steps both say when to stop"),
    ({"num_generations": 3}, "num_generations=3 does not divide the 8 completions of a phase"),
    ({"advantage_estimator": "group"}, "num_generations=1, at least 2 are needed"),
    ({"advantage_estimator": "rloo"}, "compares the completions of a prompt"),
    ({"kl_loss_coef": 0.1, "kl_loss_estimator": "k1"}, "its expected gradient on the policy's own samples is zero"),
    ({"target_kl": 1.0}, "target_kl is what kl_controller='adaptive' aims at"),
    ({"kl_controller": "adaptive"}, "give both or neither"),
    ({"kl_controller": "adaptive", "target_kl": 1.0, "kl_coef": 0.0}, "must be positive to begin with"),
    ({"kl_controller": "adaptive", "target_kl": 1.0, "kl_horizon": 1.6}, r"it must exceed 1\.6"),
    ({"policy_loss": "trpo", "value_head": True}, "value_head=True trains the policy's trunk"),
    ({"stop_token": "a", "stop_token_id": 3}, "name one token in two ways"),
    ({"value_head": True, "value_model_path": "m"}, "has no critic of its own"),
    ({"sft_model_path": "a", "model_name_or_path": "b"}, "name two policies"),
    (
        {"num_generations": 3, "whole_groups": True, "loss_type": "grpo", "num_mini_batches": 3},
        "whole_groups=True: num_generations=3 does not divide the 4 completions of a mini-batch",
    ),
    ({"whole_groups": False}, "whole_groups=False has no effect with num_generations=1"),
    ({"local_rollout_forward_batch_size": 4}, "rollout_batch_tokens bounds a batch"),
    ({"num_sample_generations": 4}, "evaluate\\(\\) samples from the evaluation prompts"),
    ({"include_num_input_tokens_seen": "all"}, "include_num_input_tokens_seen is not supported"),
    ({"accelerator_config": {"split_batches": True}}, "accelerator_config split_batches=True"),
    ({"accelerator_config": {"even_batches": False}}, "accelerator_config even_batches=False"),
]
# what would be ignored: field, value, what it has no effect with
IGNORED = [
    ({"scale_rewards": False}, "advantage_estimator='gae'"),
    ({"advantage_estimator": "group", "num_generations": 2, "gamma": 0.9}, "advantage_estimator='group'"),
    ({"advantage_estimator": "rloo", "num_generations": 2, "scale_rewards": False}, "advantage_estimator='rloo'"),
    ({"advantage_estimator": "reinforce", "lam": 0.5}, "advantage_estimator='reinforce'"),
    ({"advantage_estimator": "reinforce", "vf_coef": 0.5}, "advantage_estimator='reinforce'"),
    ({"advantage_estimator": "reinforce", "value_head": True}, "advantage_estimator='reinforce'"),
    ({"advantage_estimator": "reinforce", "value_model_path": "m"}, "advantage_estimator='reinforce'"),
    ({"advantage_estimator": "reinforce", "critic_warmup_steps": 1}, "advantage_estimator='reinforce'"),
    ({"advantage_estimator": "reinforce", "critic_learning_rate": 0.1}, "advantage_estimator='reinforce'"),
    ({"filter_groups": True}, "advantage_estimator='gae'"),
    ({"advantage_estimator": "reinforce", "filter_groups": True}, "advantage_estimator='reinforce'"),
    ({"loss_type": "dapo", "num_generations": 2, "vf_coef": 0.5}, "advantage_estimator='group'"),
    ({"loss_type": "dr_grpo", "num_generations": 2, "kl_estimator": "k3"}, "kl_coef=0"),
    ({"policy_loss": "penalty", "loss_type": "gspo", "num_generations": 2}, "policy_loss='penalty'"),
    ({"policy_loss": "penalty", "importance_sampling_level": "sequence"}, "policy_loss='penalty'"),
    ({"policy_loss": "penalty", "sampler_correction": "token_mask"}, "policy_loss='penalty'"),
    (
        {"policy_loss": "trpo", "advantage_estimator": "group", "num_generations": 2, "filter_groups": True},
        "policy_loss='trpo'",
    ),
    ({"policy_loss": "trpo", "mask_truncated_completions": True}, "policy_loss='trpo'"),
    ({"sampler_cap": 3.0}, "sampler_correction=None"),
    ({"overlong_penalty": 2.0}, "overlong_buffer=None"),
    ({"penalty_coef": 2.0}, "policy_loss='clip'"),
    ({"trpo_max_kl": 0.1}, "policy_loss='clip'"),
    ({"policy_loss": "penalty", "cliprange": 0.1}, "policy_loss='penalty'"),
    ({"policy_loss": "penalty", "dual_clip": 3.0}, "policy_loss='penalty'"),
    ({"policy_loss": "penalty", "kl_loss_coef": 0.1}, "policy_loss='penalty'"),
    ({"policy_loss": "trpo", "entropy_coef": 0.1}, "policy_loss='trpo'"),
    ({"policy_loss": "trpo", "loss_aggregation": "sequence_sum"}, "policy_loss='trpo'"),
    ({"policy_loss": "trpo", "advantage_estimator": "reinforce", "num_ppo_epochs": 2}, "no critic"),
    ({"kl_horizon": 100.0}, "kl_controller='fixed'"),
    ({"kl_loss_estimator": "k2"}, "kl_loss_coef=0"),
    ({"kl_coef": 0.0, "kl_estimator": "k3"}, "kl_coef=0"),
    ({"router_aux_loss_coef": 0.1}, "PPO"),
    ({"truncation_mode": "keep_end"}, "PPO"),
    ({"neftune_noise_alpha": 5.0}, "PPO"),
    ({"auto_find_batch_size": True}, "PPO"),
    ({"torch_empty_cache_steps": 2}, "PPO"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_cannot_be_honoured_is_refused(kit, settings, message):
    with pytest.raises(ValueError, match=message):
        kit.ppo_config(**settings)


@pytest.mark.parametrize(("settings", "cause"), IGNORED, ids=lambda value: str(value)[:50])
def test_what_would_be_ignored_is_refused(kit, settings, cause):
    with pytest.raises(ValueError, match=f"has no effect with .*{cause}") as error:
        kit.ppo_config(**settings)
    name = str(error.value).partition("=")[0]
    assert name in settings
    assert repr(settings[name]) in str(error.value)


def test_processes_that_trpo_refuses(kit, monkeypatch):
    from fastalign.trainers import PPOConfig

    monkeypatch.setattr(PPOConfig, "world_size", 2)
    with pytest.raises(ValueError, match="one process"):
        kit.ppo_config(policy_loss="trpo")
