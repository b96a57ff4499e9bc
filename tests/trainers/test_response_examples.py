"""Data for losses on single responses, as they are handed in."""

import json
import logging

import pytest
from datasets import Dataset

from fastalign.data import BadRowsError, prepare_labelled
from fastalign.trainers.response_examples import ResponseExamples


@pytest.fixture
def examples(kit):
    def make(**settings):
        return ResponseExamples(kit.tokenizer, kit.config(**({"loss_type": "kto"} | settings)))

    return make


def rows(n, label=lambda i: i % 3 == 0):
    return [{"prompt": f"w{3 + i} w9", "completion": f" w{10 + i}", "label": label(i)} for i in range(n)]


def words(data, name):
    return [list(ids) for ids in data[name]]


def test_labelled_rows(kit, examples):
    data = examples().prepare(rows(5), "train")
    expected, _ = prepare_labelled(rows(5), kit.tokenizer, label_type="binary")
    assert words(data, "completion_ids") == words(expected, "completion_ids")
    assert list(data["label"]) == [True, False, False, True, False]
    shifted = words(data, "completion_ids")
    assert words(data, "kl_completion_ids") == shifted[1:] + shifted[:1]
    assert "kl_completion_ids" not in examples(loss_type="bco").prepare(rows(5), "train").column_names


def test_pairs_become_a_good_and_a_bad_response(kit, examples):
    data = examples().prepare(kit.messages(4), "train")
    tokens = [ids[0] for ids in data["completion_ids"]]
    assert tokens == [10, 20, 11, 21, 12, 22, 13, 23]
    assert list(data["label"]) == [True, False] * 4
    assert list(data["row"]) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [ids[0] for ids in data["kl_completion_ids"]] == [11, 21, 12, 22, 13, 23, 10, 20]
    tokenised = kit.pairs(4)
    found = examples().prepare(tokenised, "train")
    assert words(found, "completion_ids")[:2] == [tokenised[0]["chosen_ids"], tokenised[0]["rejected_ids"]]


def test_mismatched_responses_that_are_given_are_kept(examples):
    given = [{"prompt_ids": [4], "completion_ids": [5], "kl_completion_ids": [6, 7], "label": 1} for _ in range(2)]
    data = examples().prepare(Dataset.from_list(given), "train")
    assert words(data, "kl_completion_ids") == [[6, 7], [6, 7]]


def test_bad_rows_and_bad_data(examples):
    with pytest.raises(BadRowsError, match="row 3: wrong type"):
        examples().prepare(rows(4, label=lambda i: i / 2), "train")
    with pytest.raises(ValueError, match=r"kto.*the first rows have neither"):
        examples().prepare([{"prompt": "w3", "completion": " w4"}], "train")
    tokenised = [{"prompt_ids": [4 + i], "completion_ids": [5]} for i in range(3)]
    with pytest.raises(ValueError, match="no label"):
        examples().prepare(Dataset.from_list(tokenised), "train")
    with pytest.raises(ValueError, match=r"label of row 2 .* is 2"):
        examples().prepare(Dataset.from_list([e | {"label": i} for i, e in enumerate(tokenised)]), "train")
    labelled = [e | {"label": True} for e in tokenised]
    labelled[1]["completion_ids"] = []
    with pytest.raises(ValueError, match="completion_ids of row 1"):
        examples().prepare(Dataset.from_list(labelled), "train")
    with pytest.raises(ValueError, match="one prompt"):
        examples().prepare([row | {"prompt": "w3"} for row in rows(3)], "train")


def test_imbalance_is_spoken_of(examples, caplog):
    with caplog.at_level(logging.WARNING, "fastalign"):
        examples(desirable_weight=2.0).prepare(rows(9), "train")  # 3 good, 6 bad: 1 to 1
        examples().prepare(rows(9), "eval")
        assert not [record for record in caplog.records if "desirable_weight" in record.message]
        examples().prepare(rows(9), "train")
    assert "3 good and 6 bad" in caplog.text
    assert "desirable_weight from 2.00 to 2.67 beside undesirable_weight=1" in caplog.text


def test_a_trainer_on_a_file_of_labelled_rows(kit):
    file = kit.folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows(12)))
    trainer = kit.trainer(kit.model(), str(file), rows(5), loss_type="kto", max_steps=2)
    trainer.train()
    assert trainer.data_reports["train"].kept == 12
    assert "eval_kl" in trainer.evaluate()


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance", "random"])
def test_sampling_strategies(kit, strategy):
    trainer = kit.trainer(kit.model(), kit.labelled(24), loss_type="kto", train_sampling_strategy=strategy, max_steps=6)
    trainer.train()
    assert trainer.state.global_step == 6
