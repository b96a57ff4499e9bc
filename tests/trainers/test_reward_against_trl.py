"""Real preferences and a real checkpoint against the loss curve of TRL 1.16.0's RewardTrainer."""

import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from fastalign.models import load_scalar_model
from fastalign.trainers import RewardConfig, RewardTrainer

torch.set_num_threads(1)
CURVE = Path(__file__).parent / "golden" / "trl_reward_curve.json"
# absolute, on rewards of about 1 in float32; one machine gives 1e-6
TOLERANCES = dict.fromkeys(("loss", "margin", "min_reward", "mean_reward", "max_reward"), 5e-5) | {"num_tokens": 0}


class Rows(list):
    """Offensive texts: a failing test must not print them."""

    def __repr__(self):
        return f"{len(self)} rows"


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def repeat_curve(shared_dir, folder, steps, **settings):
    """Our trainer on the batches and from the head that TRL's was recorded with: (recorded curves, ours)."""
    recorded = json.loads(CURVE.read_text())
    with gzip.open(shared_dir / "data" / recorded["data"], "rt", encoding="utf-8") as file:
        rows = Rows(json.loads(line) for line in file)
    model = load_scalar_model(shared_dir / "models" / recorded["model"])
    model.score.weight.data.copy_(torch.tensor([recorded["head"]]))
    args = RewardConfig(
        str(folder), use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True,
        **(recorded["settings"] | settings),
    )  # fmt: skip
    trainer = RewardTrainer(
        model, args, train_dataset=Rows(rows[i] for i in recorded["rows"]), callbacks=[StopAfter(steps)]
    )
    collate, seen = trainer.data_collator, []

    def recording(examples):
        batch = collate(examples)
        ids = batch["input_ids"][batch["attention_mask"].bool()].to(torch.int32)
        seen.append(zlib.crc32(ids.numpy().tobytes()))
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
    margins = np.array([entry["margin"] for entry in entries])
    accuracies = [entry["accuracy"] for entry in entries]
    np.testing.assert_allclose(accuracies, recorded["accuracy"][:steps], rtol=0, atol=1e-6)
    assert np.abs(margins).max() > 0.1  # a curve that goes somewhere
    ours = [entry["grad_norm"] for entry in entries]
    np.testing.assert_allclose(ours, recorded["grad_norm"][:steps], rtol=2e-3, err_msg="grad_norm")


def test_the_first_steps_of_trls_curve(shared_dir, tmp_path):
    recorded, entries = repeat_curve(shared_dir, tmp_path, steps=4)
    assert_same_curve(recorded, entries, 4)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_trls_whole_curve(shared_dir, tmp_path):
    recorded, entries = repeat_curve(shared_dir, tmp_path, steps=25)
    assert_same_curve(recorded, entries, 25)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_200_real_pairs_are_learned(shared_dir, tmp_path, capsys):
    """At least 0.9 training accuracy; what of it carries over to unseen pairs is printed with its standard error."""
    args = RewardConfig(
        str(tmp_path), model_name_or_path=str(shared_dir / "models" / "hh-tiny"), on_bad_row="skip", max_length=512,
        dataset_name=str(shared_dir / "data" / "hh_harmless.jsonl.gz"), dataset_train_split="train[:202]",
        dataset_test_split="train[-100:]", num_train_epochs=4, per_device_train_batch_size=8, use_cpu=True,
        gradient_checkpointing=False, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = RewardTrainer(args=args)
    assert len(trainer.train_dataset) == 200
    trainer.train()
    seen, unseen = trainer.evaluate(trainer.train_dataset), trainer.evaluate()
    with capsys.disabled():
        print(
            f"\ntraining accuracy {seen['eval_accuracy']:.3f}, held-out {unseen['eval_accuracy']:.3f} ± "
            f"{unseen['eval_accuracy_se']:.3f}, margin {unseen['eval_margin']:.3f} ± {unseen['eval_margin_se']:.3f}"
        )
    assert seen["eval_accuracy"] >= 0.9
    assert unseen["eval_accuracy_se"] > 0
