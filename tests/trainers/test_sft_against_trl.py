"""Real responses and a real checkpoint against TRL 1.16.0: the same batches, labels and loss curve."""

import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from fastalign.trainers import SFTConfig, SFTTrainer

torch.set_num_threads(1)
CURVE = Path(__file__).parent / "golden" / "trl_sft_curve.json"
RECORDED = json.loads(CURVE.read_text())
CASES = tuple(RECORDED["cases"])


class Rows(list):
    """Offensive texts: a failing test must not print them."""

    def __repr__(self):
        return f"{len(self)} rows"


@pytest.fixture(scope="module")
def rows(shared_dir):
    with gzip.open(shared_dir / "data" / RECORDED["data"], "rt", encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    return Rows(found[i] for i in RECORDED["rows"])


class StopAfter(TrainerCallback):
    """The schedule is that of the whole curve, of which the first steps are run."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


class Recording:
    """A collator that notes the checksums of a batch's real tokens, and of its labels as TRL has them."""

    def __init__(self, collator, with_first):
        self.collator, self.with_first, self.checksums = collator, with_first, []

    def __call__(self, examples):
        batch = self.collator(examples)
        real, ids = batch["attention_mask"].bool(), batch["input_ids"]
        labels = torch.full_like(ids, -100)
        labels[:, 1:] = batch["targets"][:, :-1]
        if self.with_first:  # TRL labels a first token too, which the model's shift drops
            labels[:, 0] = ids[:, 0]
        self.checksums.append([zlib.crc32(x[real].to(torch.int32).numpy().tobytes()) for x in (ids, labels)])
        return batch


def repeat_curve(shared_dir, rows, folder, case, steps):
    recorded = RECORDED["cases"][case]
    options = {name: recorded[name] for name in ("completion_only_loss",) if name in recorded}
    args = SFTConfig(
        str(folder), use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True,
        **RECORDED["settings"], **options,
    )  # fmt: skip
    trainer = SFTTrainer(
        str(shared_dir / "models" / RECORDED["model"]), args,
        train_dataset=Rows(rows[: steps * args.train_batch_size]), callbacks=[StopAfter(steps)],
    )  # fmt: skip
    trainer.data_collator = collator = Recording(trainer.data_collator, with_first=case == "everything")
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert collator.checksums[:steps] == recorded["batch_checksums"][:steps]
    assert len(entries) == steps
    for name, tolerance in (("loss", 1e-5), ("entropy", 1e-4), ("mean_token_accuracy", 2e-3), ("num_tokens", 0)):
        ours = [entry[name] for entry in entries]
        np.testing.assert_allclose(ours, recorded["logs"][name][:steps], rtol=0, atol=tolerance, err_msg=name)
    norms = [entry["grad_norm"] for entry in entries]
    np.testing.assert_allclose(norms, recorded["logs"]["grad_norm"][:steps], rtol=1e-4, err_msg="grad_norm")


@pytest.mark.parametrize("case", CASES)
def test_the_first_steps_of_trls_curve(shared_dir, rows, tmp_path, case):
    repeat_curve(shared_dir, rows, tmp_path, case, steps=4)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_trls_whole_curve(shared_dir, rows, tmp_path, case):
    repeat_curve(shared_dir, rows, tmp_path, case, steps=RECORDED["settings"]["max_steps"])


def test_packing_real_conversations_changes_nothing(shared_dir, rows, tmp_path):
    """One step over sixteen conversations, every assistant turn trained on, padded and packed."""
    found = []
    for packing in (False, True):
        args = SFTConfig(
            str(tmp_path), use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=1,
            max_steps=1, per_device_train_batch_size=16, max_length=512, packing=packing, optim="sgd",
            learning_rate=0.1, max_grad_norm=0.0, assistant_only_loss=True, completion_only_loss=False,
        )  # fmt: skip
        trainer = SFTTrainer(str(shared_dir / "models" / RECORDED["model"]), args, train_dataset=Rows(rows[:16]))
        trainer.train()
        found.append((trainer.state.log_history[0], dict(trainer.model.named_parameters()), len(trainer.train_dataset)))
    (padded, weights, _), (packed, packed_weights, bins) = found
    assert bins <= 8
    for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm"):
        assert packed[name] == pytest.approx(padded[name], rel=1e-5), name
    for name, weight in weights.items():
        torch.testing.assert_close(packed_weights[name], weight, rtol=1e-5, atol=1e-6)
