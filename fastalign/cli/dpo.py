"""`fastalign dpo`: from preference pairs to a policy."""

from __future__ import annotations

from fastalign.cli.training import TrainingCommand

COMMAND = TrainingCommand(
    name="dpo",
    summary="Train a policy on preferences with DPO or a relative of it, from cached reference log-probs.",
    config=("fastalign.trainers.dpo_config", "DPOConfig"),
    trainer="DPOTrainer",
    required={
        "model_name_or_path": "the policy that training starts from",
        "dataset_name": "the preference data",
        "output_dir": "the folder that the model is saved in",
    },
    models=("model_name_or_path", "ref_model_name_or_path"),
)

run = COMMAND.run
