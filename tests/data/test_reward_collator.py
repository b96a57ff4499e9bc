"""Batches of judged responses against a naive loop, and cut by `split_batch` with nothing lost."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastalign.data.reward_collator import RewardCollator, example_kind
from fastalign.trainers.batches import num_examples, split_batch

PAD = 3  # also an ordinary token: the last token is found from lengths
ids = st.lists(st.integers(0, 9), min_size=1, max_size=7)
number = st.floats(-9, 9, width=32)
pair = st.fixed_dictionaries({"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids, "margin": number})
labelled = st.fixed_dictionaries({"prompt_ids": ids, "completion_ids": ids, "label": number})
ranked = st.lists(st.tuples(ids, st.integers(1, 4)), min_size=2, max_size=5).flatmap(
    lambda items: st.fixed_dictionaries(
        {"prompt_ids": ids, "response_ids": st.just([i for i, _ in items]), "ranks": st.just([r for _, r in items])}
    )
)
batches = st.one_of(*(st.lists(kind, min_size=1, max_size=6) for kind in (pair, labelled, ranked)))


def sequences(examples) -> list[tuple[int, list[int], list[int]]]:
    """(example, prompt, response) in the order of the batch."""
    if "chosen_ids" in examples[0]:
        return [(i, e["prompt_ids"], e[k]) for k in ("chosen_ids", "rejected_ids") for i, e in enumerate(examples)]
    if "response_ids" in examples[0]:
        return [(i, e["prompt_ids"], r) for i, e in enumerate(examples) for r in e["response_ids"]]
    return [(i, e["prompt_ids"], e["completion_ids"]) for i, e in enumerate(examples)]


@given(batches, st.sampled_from([None, 1, 8]))
def test_a_batch_equals_the_naive_loop(examples, multiple):
    batch = RewardCollator(PAD, multiple)(examples)
    expected = sequences(examples)
    width = batch["input_ids"].shape[1]
    assert width % (multiple or 1) == 0
    assert width - max(len(p) + len(r) for _, p, r in expected) < (multiple or 1)
    for b, (example, prompt, response) in enumerate(expected):
        whole = prompt + response
        assert batch["input_ids"][b].tolist() == whole + [PAD] * (width - len(whole))
        assert batch["attention_mask"][b].tolist() == [1] * len(whole) + [0] * (width - len(whole))
        assert batch["rows"][b] == b * width + len(whole) - 1
        assert batch["input_ids"].flatten()[batch["rows"][b]] == whole[-1]
        assert (batch["groups"][b], batch["lengths"][b]) == (example, len(whole))
        assert batch["completion_lengths"][b] == len(response)
    assert batch["cu_seqlens"].tolist() == list(range(len(expected) + 1))
    for name, column in (("margin", "margin"), ("labels", "label")):
        assert (name in batch) == (column in examples[0])
        if name in batch:
            assert batch[name].tolist() == [example[column] for example in examples]
    if "ranks" in batch:
        assert batch["ranks"].tolist() == [rank for example in examples for rank in example["ranks"]]


@given(batches, st.integers(1, 60))
def test_pieces_hold_what_collating_their_examples_gives(examples, max_tokens):
    batch = RewardCollator(PAD)(examples)
    batch["example"] = np.arange(len(examples)) + 100  # by example; +100 so that no other array is as this
    pieces = split_batch(batch, max_tokens)
    assert sorted(int(i) for piece in pieces for i in piece["example"]) == list(range(100, 100 + len(examples)))
    for piece in pieces:
        chosen = [examples[i - 100] for i in piece.pop("example")]
        expected = RewardCollator(PAD)(chosen)
        assert num_examples(piece) == len(chosen)
        assert piece.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(np.asarray(piece[name]), np.asarray(value), err_msg=name)


def test_numpy_examples_and_bools():
    example = {"prompt_ids": np.array([1, 2]), "completion_ids": np.array([3], np.int32), "label": np.bool_(True)}
    batch = RewardCollator(PAD)([example])
    assert batch["input_ids"].tolist() == [[1, 2, 3]]
    assert batch["labels"].dtype == torch.float32


def test_what_cannot_be_collated():
    collate = RewardCollator(PAD)
    one = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [4]}
    other = {"prompt_ids": [1], "completion_ids": [2], "label": 1}
    lists = {"prompt_ids": [1], "response_ids": [[2], [5]], "ranks": [1, 2]}
    assert [example_kind(e) for e in (one, other, lists)] == ["pairs", "labels", "lists"]
    for examples, message in (
        ([], "no examples"),
        ([one, other], "example 0 of the batch is one of pairs, example 1 is not"),
        ([one, one | {"rejected_ids": []}], "a response of example 1 of the batch is empty"),
        ([one | {"prompt_ids": []}], "the prompt of example 0 of the batch is empty"),
        ([one, one | {"margin": 1.0}], "example 1 of the batch differs from example 0: one has a margin"),
        ([lists, lists | {"ranks": [1]}], "example 1 of the batch has 2 responses and 1 ranks"),
        ([{"prompt_ids": [1]}], "accepted are prompt_ids with chosen_ids and rejected_ids, or response_ids, or"),
    ):
        with pytest.raises(ValueError, match=message):
            collate(examples)
