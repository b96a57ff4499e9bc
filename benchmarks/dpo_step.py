"""A DPO training step end to end against TRL's DPOTrainer: same model, pairs, batches and max_length, float32.

    <python with trl> benchmarks/dpo_step.py --model hh-tiny --data hh_harmless.jsonl.gz [--rounds 3] [--steps 12]

Without gradient checkpointing. Every run is a process of its own; rounds interleave the providers. Step time: the
median over steps after the first two, then the median over rounds. Peak memory: the high-water mark of the process less
what was resident after its imports, over the whole run (`peak_mib`) and from the first step on (`peak_training_mib`).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import harness

PROVIDERS = ("fastalign", "trl", "trl precomputed")


def pairs(data: str, model: str, count: int, max_length: int) -> list[dict[str, Any]]:
    """The first pairs of the file that are valid and fit, as messages."""
    sys.path.insert(0, str(Path(__file__).parent / "peers"))
    from transformers import AutoTokenizer
    from trl_dpo_curve import select

    return select(data, AutoTokenizer.from_pretrained(model), count, max_length)[1]


def train(provider: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run, in this process."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    if provider == "fastalign":
        from fastalign import DPOConfig, DPOTrainer
    else:
        from trl import DPOConfig, DPOTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.losses: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not self.seconds:
                harness.restart_high_water()
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.start)

        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(logs["loss"])

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = Dataset.from_list(
        pairs(arguments.data, arguments.model, arguments.steps * arguments.batch, arguments.max_length)
    )
    clock = Clock()
    gc.collect()
    bare = harness.resident()
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            "output_dir": folder, "per_device_train_batch_size": arguments.batch, "max_steps": arguments.steps,
            "max_length": arguments.max_length, "learning_rate": 5e-5, "train_sampling_strategy": "sequential",
            "gradient_checkpointing": False, "bf16": False, "logging_steps": 1, "save_strategy": "no",
            "report_to": "none", "use_cpu": True, "seed": 0, "disable_tqdm": True,
        }  # fmt: skip
        if provider == "fastalign":
            options["cache_dir"] = f"{folder}/cache"
            models: dict[str, Any] = {"model": arguments.model}
        else:
            options["precompute_ref_log_probs"] = provider.endswith("precomputed")
            models = {
                name: AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
                for name in ("model", "ref_model")
            }
        trainer = DPOTrainer(
            **models, args=DPOConfig(**options), train_dataset=rows, processing_class=tokenizer, callbacks=[clock]
        )
        before = harness.high_water()
        trainer.train()
        training = harness.high_water()
    return {
        "step_seconds": statistics.median(clock.seconds[2:]), "peak_mib": (max(before, training) - bare) / 2**20,
        "peak_training_mib": (training - bare) / 2**20, "bare_mib": bare / 2**20, "first_loss": clock.losses[0],
        "last_loss": clock.losses[-1],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--only", choices=PROVIDERS, help="run one provider in this process and print its figures")
    arguments = parser.parse_args()
    if arguments.only:
        print("RESULT " + json.dumps(train(arguments.only, arguments)))
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in PROVIDERS}
    for round_number in range(arguments.rounds):
        for name in PROVIDERS[round_number % 3 :] + PROVIDERS[: round_number % 3]:
            done = subprocess.run([sys.executable, "-P", *sys.argv, "--only", name], capture_output=True, text=True)
            line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
            if line is None:
                print(done.stderr[-2000:], file=sys.stderr)
                raise SystemExit(f"{name} failed with exit status {done.returncode}")
            found[name].append(json.loads(line.removeprefix("RESULT ")))
    middle = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()
    }
    rows = []
    for name, figures in middle.items():
        row: dict[str, Any] = {"provider": name, "model": Path(arguments.model).name, "batch": arguments.batch}
        row |= figures
        for peer in PROVIDERS[1:]:
            row[f"time_over_{peer.replace(' ', '_')}"] = figures["step_seconds"] / middle[peer]["step_seconds"]
            row[f"memory_over_{peer.replace(' ', '_')}"] = (
                figures["peak_training_mib"] / middle[peer]["peak_training_mib"]
            )
        rows.append(row)
        harness.say(**row)
    if not arguments.no_save:
        harness.append_rows("dpo_step", "cpu", rows)


if __name__ == "__main__":
    main()
