"""Labelled responses: pairs taken apart, mismatched responses, and batches against a naive loop."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from fastalign.data.unpaired import UnpairedCollator, unpair, with_mismatched
from fastalign.trainers.batches import num_examples, split_batch

PAD = 3  # also an ordinary token
ids = st.lists(st.integers(0, 9), min_size=1, max_size=7)
example = st.fixed_dictionaries(
    {"prompt_ids": ids, "completion_ids": ids, "kl_completion_ids": ids, "label": st.booleans()}
)
examples = st.lists(example, min_size=1, max_size=6)


def with_logps(rows):
    rng = np.random.default_rng(0)
    for row in rows:
        row["ref_completion_logps"] = -rng.random(len(row["completion_ids"]))
        row["ref_kl_logps"] = -rng.random(len(row["kl_completion_ids"]))
    return rows


def assert_is_the_naive_batch(batch, rows, completion, logps):
    width, flat, sums = batch["input_ids"].shape[1], [], []
    for b, row in enumerate(rows):
        whole = row["prompt_ids"] + row[completion]
        assert batch["input_ids"][b].tolist() == whole + [PAD] * (width - len(whole))
        start = len(row["prompt_ids"]) - 1
        expected = [-100] * width
        expected[start : start + len(row[completion])] = row[completion]
        assert batch["targets"][b].tolist() == expected
        flat += [b * width + start + t for t in range(len(row[completion]))]
        sums.append(row[logps].sum())
    assert batch["rows"].tolist() == flat
    assert np.diff(batch["cu_seqlens"]).tolist() == [len(row[completion]) for row in rows]
    np.testing.assert_allclose(batch["ref_per_token_logps"], np.concatenate([row[logps] for row in rows]), rtol=1e-6)
    np.testing.assert_allclose(batch["ref_logps"], sums, rtol=1e-6)


@given(examples, st.sampled_from([None, 1, 8]))
def test_a_batch_equals_the_naive_loop(rows, multiple):
    batch = UnpairedCollator(PAD, multiple)(with_logps(rows))
    assert batch["labels"].dtype == torch.bool
    assert batch["labels"].tolist() == [row["label"] for row in rows]
    assert_is_the_naive_batch(batch, rows, "completion_ids", "ref_completion_logps")
    assert_is_the_naive_batch(batch["kl"], rows, "kl_completion_ids", "ref_kl_logps")
    assert num_examples(batch) == num_examples(batch["kl"]) == len(rows)
    for part in (batch, batch["kl"]):
        same = [[a["prompt_ids"] == b["prompt_ids"] for b in rows] for a in rows]
        assert (part["prompts"][:, None] == part["prompts"]).tolist() == same


@given(examples, st.integers(0, 30))
def test_cutting_a_batch_loses_nothing(rows, max_tokens):
    batch = UnpairedCollator(PAD)(with_logps(rows))
    for whole in (batch["kl"], {name: value for name, value in batch.items() if name != "kl"}):
        pieces = split_batch(whole, max_tokens)
        assert sum(num_examples(piece) for piece in pieces) == len(rows)
        for name in ("ref_logps", "ref_per_token_logps"):
            values = torch.cat([piece[name] for piece in pieces]).sort().values
            assert torch.equal(values, whole[name].sort().values)


def test_examples_that_do_not_fit_are_refused():
    collate = UnpairedCollator(PAD)
    good = {"prompt_ids": [4], "completion_ids": [5, 6], "label": True, "row": 7}
    for bad, message in (
        ({"completion_ids": []}, "completion_ids of row 7 is empty"),
        ({"prompt_ids": []}, "prompt_ids of row 7 is empty"),
        ({"ref_completion_logps": [0.0]}, "ref_completion_logps of row 7 has 1 values for 2 completion_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            collate([good | bad])
    for name, value in (("kl_completion_ids", [5]), ("ref_completion_logps", [0.0, 0.0])):
        with pytest.raises(ValueError, match=f"some examples have {name}"):
            collate([good, good | {name: value}])
    with pytest.raises(ValueError, match="pad_token_id"):
        UnpairedCollator(None)


def test_pairs_are_taken_apart_in_order():
    pairs = [{"prompt_ids": [i], "chosen_ids": [i, 10], "rejected_ids": [i, 20], "row": 5 * i} for i in range(5)]
    data = Dataset.from_list(pairs).select([3, 1, 4])
    got = list(unpair(data))
    assert [(e["prompt_ids"], e["completion_ids"], e["label"], e["row"]) for e in got] == [
        ([i], [i, token], label, 5 * i) for i in (3, 1, 4) for token, label in ((10, True), (20, False))
    ]
    assert unpair(data)._fingerprint == unpair(data)._fingerprint != unpair(data.select([0, 1]))._fingerprint


def responses(*prompts):
    return Dataset.from_list([{"prompt_ids": [p], "completion_ids": [100 + i] * 4} for i, p in enumerate(prompts)])


def partners(data):
    return [ids[0] - 100 for ids in data["kl_completion_ids"]]


def test_mismatched_responses_are_those_of_the_next_example():
    assert partners(with_mismatched(responses(1, 2, 3, 4))) == [1, 2, 3, 0]


def test_no_response_counts_as_mismatched_to_its_own_prompt():
    assert partners(with_mismatched(responses(1, 1, 1, 2, 2, 1))) == [3, 3, 3, 5, 5, 3]
    assert partners(with_mismatched(responses(1, 1, 2, 2, 3, 3), stride=2)) == [2, 3, 4, 5, 0, 1]
    # two apart there are equal prompts alone
    assert partners(with_mismatched(responses(1, 2, 1, 2), stride=2)) == [1, 2, 3, 0]
    with pytest.raises(ValueError, match="3 examples have one prompt"):
        with_mismatched(responses(1, 1, 1))


def test_mismatched_responses_fit_max_length():
    data = Dataset.from_list(
        [{"prompt_ids": [1] * 5, "completion_ids": [2]}, {"prompt_ids": [1], "completion_ids": [3] * 5}]
    )
    got = with_mismatched(data, max_length=7)["kl_completion_ids"]
    assert [list(ids) for ids in got] == [[3] * 2, [2]]
    part = with_mismatched(data.select([1, 0, 1]).select([1, 2]), max_length=9)  # rows in another order than stored
    assert [list(ids) for ids in part["kl_completion_ids"]] == [[3] * 4, [2]]
    again = with_mismatched(with_mismatched(data), max_length=7)  # made anew
    assert [list(ids) for ids in again["kl_completion_ids"]] == [[3] * 2, [2]]
