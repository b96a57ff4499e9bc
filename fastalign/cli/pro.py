"""`fastalign pro`: from ranked responses to a policy."""

from __future__ import annotations

from fastalign.cli.training import TrainingCommand

COMMAND = TrainingCommand(
    name="pro",
    summary=(
        "Train a policy on ranked responses of any number to a prompt (PRO, Plackett-Luce, InfoNCE), with or without a "
        "reference; preference pairs are lists of two."
    ),
    config=("fastalign.trainers.pro_config", "PROConfig"),
    trainer="PROTrainer",
    required={
        "model_name_or_path": "the policy that training starts from",
        "dataset_name": "the ranked responses",
        "output_dir": "the folder that the model is saved in",
    },
    models=("model_name_or_path", "ref_model_name_or_path"),
)

run = COMMAND.run
