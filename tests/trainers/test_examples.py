"""Data sets as they are handed in."""

import json

import pytest

from fastalign.data import BadRowsError
from fastalign.trainers import DPOTrainer


def test_rows_are_tokenised_and_bad_ones_reported(kit):
    rows = [*kit.messages(6), {"prompt": "w3", "chosen": " w4", "rejected": " w4"}]
    with pytest.raises(BadRowsError, match="row 6"):
        kit.trainer(kit.model(), rows)
    trainer = kit.trainer(kit.model(), rows, on_bad_row="skip", max_steps=1)
    assert trainer.data_reports["train"].kept == 6
    trainer.train()


def test_data_named_in_the_config(kit):
    file = kit.folder / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in kit.messages(10)))
    kit.model().save_pretrained(kit.folder / "policy")
    kit.tokenizer.save_pretrained(kit.folder / "policy")
    args = kit.config(
        model_name_or_path=str(kit.folder / "policy"), dataset_name=str(file), dataset_train_split="train[:8]",
        dataset_test_split="train[8:]", max_steps=1,
    )  # fmt: skip
    trainer = DPOTrainer(args=args)
    trainer.train()
    assert len(trainer.train_dataset) == 8
    assert len(trainer.eval_dataset) == 2
    assert "eval_loss" in trainer.evaluate()


def test_tokenised_rows_are_checked(kit):
    pairs = kit.pairs(3)
    with pytest.raises(ValueError, match=r"row \d of the tokenised data set has \d+ tokens, max_length=8"):
        kit.trainer(kit.model(), pairs, max_length=8)
    empty = pairs.map(lambda row: {"chosen_ids": [] if row["row"] == 1 else row["chosen_ids"]})
    with pytest.raises(ValueError, match="chosen_ids of row 1"):
        kit.trainer(kit.model(), empty)
