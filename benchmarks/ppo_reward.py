"""Does PPO raise the reward it optimises? A real checkpoint, real prompts and a reward model trained on real pairs.

    python benchmarks/reward_accuracy.py --data hh_harmless.jsonl.gz --model hh-tiny --epochs 5 --save rm
    python benchmarks/ppo_reward.py --data hh_harmless.jsonl.gz --model hh-tiny --reward_model rm --steps 50

Float32 on the CPU; prints one JSON object: rewards and KL of every phase, and of completions for the same held-out
prompts before and after. Completions are not printed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time

import numpy as np
import torch
from harness import commit, device_name, versions

from fastalign import PPOConfig, PPOTrainer

HELD_OUT_ROWS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--reward_model", required=True)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--completions", type=int, default=32, help="of a phase")
    parser.add_argument("--response_length", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=3e-5)
    parser.add_argument("--kl_coef", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
            folder, model_name_or_path=options.model, reward_model_path=[options.reward_model],
            dataset_name=options.data, dataset_train_split=f"train[:-{HELD_OUT_ROWS}]",
            dataset_test_split=f"train[-{HELD_OUT_ROWS}:]", max_length=128, on_bad_row="skip",
            per_device_train_batch_size=options.completions // 2, num_mini_batches=2, num_ppo_epochs=2,
            response_length=options.response_length, learning_rate=options.learning_rate, kl_coef=options.kl_coef,
            critic_learning_rate=10 * options.learning_rate, lr_scheduler_type="constant", max_steps=options.steps,
            seed=options.seed, gradient_checkpointing=False, bf16=False, use_cpu=True, save_strategy="no",
            report_to="none", logging_steps=1,
        )  # fmt: skip
        trainer = PPOTrainer(args)
        before = trainer.evaluate()
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        after = trainer.evaluate()
    phases = [entry for entry in trainer.state.log_history if "objective/scores" in entry]
    scores = np.array([entry["objective/scores"] for entry in phases])
    kept = ("objective/scores", "objective/scores_std", "objective/kl", "completions/mean_length")
    names = {"data": options.data, "model": options.model, "reward_model": options.reward_model}
    figures = {
        "options": vars(options) | {name: value.rstrip("/").rsplit("/", 1)[-1] for name, value in names.items()},
        "provenance": {"commit": commit(), "versions": versions(), "device": device_name("cpu")},
        "seconds": round(seconds, 1),
        "first_ten_phases": {"mean": scores[:10].mean(), "se": scores[:10].std(ddof=1) / 10**0.5},
        "last_ten_phases": {"mean": scores[-10:].mean(), "se": scores[-10:].std(ddof=1) / 10**0.5},
        "held_out_before": {name: before.get(f"eval_{name}") for name in kept},
        "held_out_after": {name: after.get(f"eval_{name}") for name in kept},
        "scores": [round(float(score), 3) for score in scores],
        "kl": [round(entry["objective/kl"], 3) for entry in phases],
        "first_ratio_off_1": max((2 * entry["val/first_approxkl"]) ** 0.5 for entry in phases),  # root mean square
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
