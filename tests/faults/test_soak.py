"""Two thousand steps in one process: memory and open files stay what they were."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import TrainerCallback

from fastalign.trainers import DPOConfig, DPOTrainer

STEPS, WARM_UP, EVERY = 2000, 600, 10


class Gauge(TrainerCallback):
    """(step, resident bytes, open files), every EVERY steps."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int]] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % EVERY == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            files = len(os.listdir("/proc/self/fd"))
            self.seen.append((state.global_step, pages * os.sysconf("SC_PAGESIZE"), files))


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_thousand_steps(tmp_path, capsys):
    """A new shape in nearly every batch, a checkpoint every 200 steps, an evaluation every 500."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=61, pad_token_id=0, eos_token_id=1, **sizes))
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    rng = np.random.default_rng(0)
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [
        {name: rng.integers(3, 61, rng.integers(2, 24)).tolist() for name in columns} | {"row": i} for i in range(1000)
    ]
    config = DPOConfig(
        output_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"), max_steps=STEPS, use_cpu=True,
        report_to="none", disable_tqdm=True, per_device_train_batch_size=2, learning_rate=1e-4, logging_steps=50,
        save_strategy="steps", save_steps=200, save_total_limit=2, eval_strategy="steps", eval_steps=500,
        gradient_checkpointing=False,
    )  # fmt: skip
    gauge = Gauge()
    trainer = DPOTrainer(
        model, args=config, train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows[:20]),
        processing_class=tokenizer, callbacks=[gauge],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == STEPS

    steps, memory, files = np.array([entry for entry in gauge.seen if entry[0] >= WARM_UP], float).T
    (slope, start), covariance = np.polyfit(steps, memory, 1, cov=True)
    noise = float(np.std(memory - (slope * steps + start)))
    growth = slope * (STEPS - WARM_UP)
    error = covariance[0, 0] ** 0.5
    with capsys.disabled():
        print(
            f"\nsoak: {STEPS} steps, {memory[-1] / 2**20:.1f} MiB resident, slope {slope:.0f} ± {error:.0f}"
            f" bytes a step, {growth / 2**20:+.2f} MiB from step {WARM_UP} on (noise {noise / 2**20:.2f} MiB),"
            f" {int(files[0])} → {int(files[-1])} open files"
        )
    assert files.max() <= files[0] + 2  # a checkpoint being written may hold one
    assert files[-1] <= files[0]
    assert growth <= max(4 * noise, 2 * 2**20)  # 1.5 KB a step: log entries are kept, a tensor of a step would show
