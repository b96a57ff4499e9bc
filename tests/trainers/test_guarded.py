"""A bad step in training: the optimizer does not see it, its rows are named, and the run stops or goes on as asked."""

from __future__ import annotations

import json
import math

import pytest
import torch
from datasets import Dataset

from fastalign.trainers.guards import RECORD, BadStepError

POISON = 60  # a token of one row alone
BAD_ROW = 5


def sequences(without: int | None = None) -> Dataset:
    rows = [{"input_ids": [3 + i, POISON if i == BAD_ROW else 30, 10 + i, 20 + i], "row": 100 + i} for i in range(8)]
    kept = [row | {"completion_mask": [False, True, True, True]} for i, row in enumerate(rows) if i != without]
    return Dataset.from_list(kept)


def trainer(kit, data=None, **settings):
    defaults = {
        "per_device_train_batch_size": 1, "num_train_epochs": 1, "lr_scheduler_type": "constant", "learning_rate": 0.01,
        "train_sampling_strategy": "sequential", "optim": "adamw_torch", "weight_decay": 0.1, "max_grad_norm": 1.0,
    }  # fmt: skip
    made = kit.sft(train=sequences() if data is None else data, **(defaults | settings))
    with torch.no_grad():
        made.model.get_input_embeddings().weight[POISON] = torch.nan
    return made


def record(made) -> list[dict]:
    from pathlib import Path

    return [json.loads(line) for line in (Path(made.args.output_dir) / RECORD).read_text().splitlines()]


def test_a_bad_step_stops_the_run_before_the_weights_change(kit):
    made = trainer(kit)
    with pytest.raises(BadStepError, match=f"step {BAD_ROW + 1}: the loss is nan; rows {100 + BAD_ROW}"):
        made.train()
    (bad,) = record(made)
    assert bad["rows"] == bad["suspects"] == [100 + BAD_ROW]
    assert (bad["step"], bad["action"], bad["loss"]) == (BAD_ROW + 1, "stop", "nan")
    before = trainer(kit, sequences().select(range(BAD_ROW)))
    before.train()
    kit.assert_same(kit.weights(made), kit.weights(before), rtol=0, atol=0, equal_nan=True)


def test_a_step_left_out_moves_neither_weights_nor_moments(kit):
    made = trainer(kit, on_bad_step="skip")
    made.train()
    assert made.state.global_step == 8
    assert made.guard.skipped == 1
    without = trainer(kit, sequences(without=BAD_ROW), on_bad_step="skip")
    without.train()
    assert without.guard.skipped == 0
    kit.assert_same(kit.weights(made), kit.weights(without), rtol=0, atol=0, equal_nan=True)


def test_of_a_batch_in_pieces_the_piece_is_suspected(kit):
    made = trainer(kit, per_device_train_batch_size=4, micro_batch_tokens=4)
    with pytest.raises(BadStepError):
        made.train()
    (bad,) = record(made)
    assert bad["suspects"] == [100 + BAD_ROW]
    assert bad["rows"] == [104, 105, 106, 107]


def test_ignored_it_spoils_the_weights(kit):
    made = trainer(kit, on_bad_step="ignore")
    made.train()
    head = made.model.get_output_embeddings().weight
    assert not head.isfinite().all()


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_beyond_its_limit_is_bad_before_clipping(kit, max_grad_norm):
    made = kit.sft(grad_norm_limit=1e-6, max_grad_norm=max_grad_norm)
    with pytest.raises(BadStepError, match="grad_norm_limit=1e-06"):
        made.train()


def test_a_spike_of_the_loss_is_bad(kit):
    made = kit.sft(train=kit.sequences(120), num_train_epochs=1, loss_spike=4.0, learning_rate=0.0)
    made.train()  # losses of random sequences under constant weights: none is so far off
    spiked = kit.sft(train=kit.sequences(120), num_train_epochs=1, loss_spike=4.0, learning_rate=30.0)
    spiked.guard.losses.extend([0.1] * 50)
    with pytest.raises(BadStepError, match="loss_spike=4"):
        spiked.train()


def test_a_phase_of_ppo_leaves_one_of_its_steps_out(kit):
    """Four mini-batches a phase; whichever is bad is not taken, the last (which Trainer takes) included."""
    taken = []
    for bad in (None, 1, 3):
        made = kit.ppo(on_bad_step="skip", max_steps=1)
        judged, judge = [], made.guard.judge

        def sometimes(loss, norm, bad=bad, judged=judged, judge=judge):
            judged.append((loss, norm))
            return "it was said so" if len(judged) - 1 == bad else judge(loss, norm)

        made.guard.judge = sometimes
        made.train()
        assert len(judged) == 4
        assert all(math.isfinite(value) for pair in judged for value in pair)
        steps = {int(state["step"]) for state in made.optimizer.optimizer.state.values()}
        taken.append(steps)
        assert made.guard.skipped == (bad is not None)
    assert taken == [{4}, {3}, {3}]
    assert all(row["rows"] for row in record(made))


def test_settings_are_checked_when_they_are_made(kit):
    with pytest.raises(ValueError, match="on_bad_step must be one of stop, skip, ignore, got 'halt'"):
        kit.config(on_bad_step="halt")


def test_what_is_remembered_comes_back_from_a_checkpoint(kit):
    made = kit.sft(save_strategy="steps", save_steps=1, max_steps=2)
    made.train()
    again = kit.sft(save_strategy="steps", save_steps=1, max_steps=3)
    again.train(resume_from_checkpoint=str(kit.folder / "out" / "checkpoint-2"))
    assert list(again.guard.losses)[:2] == list(made.guard.losses)
    assert len(again.guard.losses) == 3
