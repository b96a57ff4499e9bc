"""Data of reward models: kinds told apart by their columns, labels, margins, tokenised data that are checked."""

import pytest
from datasets import Dataset


def text_rows(kind: str, n: int = 6) -> list[dict]:
    if kind == "pairs":
        return [{"prompt": f"w{3 + i} w9", "chosen": f" w{10 + i} w4", "rejected": f" w{20 + i}"} for i in range(n)]
    if kind == "lists":
        sizes = [2 + i % 3 for i in range(n)]
        return [
            {"prompt": f"w{3 + i}", "completions": [f" w{10 + i + j}" for j in range(k)], "score": list(range(k))}
            for i, k in enumerate(sizes)
        ]
    return [{"prompt": f"w{3 + i}", "completion": f" w{10 + i}", "label": i % 2} for i in range(n)]


def test_kinds_are_told_apart_by_their_columns_and_may_be_mixed_in_evaluation(rewards):
    held_out = {"pairs": text_rows("pairs"), "lists": text_rows("lists"), "labels": text_rows("labels")}
    trainer = rewards.trainer(rewards.model(), text_rows("lists"), held_out, max_steps=2)
    trainer.train()
    metrics = trainer.evaluate()
    for name in ("pairs", "lists", "labels"):
        assert metrics[f"eval_{name}_loss"] > 0
        assert metrics[f"eval_{name}_accuracy_se"] > 0
    assert "eval_pairs_length/chosen" in metrics
    assert trainer.data_reports["lists"].kept == 6
    assert trainer.evaluate(text_rows("pairs"), metric_key_prefix="more")["more_loss"] == metrics["eval_pairs_loss"]


def test_labels_settle_their_type_once(rewards):
    floats = [row | {"label": 0.5} for row in text_rows("labels")]
    assert rewards.trainer(rewards.model(), text_rows("labels"))._examples.label_type == "binary"
    assert rewards.trainer(rewards.model(), floats, text_rows("labels"))._examples.label_type == "scalar"
    assert rewards.trainer(rewards.model(), text_rows("labels"), label_type="scalar")._examples.label_type == "scalar"
    with pytest.raises(ValueError, match="label is neither 0 nor 1"):
        rewards.trainer(rewards.model(), text_rows("labels"), floats)
    with pytest.raises(ValueError, match="those of the train data are others than 0 and 1"):
        rewards.trainer(rewards.model(), rewards.labels(4), label_type="binary")


def test_margins_reach_the_loss(rewards, kit):
    def first(rows):
        trainer = rewards.trainer(rewards.model(), rows, max_steps=1, per_device_train_batch_size=6)
        trainer.train()
        return kit.logs(trainer)[0]["loss"]

    plain = text_rows("pairs")
    assert (
        first([row | {"margin": 3.0} for row in plain])
        > first(plain)
        > first([row | {"margin": -3.0} for row in plain])
    )
    with pytest.raises(ValueError, match="row 5: missing key"):
        first([row | {"margin": 1.0} for row in plain[:5]] + plain[5:])


def test_responses_that_end_with_the_pad_token_are_counted(rewards, caplog):
    rows = rewards.pairs(4).to_list()
    rows[1]["chosen_ids"][-1] = rows[3]["rejected_ids"][-1] = rewards.tokenizer.pad_token_id
    rewards.trainer(rewards.model(), Dataset.from_list(rows))
    assert "2 responses of the train data end with the pad token 0" in caplog.text
    caplog.clear()
    lists = rewards.lists(3).to_list()
    lists[2]["response_ids"][0][-1] = rewards.tokenizer.pad_token_id
    rewards.trainer(rewards.model(), Dataset.from_list(lists))
    assert "1 responses of the train data end with the pad token 0" in caplog.text
    caplog.clear()
    rewards.trainer(rewards.model(), rewards.pairs(4))
    assert "pad token" not in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen_ids": []}, "chosen_ids of row 1 of the tokenised data set is empty"),
        ({"rejected_ids": [3] * 2000}, "row 1 of the tokenised data set has 20.. tokens, max_length=1024"),
    ],
)
def test_tokenised_data_are_checked(rewards, change, message):
    rows = rewards.pairs(3).to_list()
    rows[1] |= change
    with pytest.raises(ValueError, match=message):
        rewards.trainer(rewards.model(), Dataset.from_list(rows))


def test_tokenised_lists_are_checked(rewards):
    rows = rewards.lists(3).to_list()
    rows[2]["response_ids"][1] = []
    with pytest.raises(ValueError, match="response_ids of row 2 of the tokenised data set is empty"):
        rewards.trainer(rewards.model(), Dataset.from_list(rows))
    with pytest.raises(ValueError, match="has response_ids and no ranks"):
        rewards.trainer(rewards.model(), rewards.lists(3).remove_columns("ranks"))
