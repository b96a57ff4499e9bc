"""Train with TRL's RewardTrainer and write its loss curve, with head and batches it was made of, as JSON.

    <python with trl> benchmarks/peers/trl_reward_curve.py --data hh_harmless.jsonl.gz --model hh-tiny --output out.json

Runs in an environment of its own (TRL is no dependency of fastalign), on the rows that `trl_dpo_curve.py` selects. The
head's initial weights are in the file, so that a second implementation starts from the same reward model. float32, no
gradient checkpointing, no shuffling, AdamW with a linear schedule.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl_dpo_curve import RecordingCollator, select

LOGGED = ("loss", "grad_norm", "accuracy", "margin", "min_reward", "mean_reward", "max_reward", "num_tokens")


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in logs:
            self.logs.append({name: logs[name] for name in LOGGED})


def main() -> None:
    import trl

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=512)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows, pairs = select(options.data, tokenizer, options.steps * options.batch_size, options.max_length)
    settings = {
        "per_device_train_batch_size": options.batch_size, "max_steps": options.steps, "max_length": options.max_length,
        "learning_rate": 1e-4, "lr_scheduler_type": "linear", "center_rewards_coefficient": 0.01, "seed": 0,
        "train_sampling_strategy": "sequential", "gradient_checkpointing": False, "bf16": False, "logging_steps": 1,
    }  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=1, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(model.score.weight.shape, generator=generator) / (model.config.hidden_size + 1) ** 0.5
    model.score.weight.data.copy_(head)
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.RewardTrainer(
            model=model,
            args=trl.RewardConfig(folder, save_strategy="no", report_to="none", use_cpu=True, **settings),
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            callbacks=[recorder],
        )
        trainer.data_collator = collator = RecordingCollator(trainer.data_collator)
        trainer.train()
    record = {
        "provenance": {
            "script": "benchmarks/peers/trl_reward_curve.py", "trl": trl.__version__, "torch": torch.__version__,
            "transformers": transformers.__version__, "python": platform.python_version(), "device": "cpu, float32",
        },
        "data": options.data.rsplit("/", 1)[-1],
        "model": options.model.rstrip("/").rsplit("/", 1)[-1],
        "settings": settings,
        "rows": rows,
        "head": head.flatten().tolist(),
        "batch_checksums": collator.checksums[: options.steps],
        "logs": {name: [log[name] for log in recorder.logs] for name in LOGGED},
    }  # fmt: skip
    with open(options.output, "w", encoding="utf-8") as file:
        file.write(json.dumps(record, indent=None).replace('], "', '],\n"').replace('}, "', '},\n"') + "\n")


if __name__ == "__main__":
    main()
