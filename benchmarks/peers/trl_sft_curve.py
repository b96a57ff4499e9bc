"""Train with TRL's SFTTrainer and write its loss curve, with the batches it was made of, as JSON.

    <python with trl> benchmarks/peers/trl_sft_curve.py --data hh_harmless.jsonl.gz --model hh-tiny --output curve.json

Runs in an environment of its own (TRL is no dependency of fastalign). Rows are the chosen responses as prompt and
completion in role/content messages; the first that are valid and fit into `max_length` are taken in file order.
float32, no gradient checkpointing, no shuffling, AdamW with a linear schedule: everything a second implementation needs
to repeat the run is in the file. One curve for each setting of what is trained on.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import zlib
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl_dpo_curve import select

LOGGED = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
CASES: dict[str, dict[str, Any]] = {"completions": {}, "everything": {"completion_only_loss": False}}


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in logs:
            self.logs.append({name: logs[name] for name in LOGGED})


class RecordingCollator:
    """TRL's collator, noting a checksum of each batch's real tokens, and of its labels."""

    def __init__(self, collator) -> None:
        self.collator, self.checksums = collator, []

    def __call__(self, examples):
        batch = self.collator(examples)
        real = batch["attention_mask"].bool()
        self.checksums.append(
            [zlib.crc32(batch[name][real].to(torch.int32).numpy().tobytes()) for name in ("input_ids", "labels")]
        )
        return batch


def run(trl, options, tokenizer, rows: list[dict], settings: dict[str, Any]) -> dict[str, Any]:
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
            args=trl.SFTConfig(folder, save_strategy="no", report_to="none", use_cpu=True, **settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[recorder],
        )
        trainer.data_collator = collator = RecordingCollator(trainer.data_collator)
        trainer.train()
    return {
        "batch_checksums": collator.checksums[: options.steps],
        "logs": {name: [log[name] for log in recorder.logs] for name in LOGGED},
    }


def main() -> None:
    import trl

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    numbers, pairs = select(options.data, tokenizer, options.steps * options.batch_size, options.max_length)
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    settings = {
        "per_device_train_batch_size": options.batch_size, "max_steps": options.steps, "max_length": options.max_length,
        "learning_rate": options.learning_rate, "lr_scheduler_type": "linear", "seed": 0,
        "train_sampling_strategy": "sequential", "gradient_checkpointing": False, "bf16": False, "logging_steps": 1,
    }  # fmt: skip
    record = {
        "provenance": {
            "script": "benchmarks/peers/trl_sft_curve.py", "trl": trl.__version__, "torch": torch.__version__,
            "transformers": transformers.__version__, "python": platform.python_version(), "device": "cpu, float32",
        },
        "data": options.data.rsplit("/", 1)[-1],
        "model": options.model.rstrip("/").rsplit("/", 1)[-1],
        "settings": settings,
        "rows": numbers,
        "cases": {name: case | run(trl, options, tokenizer, rows, settings | case) for name, case in CASES.items()},
    }  # fmt: skip
    with open(options.output, "w", encoding="utf-8") as file:
        file.write(json.dumps(record, indent=None).replace('], "', '],\n"').replace('}, "', '},\n"') + "\n")


if __name__ == "__main__":
    main()
