"""`fastalign reward`: from comparisons, rankings or labels to a reward model."""

from __future__ import annotations

from fastalign.cli.training import TrainingCommand

COMMAND = TrainingCommand(
    name="reward",
    summary=(
        "Train a reward model on pairs (chosen, rejected, margin), on ranked or scored completions of a prompt, or on "
        "labelled completions; plain transformers loads it and gives the same scores."
    ),
    config=("fastalign.trainers.reward_config", "RewardConfig"),
    trainer="RewardTrainer",
    required={
        "model_name_or_path": "the model that training starts from",
        "dataset_name": "the judged responses",
        "output_dir": "the folder that the model is saved in",
    },
)

run = COMMAND.run
