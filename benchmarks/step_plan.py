"""Planned against measured: peak memory of DPO steps on the CPU, over models, settings and sizes of a pass.

    python benchmarks/step_plan.py --model hh-tiny [--tokens 128 256] [--micro 512 1024 2048] [--threads 1]

Measured is what `fastalign bench step` measures: the most that the steps take beyond a process which has trained a
model of the same class that is as small as can be. Random weights; sequences of --tokens tokens, half of them the
prompt's.
"""

from __future__ import annotations

import argparse
import itertools
import os
from pathlib import Path
from typing import Any

import harness


def settings(model: str, lora: bool, checkpointing: bool, micro: int) -> dict[str, Any]:
    return {
        "model_name_or_path": model, "use_cpu": True, "gradient_checkpointing": checkpointing, "use_peft": lora,
        "micro_batch_tokens": micro, "per_device_train_batch_size": 8,
    }  # fmt: skip


def compare(given: dict[str, Any], tokens: int, steps: int) -> dict[str, Any]:
    """One row: the plan of a run and its measurement."""
    from fastalign.trainers import DPOConfig
    from fastalign.trainers.run_bench import measure_steps
    from fastalign.trainers.run_plan import run_plan

    plan = run_plan(DPOConfig(output_dir="plan", report_to="none", **given), tokens=tokens).plan()
    config = ("fastalign.trainers.dpo_config", "DPOConfig")
    found = measure_steps("DPOTrainer", config, given, tokens=tokens, steps=steps)
    return {
        "model": Path(given["model_name_or_path"]).name, "trained": "lora" if given["use_peft"] else "full",
        "checkpointing": given["gradient_checkpointing"], "tokens": tokens, "micro": given["micro_batch_tokens"],
        "layout": plan.layout, "planned_mib": plan.peak_bytes / 2**20, "measured_mib": found.peak_bytes / 2**20,
        "ratio": plan.peak_bytes / found.peak_bytes, "allocator_mib": plan.parts.get("allocator", 0) / 2**20,
        "step_seconds": found.step_seconds, "gflop": plan.total_flops / 1e9,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", required=True)
    parser.add_argument("--tokens", nargs="+", type=int, default=[256])
    parser.add_argument("--micro", nargs="+", type=int, default=[512, 1024, 2048])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    grid = itertools.product(arguments.model, (False, True), (False, True), arguments.tokens, arguments.micro)
    rows = []
    for model, lora, checkpointing, tokens, micro in grid:
        rows.append(compare(settings(model, lora, checkpointing, micro), tokens, arguments.steps))
        harness.say(**rows[-1])
    if not arguments.no_save:
        harness.append_rows("step_plan", "cpu", rows)


if __name__ == "__main__":
    main()
