"""TRL's own trainers with and without `patch_trl`: a step of DPO, and the update of a step of GRPO, in float32.

    <python with trl> benchmarks/trl_dropin.py --model hh-tiny --data hh_harmless.jsonl.gz [--tasks dpo grpo]
        [--steps 12] [--batch 8] [--max_length 512] [--clock wall|cpu] [--no-save]

Two trainers, alike but for the call, take the same steps on the same batches in turns: forward, backward, AdamW and
metrics. Time: the median over steps, as a ratio. `loss_difference`: the largest of all steps, between two runs that
drift apart on their own; `weight_difference`: the largest at their end. Peak memory: of a trainer's first step, in a
process of its own, above what was resident before it, after another trainer took a step on a small batch. The
completions of a GRPO step are sampled once and kept: sampling is TRL's either way, and left out.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "peers"))
sys.path.insert(0, str(Path(__file__).parent))
import harness

TASKS = ("dpo", "grpo")
PROVIDERS = ("trl", "trl + fastalign")
COMMON: dict[str, Any] = {
    "learning_rate": 5e-5, "gradient_checkpointing": False, "bf16": False, "save_strategy": "no", "report_to": "none",
    "use_cpu": True, "seed": 0, "disable_tqdm": True, "logging_steps": 1,
}  # fmt: skip


def load(model: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def dpo_trainer(options: argparse.Namespace, folder: str) -> tuple[Any, list[dict[str, Any]]]:
    """A trainer, and the batches of its steps."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    from trl_dpo_curve import select

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = select(options.data, tokenizer, (options.steps + 1) * options.batch, options.max_length)[
        1
    ]  # one more: warm-up
    arguments = DPOConfig(
        folder, per_device_train_batch_size=options.batch, max_length=options.max_length,
        train_sampling_strategy="sequential", **COMMON,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=load(options.model), ref_model=load(options.model), args=arguments,
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
    )  # fmt: skip
    return trainer, [trainer._prepare_inputs(batch) for batch in trainer.get_train_dataloader()]


def varied(completions: list[Any], **_: Any) -> list[float]:
    """A reward that differs between the completions of a prompt."""
    return [float(len(completion[0]["content"]) % 17) for completion in completions]


def grpo_trainer(options: argparse.Namespace, folder: str) -> tuple[Any, list[dict[str, Any]]]:
    """A trainer, and the completions of its steps: sampled once, and used by every step."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer
    from trl_dpo_curve import select

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = select(options.data, tokenizer, options.batch, options.max_length // 2)[1]
    arguments = GRPOConfig(
        folder, per_device_train_batch_size=2 * options.batch, num_generations=4, beta=0.0,
        max_completion_length=options.max_length // 2, **COMMON,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=load(options.model), reward_funcs=varied, args=arguments,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]), processing_class=tokenizer,
    )  # fmt: skip
    torch.manual_seed(0)
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer, [trainer._prepare_inputs(batch)]


MAKERS = {"dpo": dpo_trainer, "grpo": grpo_trainer}


def stepper(task: str, provider: str, options: argparse.Namespace) -> tuple[Callable[[], Any], list[float], Any]:
    """Takes the next step when it is called; the losses so far; the model."""
    import torch

    torch.manual_seed(0)
    folder = tempfile.mkdtemp()
    trainer, batches = MAKERS[task](options, folder)
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    if provider != "trl":
        from fastalign.integrations import patch_trl

        patch_trl(trainer)
    model, losses = trainer.model.train(), []

    def step() -> None:
        loss = trainer.compute_loss(model, dict(batches[len(losses) % len(batches)]))
        loss.backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        losses.append(float(loss.detach()))

    return step, losses, model


def warmed(task: str, provider: str, options: argparse.Namespace) -> Callable[[], Any]:
    """A step at full size, after one at a small one by which the libraries and the optimizer have what they keep."""
    small = copy.copy(options)
    small.batch, small.max_length, small.steps = 2, 64, 1
    stepper(task, provider, small)[0]()
    return stepper(task, provider, options)[0]


def run(task: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    import torch

    steps, losses, models = {}, {}, {}
    for name in PROVIDERS:
        steps[name], losses[name], models[name] = stepper(task, name, options)
    times = harness.interleaved(steps, rounds=options.steps, clock=options.clock)
    middle = {name: harness.median(seconds) for name, seconds in times.items()}
    difference = float((torch.tensor(losses["trl"]) - torch.tensor(losses[PROVIDERS[1]])).abs().max())
    alone, ours = (dict(models[name].named_parameters()) for name in PROVIDERS)
    drift = max(float((alone[name] - ours[name]).detach().abs().max()) for name in alone)
    rows = []
    for name in PROVIDERS:
        peak, error = harness.peak_memory(warmed, task, name, options)
        row = {
            "task": task, "provider": name, "model": Path(options.model).name, "batch": options.batch,
            "max_length": options.max_length, "clock": options.clock, "step_seconds": middle[name],
            "fastest": min(times[name]), "time_over_trl": middle[name] / middle["trl"],
            "peak_mib": None if peak is None else peak / 2**20,
            "error": "" if error is None else error.splitlines()[0][:200], "first_loss": losses[name][0],
            "last_loss": losses[name][-1], "loss_difference": difference, "weight_difference": drift,
        }  # fmt: skip
        rows.append(row)
    peak = rows[0]["peak_mib"]
    for row in rows:
        row["memory_over_trl"] = row["peak_mib"] / peak if peak and row["peak_mib"] else None
        harness.say(**row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--clock", choices=sorted(harness.CLOCKS), default="wall")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    for task in options.tasks:
        rows = run(task, options)
        if not options.no_save:
            harness.append_rows("trl_dropin", "cpu", rows)


if __name__ == "__main__":
    main()
