"""What a reward model learns from real pairs: training and held-out accuracy beside the baselines that know nothing.

    python benchmarks/reward_accuracy.py --data hh_harmless.jsonl.gz --model hh-tiny --pairs 200 --epochs 8

Trains on the first rows and evaluates on the last ones, float32 on the CPU, and prints one JSON object. Baselines:
`majority` is 1/2 (which of two responses comes first says nothing), `length` prefers the shorter or the longer one,
whichever was right more often in training, and takes half a win for equal lengths.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time

import numpy as np
import torch
from harness import commit, device_name, versions

from fastalign import RewardConfig, RewardTrainer

HELD_OUT_ROWS = 300


def length_baseline(train: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
    """Accuracy of preferring by length alone. train, held_out: tokens of the chosen minus those of the rejected."""
    sign = 1.0 if (np.sign(train).sum() >= 0) else -1.0
    wins = (np.sign(held_out) * sign + 1) / 2
    return {
        "prefers": "longer" if sign > 0 else "shorter",
        "train_accuracy": float(((np.sign(train) * sign + 1) / 2).mean()),
        "accuracy": float(wins.mean()),
        "accuracy_se": float(wins.std() / (len(wins) - 1) ** 0.5),
    }


def differences(dataset) -> np.ndarray:
    lengths = [np.array([len(ids) for ids in dataset[name]]) for name in ("chosen_ids", "rejected_ids")]
    return lengths[0] - lengths[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--freeze_backbone", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--save", help="keep the reward model in this folder")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    with tempfile.TemporaryDirectory() as folder:
        args = RewardConfig(
            folder, model_name_or_path=options.model, dataset_name=options.data, max_length=512, on_bad_row="skip",
            dataset_train_split=f"train[:{options.pairs + options.pairs // 50 + 1}]",
            dataset_test_split=f"train[-{HELD_OUT_ROWS}:]", num_train_epochs=options.epochs, seed=options.seed,
            per_device_train_batch_size=options.batch_size, learning_rate=options.learning_rate,
            freeze_backbone=options.freeze_backbone, gradient_checkpointing=False, bf16=False, use_cpu=True,
            save_strategy="no", report_to="none", logging_steps=25,
        )  # fmt: skip
        trainer = RewardTrainer(args=args)
        train, held_out = trainer.train_dataset.select(range(options.pairs)), trainer.eval_dataset
        trainer.train_dataset = train
        before = trainer.evaluate()
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        tokens = trainer.state.log_history[-2].get("num_tokens")
        if options.save:
            trainer.save_model(options.save)
        seen, after = trainer.evaluate(train, metric_key_prefix="train"), trainer.evaluate()
    kept = ("loss", "accuracy", "margin", "loss_se", "accuracy_se", "margin_se", "length/reward_correlation")
    figures = {
        "options": vars(options)
        | {"data": options.data.rsplit("/", 1)[-1], "model": options.model.rsplit("/", 1)[-1], "save": None},
        "provenance": {"commit": commit(), "versions": versions(), "device": device_name("cpu")},
        "steps": trainer.state.global_step, "train_pairs": len(train), "held_out_pairs": len(held_out),
        "seconds": round(seconds, 1), "tokens": tokens,
        "train": {name: seen[f"train_{name}"] for name in kept},
        "held_out": {name: after[f"eval_{name}"] for name in kept},
        "held_out_before": {name: before[f"eval_{name}"] for name in ("loss", "accuracy", "accuracy_se")},
        "held_out_calibration": {name[5:]: value for name, value in after.items() if "calibration" in name},
        "majority": 0.5,
        "length": length_baseline(differences(train.with_format(None)), differences(held_out.with_format(None))),
    }  # fmt: skip
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
