"""Train with TRL's KTOTrainer and write its loss curve, with the batches it was made of, as JSON.

    <python with trl> benchmarks/peers/trl_kto_curve.py --data hh_harmless.jsonl.gz --model hh-tiny --output curve.json

Runs in an environment of its own (TRL is no dependency of fastalign), on the rows that `trl_dpo_curve.py` selects; of
the even ones the chosen response is learned from as a good one, of the odd ones the rejected response as a bad one.
TRL shifts the responses of each device batch by one for its estimate of the KL. float32, no gradient checkpointing, no
shuffling, AdamW with a linear schedule.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import zlib

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl_dpo_curve import select

LOGGED = (
    "loss", "grad_norm", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen",
    "logps/rejected", "logits/chosen", "logits/rejected", "entropy",
)  # fmt: skip


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in logs:
            self.logs.append({name: logs[name] for name in LOGGED})


class RecordingCollator:
    """TRL's collator, noting checksums of each batch's real tokens: responses, and mismatched responses."""

    def __init__(self, collator) -> None:
        self.collator, self.checksums = collator, []

    def __call__(self, examples):
        batch = self.collator(examples)
        self.checksums.append(
            [
                zlib.crc32(batch[f"{kind}input_ids"][batch[f"{kind}attention_mask"].bool()].to(torch.int32).numpy())
                for kind in ("", "KL_")
            ]
        )
        return batch


def unpaired(pairs: list[dict]) -> list[dict]:
    """One response of each pair: a good and a bad one in turn."""
    return [
        {"prompt": pair["prompt"], "completion": pair["rejected" if i % 2 else "chosen"], "label": i % 2 == 0}
        for i, pair in enumerate(pairs)
    ]


def main() -> None:
    import trl

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows, pairs = select(options.data, tokenizer, options.steps * options.batch_size, options.max_length)
    settings = {
        "per_device_train_batch_size": options.batch_size, "max_steps": options.steps, "max_length": options.max_length,
        "learning_rate": options.learning_rate, "lr_scheduler_type": "linear", "beta": 0.1, "desirable_weight": 1.2,
        "undesirable_weight": 0.8, "seed": 0, "train_sampling_strategy": "sequential", "gradient_checkpointing": False,
        "bf16": False, "logging_steps": 1,
    }  # fmt: skip
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.KTOTrainer(
            model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
            ref_model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
            args=trl.KTOConfig(folder, save_strategy="no", report_to="none", use_cpu=True, **settings),
            train_dataset=Dataset.from_list(unpaired(pairs)),
            processing_class=tokenizer,
            callbacks=[recorder],
        )
        trainer.data_collator = collator = RecordingCollator(trainer.data_collator)
        trainer.train()
    record = {
        "provenance": {
            "script": "benchmarks/peers/trl_kto_curve.py", "trl": trl.__version__, "torch": torch.__version__,
            "transformers": transformers.__version__, "python": platform.python_version(), "device": "cpu, float32",
        },
        "data": options.data.rsplit("/", 1)[-1],
        "model": options.model.rstrip("/").rsplit("/", 1)[-1],
        "settings": settings,
        "rows": rows,
        "batch_checksums": collator.checksums[: options.steps],
        "logs": {name: [log[name] for log in recorder.logs] for name in LOGGED},
    }  # fmt: skip
    with open(options.output, "w", encoding="utf-8") as file:
        file.write(json.dumps(record, indent=None).replace('], "', '],\n"').replace('}, "', '},\n"') + "\n")


if __name__ == "__main__":
    main()
