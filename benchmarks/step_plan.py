"""Planned against measured: peak memory of training steps on the CPU, over trainers, models, settings and passes.

    python benchmarks/step_plan.py --model hh-tiny [--trainer dpo sft] [--tokens 128 256] [--micro 512 1024 2048]

Measured is what `fastalign bench step` measures: the most that the steps take beyond a process which has trained a
model of the same class that is as small as can be. Random weights; sequences of --tokens tokens, half of them the
prompt's, of PPO's --response of them the completion's. Peak memory does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
from pathlib import Path
from typing import Any

import harness
import torch

TRAINERS = ("dpo", "sft", "reward", "pro", "ppo")


def settings(trainer: str, model: str, lora: bool, checkpointing: bool, micro: int, **own: Any) -> dict[str, Any]:
    given = {
        "model_name_or_path": model, "use_cpu": True, "gradient_checkpointing": checkpointing, "use_peft": lora,
        "micro_batch_tokens": micro, "per_device_train_batch_size": own["batch"],
    }  # fmt: skip
    if trainer == "ppo":
        given |= {"num_mini_batches": 2, "num_ppo_epochs": 2, "response_length": own["response"]}
    return given


def compare(trainer: str, given: dict[str, Any], tokens: int, steps: int) -> dict[str, Any]:
    """One row: the plan of a run and its measurement."""
    from fastalign import trainers
    from fastalign.trainers.run_bench import measure_steps
    from fastalign.trainers.run_plan import run_plan

    name = {"sft": "SFT", "reward": "Reward"}.get(trainer, trainer.upper())
    config_class = getattr(trainers, f"{name}Config")
    plan = run_plan(config_class(output_dir="plan", report_to="none", **given), tokens=tokens).plan()
    found = measure_steps(
        f"{name}Trainer", (config_class.__module__, config_class.__name__), given, tokens=tokens, steps=steps
    )
    return {
        "trainer": trainer, "model": Path(given["model_name_or_path"]).name,
        "trained": "lora" if given["use_peft"] else "full", "checkpointing": given["gradient_checkpointing"],
        "tokens": tokens, "micro": given["micro_batch_tokens"], "batch": given["per_device_train_batch_size"],
        "layout": plan.layout, "planned_mib": plan.peak_bytes / 2**20, "measured_mib": found.peak_bytes / 2**20,
        "ratio": plan.peak_bytes / found.peak_bytes, "allocator_mib": plan.parts.get("allocator", 0) / 2**20,
        "step_seconds": found.step_seconds, "gflop": plan.total_flops / 1e9,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", required=True)
    parser.add_argument("--trainer", nargs="+", default=["dpo"], choices=TRAINERS)
    parser.add_argument("--trained", nargs="+", default=["full", "lora"], choices=("full", "lora"))
    parser.add_argument("--checkpointing", nargs="+", default=["off", "on"], choices=("off", "on"))
    parser.add_argument("--tokens", nargs="+", type=int, default=[256])
    parser.add_argument("--micro", nargs="+", type=int, default=[512, 1024, 2048])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    own = {"batch": arguments.batch, "response": arguments.response}
    rows = []
    for trainer, model, trained, checkpointing, tokens, micro in itertools.product(
        arguments.trainer, arguments.model, arguments.trained, arguments.checkpointing, arguments.tokens,
        arguments.micro,
    ):  # fmt: skip
        given = settings(trainer, model, trained == "lora", checkpointing == "on", micro, **own)
        rows.append(compare(trainer, given, tokens, arguments.steps))
        harness.say(**rows[-1])
        if not arguments.no_save:
            harness.append_rows("step_plan", "cpu", rows[-1:])
    ratios = [row["ratio"] for row in rows]
    print(f"planned / measured: mean {statistics.mean(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
