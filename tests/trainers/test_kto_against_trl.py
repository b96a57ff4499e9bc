"""Real preferences and a real checkpoint against the loss curve of TRL 1.16.0's KTOTrainer."""

import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback

from fastalign.data import prepare_preferences
from fastalign.trainers import DPOConfig, DPOTrainer

torch.set_num_threads(1)
CURVE = Path(__file__).parent / "golden" / "trl_kto_curve.json"
# absolute, in float32; log-probs are sums over a hundred tokens
TOLERANCES = {
    "loss": 2e-5, "kl": 2e-3, "rewards/chosen": 2e-4, "rewards/rejected": 2e-4, "rewards/margins": 4e-4,
    "logps/chosen": 2e-3, "logps/rejected": 2e-3, "logits/chosen": 1e-4, "logits/rejected": 1e-4, "entropy": 1e-4,
}  # fmt: skip


class Rows(list):
    """Offensive texts: a failing test must not print them."""

    def __repr__(self):
        return f"{len(self)} rows"


class StopAfter(TrainerCallback):
    def __init__(self, step, seen):
        self.step, self.seen = step, seen

    def on_train_begin(self, *args, **kwargs):
        self.seen.clear()  # the check before training collates a batch of its own

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def tokenised(shared_dir, recorded) -> Dataset:
    """The responses of TRL's run; mismatched ones shifted inside each device batch, as TRL does."""
    with gzip.open(shared_dir / "data" / recorded["data"], "rt", encoding="utf-8") as file:
        rows = Rows(json.loads(line) for line in file)
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "models" / recorded["model"])
    settings = recorded["settings"]
    pairs, _ = prepare_preferences(
        Rows(rows[i] for i in recorded["rows"]), tokenizer, max_length=settings["max_length"]
    )
    size, examples = settings["per_device_train_batch_size"], []
    for i, pair in enumerate(pairs):
        ids = pair["rejected_ids" if i % 2 else "chosen_ids"]
        examples.append({"prompt_ids": pair["prompt_ids"], "completion_ids": ids, "label": i % 2 == 0})
    for i, example in enumerate(examples):
        start = i - i % size
        other = examples[start + (i - start - 1) % size]["completion_ids"]
        example["kl_completion_ids"] = other[: settings["max_length"] - len(example["prompt_ids"])]
    return Dataset.from_list(examples)


def checksum(batch):
    return zlib.crc32(batch["input_ids"][batch["attention_mask"].bool()].to(torch.int32).numpy())


def repeat_curve(shared_dir, folder, steps, **settings):
    """Our trainer on the batches that TRL's was recorded on: (recorded curves, ours)."""
    recorded = json.loads(CURVE.read_text())
    seen = []
    args = DPOConfig(
        str(folder / "out"), loss_type="kto", cache_dir=str(folder / "cache"), use_cpu=True, save_strategy="no",
        report_to="none", disable_tqdm=True, **(recorded["settings"] | settings),
    )  # fmt: skip
    model = shared_dir / "models" / recorded["model"]
    count = steps * recorded["settings"]["per_device_train_batch_size"]
    trainer = DPOTrainer(
        str(model), args=args, train_dataset=tokenised(shared_dir, recorded).select(range(count)),
        callbacks=[StopAfter(steps, seen)],
    )  # fmt: skip
    collate = trainer.data_collator

    def recording(examples):
        batch = collate(examples)
        seen.append([checksum(batch), checksum(batch["kl"])])
        return batch

    trainer.data_collator = recording
    trainer.train()
    assert seen[:steps] == recorded["batch_checksums"][:steps]  # the same tokens in the same order
    return recorded["logs"], [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_same_curve(recorded, entries, steps):
    assert len(entries) == steps
    for name, tolerance in TOLERANCES.items():
        ours = [entry[name] for entry in entries]
        np.testing.assert_allclose(ours, recorded[name][:steps], rtol=0, atol=tolerance, err_msg=name)
    ours = [entry["grad_norm"] for entry in entries]
    np.testing.assert_allclose(ours, recorded["grad_norm"][:steps], rtol=1e-3, err_msg="grad_norm")


def test_the_first_steps_of_trls_curve(shared_dir, tmp_path):
    recorded, entries = repeat_curve(shared_dir, tmp_path, steps=4)
    assert_same_curve(recorded, entries, 4)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_trls_whole_curve(shared_dir, tmp_path):
    recorded, entries = repeat_curve(shared_dir, tmp_path, steps=25)
    assert_same_curve(recorded, entries, 25)
    assert max(recorded["kl"]) > 0.3  # a reference point that matters
