"""Lists to pairs and back: as rows and tokenised, one the same as the other."""

import pytest
from datasets import Dataset

from fastalign.data import PAIRINGS, lists_to_pairs, pairs_to_lists, prepare_lists, prepare_preferences

LISTS = [
    {"prompt": "p", "completions": [" a", " b", " c", " d"], "ranking": "D > C > A = B", "note": 1},
    {"prompt": "q", "completions": [" e", " f"], "score": [0.1, 0.2]},
    {"prompt": "r", "completions": [" g", " h", " i"], "rank": [5, 5, 9], "tools": None},
]
PAIRS = {
    "best_rest": [("p", "da"), ("p", "db"), ("p", "dc"), ("q", "fe"), ("r", "gi"), ("r", "hi")],
    "all": [("p", "ca"), ("p", "cb"), ("p", "da"), ("p", "db"), ("p", "dc"), ("q", "fe"), ("r", "gi"), ("r", "hi")],
    "adjacent": [("p", "ca"), ("p", "cb"), ("p", "dc"), ("q", "fe"), ("r", "gi"), ("r", "hi")],
}


def shortened(rows):
    return [(row["prompt"], row["chosen"].strip() + row["rejected"].strip()) for row in rows]


@pytest.mark.parametrize("pairs", PAIRINGS)
def test_rows_to_pairs(pairs):
    rows = lists_to_pairs(LISTS, pairs)
    assert shortened(rows) == PAIRS[pairs]
    assert all(row.keys() == {"prompt", "chosen", "rejected"} for row in rows)
    columns = {name: [row.get(name) for row in LISTS] for row in LISTS for name in row}  # None where a row has none
    assert lists_to_pairs(Dataset.from_dict(columns), pairs) == rows


@pytest.mark.parametrize("pairs", PAIRINGS)
def test_tokenised_lists_to_pairs_are_the_tokenised_pairs(pairs, text_tokenizer):
    data = lists_to_pairs(prepare_lists(LISTS, text_tokenizer).dataset, pairs)
    expected = prepare_preferences(lists_to_pairs(LISTS, pairs), text_tokenizer).dataset
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert data[name][:] == expected[name][:]
    assert [LISTS[row]["prompt"] for row in data["row"]] == [prompt for prompt, _ in PAIRS[pairs]]


def test_a_selection_of_a_tokenised_data_set_is_converted(text_tokenizer):
    """Datasets with an indices mapping, and of several chunks."""
    from datasets import concatenate_datasets

    lists = prepare_lists(LISTS, text_tokenizer).dataset
    picked = lists.select([2, 0])
    assert lists_to_pairs(picked, "all")["row"][:] == [2, 2, 0, 0, 0, 0, 0]
    twice = concatenate_datasets([lists, lists])
    one, two = lists_to_pairs(lists), lists_to_pairs(twice)
    assert two["rejected_ids"][:] == one["rejected_ids"][:] * 2
    back = pairs_to_lists(concatenate_datasets([one, one]), merge=True)
    assert len(back) == 3


def test_chats_keep_what_the_template_takes():
    row = {
        "prompt": [{"role": "user", "content": "hi"}], "completions": ["yes", "no"], "rank": [2, 1],
        "chat_template_kwargs": {"x": 1},
    }  # fmt: skip
    (pair,) = lists_to_pairs([row])
    assert pair == {
        "prompt": row["prompt"], "chosen": "no", "rejected": "yes", "chat_template_kwargs": {"x": 1}
    }  # fmt: skip
    (back,) = pairs_to_lists([pair])
    assert back == {
        "prompt": row["prompt"], "completions": ["no", "yes"], "rank": [1, 2], "chat_template_kwargs": {"x": 1}
    }  # fmt: skip


def test_pairs_to_lists_of_two():
    rows = lists_to_pairs(LISTS)
    lists = pairs_to_lists(rows)
    assert [row["completions"] for row in lists] == [[row["chosen"], row["rejected"]] for row in rows]
    assert all(row["rank"] == [1, 2] for row in lists)
    assert lists_to_pairs(lists) == rows


def test_pairs_to_lists_merged():
    lists = pairs_to_lists(lists_to_pairs(LISTS, "all"), merge=True)
    assert lists == [
        {"prompt": "p", "completions": [" d", " c", " a", " b"], "rank": [1, 2, 3, 3]},
        {"prompt": "q", "completions": [" f", " e"], "rank": [1, 2]},
        {"prompt": "r", "completions": [" g", " h", " i"], "rank": [1, 1, 2]},
    ]
    assert pairs_to_lists(lists_to_pairs(LISTS, "best_rest"), merge=True)[0]["rank"] == [1, 2, 2, 2]


@pytest.mark.parametrize("merge", [False, True])
def test_tokenised_pairs_to_lists_are_the_tokenised_lists(merge, text_tokenizer):
    rows = lists_to_pairs(LISTS, "all")
    data = pairs_to_lists(prepare_preferences(rows, text_tokenizer).dataset, merge=merge)
    expected = prepare_lists(pairs_to_lists(rows, merge=merge), text_tokenizer).dataset
    for name in ("prompt_ids", "response_ids", "ranks"):
        assert data[name][:] == expected[name][:]
        assert data.features[name] == expected.features[name]
    assert data["row"][:] == ([0, 5, 6] if merge else list(range(8)))


def test_the_same_completion_of_another_prompt_is_another_one():
    rows = [{"prompt": p, "chosen": " a", "rejected": " b"} for p in "pq"]
    assert len(pairs_to_lists(rows, merge=True)) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lists_to_pairs(LISTS, "first"), "pairs 'first' is unknown; accepted are 'best_rest', 'all'"),
        (lambda: lists_to_pairs([LISTS[0], {"prompt": "p"}]), "row 1: missing key: no completions"),
        (lambda: lists_to_pairs([LISTS[1] | {"score": [1, 1]}]), "row 0: unsupported content: score orders nothing"),
        (lambda: pairs_to_lists([{"prompt": "p", "chosen": "a"}]), "row 0: missing key: no rejected"),
        (lambda: pairs_to_lists([{"chosen": "a", "rejected": "b"}]), "row 0: missing key: no prompt"),
        (lambda: pairs_to_lists(["a"]), "row 0: wrong type"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
