"""`fastalign ppo`: from prompts and a reward to a policy."""

from __future__ import annotations

from fastalign.cli.training import TrainingCommand

COMMAND = TrainingCommand(
    name="ppo",
    summary=(
        "Train a policy by PPO, RLOO, GRPO, Dr. GRPO, DAPO, GSPO or CISPO on completions it samples for prompts, "
        "scored by reward models or Python functions."
    ),
    config=("fastalign.trainers.ppo_config", "PPOConfig"),
    trainer="PPOTrainer",
    required={
        "model_name_or_path": "the policy that training starts from",
        "dataset_name": "the prompts",
        "output_dir": "the folder that the model is saved in",
    },
    models=("model_name_or_path", "ref_model_name_or_path", "value_model_path", "reward_model_path"),
)

run = COMMAND.run
