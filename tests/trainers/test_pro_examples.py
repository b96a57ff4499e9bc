"""Data of PRO: ranked lists and pairs, as rows and tokenised, and what is refused."""

import pytest
from datasets import Dataset

from fastalign.data import prepare_preferences
from fastalign.trainers.pro_examples import single_responses, with_list_logps
from fastalign.trainers.reference import RESPONSES

ROWS = [
    {"prompt": "w3 w9", "completions": [" w10", " w11 w12", " w13"], "ranking": "C > A = B"},
    {"prompt": "w4", "completions": [" w14", " w15"], "ranking": "1 > 2"},
]
SCORED = [{"prompt": "w3", "completions": [" w10", " w11", " w12"], "score": [0.5, 2.0, 0.5]}]
PAIRS = [
    {"prompt": "w3", "chosen": " w10", "rejected": " w11"},
    {"prompt": "w4", "chosen": " w12", "rejected": " w13"},
    {"prompt": "w3", "chosen": " w11", "rejected": " w12"},
]


def batch_of(trainer):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])


def test_rankings_reach_the_batch(kit):
    trainer = kit.pro(train=ROWS)
    batch = batch_of(trainer)
    assert batch["ranks"].tolist() == [2, 2, 1, 1, 2]
    assert batch["groups"].tolist() == [0, 0, 0, 1, 1]
    assert "rewards" not in batch
    assert trainer.data_reports["train"].kept == 2
    assert trainer.train_dataset["length"][:] == [5, 3]  # w3 w9 w11 w12 <eos>


def test_scores_become_rewards_where_temperatures_are_asked_for(kit):
    assert batch_of(kit.pro(train=SCORED, reward_temperatures=True))["rewards"].tolist() == [0.5, 2.0, 0.5]
    assert "rewards" not in batch_of(kit.pro(train=SCORED))
    tokenised = kit.lists(3, scores=True)
    assert "rewards" in batch_of(kit.pro(train=tokenised, reward_temperatures=True))
    assert "rewards" not in batch_of(kit.pro(train=tokenised))
    with pytest.raises(ValueError, match="row 0: missing key"):
        kit.pro(train=ROWS, reward_temperatures=True)


@pytest.mark.parametrize("tokenised", [False, True])
def test_pairs_are_lists_of_two_or_merged(kit, tokenised):
    data = prepare_preferences(PAIRS, kit.tokenizer).dataset if tokenised else PAIRS
    assert batch_of(kit.pro(train=data))["groups"].tolist() == [0, 0, 1, 1, 2, 2]
    merged = batch_of(kit.pro(train=data, merge_pairs=True))
    assert merged["groups"].tolist() == [0, 0, 0, 1, 1]
    assert merged["ranks"].tolist() == [1, 2, 3, 1, 2]


def test_evaluation_data_may_be_of_another_kind(kit):
    trainer = kit.pro(train=ROWS, evaluation={"pairs": PAIRS, "lists": kit.lists(3)})
    metrics = trainer.evaluate()
    assert metrics["eval_pairs_loss"] > 0
    assert metrics["eval_lists_loss"] > 0


def test_single_responses_and_back(kit):
    lists = kit.lists(4)
    single = single_responses(lists)
    assert single.column_names == ["prompt_ids", "row", "completion_ids"]
    assert set(RESPONSES.columns) <= set(single.column_names)
    assert single["completion_ids"][:] == [ids for own in lists["response_ids"] for ids in own]
    assert single["row"][:] == [i for i, own in enumerate(lists["response_ids"]) for _ in own]
    logps = [[-float(i)] * len(ids) for i, ids in enumerate(single["completion_ids"])]
    column = Dataset.from_dict({"x": logps}).with_format("arrow")[:]["x"]
    joined = with_list_logps(lists.select([3, 0, 1, 2]).select([1, 2, 3, 0]), column)
    assert [own for row in joined["ref_response_logps"] for own in row] == logps
    assert list(map(len, joined["ref_response_logps"])) == list(map(len, lists["ranks"]))


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"ranks": None}, {}, "the tokenised data set has no ranks"),
        ({"response_ids": None}, {}, "has no response_ids"),
        ({}, {"reward_temperatures": True}, "has no scores"),
        ({"ranks": [1.0]}, {}, "ranks of row 1 of the tokenised data set are not one for each response"),
        ({"prompt_ids": []}, {}, "prompt_ids of row 1 of the tokenised data set is empty"),
        ({"response_ids": [[3], []], "ranks": [1.0, 2.0]}, {}, "response_ids of row 1 of the tokenised data set is em"),
        ({"response_ids": [], "ranks": []}, {}, "response_ids of row 1 of the tokenised data set is empty"),
        ({"prompt_ids": [3] * 60}, {"max_length": 40}, "row 1 of the tokenised data set has .* max_length=40"),
    ],
)
def test_tokenised_data_are_checked(kit, change, settings, message):
    rows = kit.lists(3).to_list()
    rows[1] |= change
    dropped = [name for name, value in change.items() if value is None]
    with pytest.raises(ValueError, match=message):
        kit.pro(train=Dataset.from_list(rows).remove_columns(dropped), **settings)


def test_scores_that_contradict_the_ranks_are_refused(kit):
    rows = kit.lists(3, scores=True).to_list()
    rows[2]["scores"] = [-x for x in rows[2]["scores"]]
    with pytest.raises(ValueError, match="row 2 of the tokenised data set ranks a response before one of a higher"):
        kit.pro(train=Dataset.from_list(rows), reward_temperatures=True)


def test_rows_without_a_ranking_are_refused(kit):
    with pytest.raises(ValueError, match="the first rows hold no ranking"):
        kit.pro(train=[{"prompt": "w3", "completion": " w4"}])
    with pytest.raises(ValueError, match="needs a score for every response, and the data are pairs"):
        kit.pro(train=PAIRS, reward_temperatures=True)
