"""TRL's own DPOTrainer on fastalign's log-probs: one call between its construction and `train()`.

    python examples/trl_dropin.py [--steps 12]           (pip install trl)

Losses and metrics stay TRL's. The loop is run twice, without and with the call, and the losses are compared.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import torch
import trl
from datasets import Dataset
from shop import build_model, build_tokenizer, text_pairs

from fastalign import patch_trl


def train(steps: int, with_fastalign: bool) -> tuple[list[float], float]:
    """The losses, and the seconds of training."""
    tokenizer = build_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.DPOConfig(
            folder, per_device_train_batch_size=16, max_steps=steps, learning_rate=2e-3, beta=0.3, logging_steps=1,
            lr_scheduler_type="constant", bf16=False, gradient_checkpointing=False, save_strategy="no",
            report_to="none", use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = trl.DPOTrainer(
            model=build_model(tokenizer, seed=0),
            ref_model=build_model(tokenizer, seed=0),
            args=arguments,
            train_dataset=Dataset.from_list(text_pairs(16 * steps)),
            processing_class=tokenizer,
        )
        if with_fastalign:
            patch_trl(trainer)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    return [float(log["loss"]) for log in trainer.state.log_history if "loss" in log], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    steps = parser.parse_args().steps
    alone, _ = train(steps, with_fastalign=False)
    ours, _ = train(steps, with_fastalign=True)
    difference = (torch.tensor(alone) - torch.tensor(ours)).abs().max()
    print(f"TRL alone:      loss {alone[0]:.4f} -> {alone[-1]:.4f}")
    print(f"with fastalign: loss {ours[0]:.4f} -> {ours[-1]:.4f}")
    print(f"largest difference {difference:.1e}")
    assert difference < 1e-3


if __name__ == "__main__":
    main()
