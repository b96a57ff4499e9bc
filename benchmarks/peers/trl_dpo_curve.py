"""Train with TRL's DPOTrainer and write its loss curve, with the batches it was made of, as JSON.

    <python with trl> benchmarks/peers/trl_dpo_curve.py --data hh_harmless.jsonl.gz --model hh-tiny --output curve.json

Runs in an environment of its own (TRL is no dependency of fastalign). Transcripts are read as role/content messages;
the first rows that are valid and fit into `max_length` are taken in file order. float32, no gradient checkpointing,
no shuffling, AdamW with a linear schedule: everything a second implementation needs to repeat the run is in the file.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import re
import tempfile
import zlib

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}
LOGGED = ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "entropy")


def messages(transcript: str) -> list[dict[str, str]]:
    parts = TURN.split(transcript)
    return [{"role": ROLES[r], "content": text.strip()} for r, text in zip(parts[1::2], parts[2::2], strict=True)]


def valid_pair(row: dict[str, str]) -> dict[str, list[dict[str, str]]] | None:
    """Prompt and last turns, or None unless the transcripts share all but a last, non-empty, different turn."""
    chosen, rejected = messages(row["chosen"]), messages(row["rejected"])
    if len(chosen) < 2 or chosen[:-1] != rejected[:-1] or chosen[-1] == rejected[-1]:
        return None
    if any(turn["role"] != "assistant" or not turn["content"] for turn in (chosen[-1], rejected[-1])):
        return None
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def select(path: str, tokenizer, count: int, max_length: int) -> tuple[list[int], list[dict]]:
    rows, pairs = [], []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file):
            pair = valid_pair(json.loads(line))
            if pair is None:
                continue
            texts = [
                tokenizer.apply_chat_template(pair["prompt"] + pair[side], tokenize=False)
                for side in ("chosen", "rejected")
            ]
            if max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts) > max_length:
                continue
            rows.append(number)
            pairs.append(pair)
            if len(pairs) == count:
                return rows, pairs
    raise SystemExit(f"{path} holds only {len(pairs)} usable pairs, {count} are needed")


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in logs:
            self.logs.append({name: logs[name] for name in LOGGED})


class RecordingCollator:
    """TRL's collator, noting a checksum of each batch's real tokens in batch order (chosen first)."""

    def __init__(self, collator) -> None:
        self.collator, self.checksums = collator, []

    def __call__(self, examples):
        batch = self.collator(examples)
        ids = batch["input_ids"][batch["attention_mask"].bool()].to(torch.int32)
        self.checksums.append(zlib.crc32(ids.numpy().tobytes()))
        return batch


def main() -> None:
    import trl  # here, so that others may take the selection of rows without it

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows, pairs = select(options.data, tokenizer, options.steps * options.batch_size, options.max_length)
    settings = {
        "per_device_train_batch_size": options.batch_size, "max_steps": options.steps, "max_length": options.max_length,
        "learning_rate": options.learning_rate, "lr_scheduler_type": "linear", "beta": 0.1, "seed": 0,
        "train_sampling_strategy": "sequential", "gradient_checkpointing": False, "bf16": False, "logging_steps": 1,
    }  # fmt: skip
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
            ref_model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
            args=trl.DPOConfig(folder, save_strategy="no", report_to="none", use_cpu=True, **settings),
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            callbacks=[recorder],
        )
        trainer.data_collator = collator = RecordingCollator(trainer.data_collator)
        trainer.train()
    record = {
        "provenance": {
            "script": "benchmarks/peers/trl_dpo_curve.py", "trl": trl.__version__, "torch": torch.__version__,
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
