"""`fastalign sft`: from text, conversations or completions to a fine-tuned model."""

from __future__ import annotations

from fastalign.cli.training import TrainingCommand

COMMAND = TrainingCommand(
    name="sft",
    summary="Fine-tune a model on text, conversations, or completions of prompts.",
    config=("fastalign.trainers.sft_config", "SFTConfig"),
    trainer="SFTTrainer",
    required={
        "model_name_or_path": "the model that training starts from",
        "dataset_name": "the data to learn from",
        "output_dir": "the folder that the model is saved in",
    },
)

run = COMMAND.run
