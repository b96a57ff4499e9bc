"""Cutting a batch between pairs: every piece is what the collator would have made of its pairs alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.data import PreferenceCollator
from fastalign.trainers.batches import grouped_by_prompt, num_examples, sequence_lengths, split_batch

IDS = st.lists(st.integers(1, 50), min_size=1, max_size=9)
EXAMPLE = st.fixed_dictionaries({"prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS})


def with_reference(examples):
    rng = np.random.default_rng(0)
    for example in examples:
        for side in ("chosen", "rejected"):
            example[f"ref_{side}_logps"] = rng.normal(size=len(example[f"{side}_ids"])).astype(np.float32)
    return examples


def longest(example):
    return len(example["prompt_ids"]) + max(len(example["chosen_ids"]), len(example["rejected_ids"]))


def assert_same_batch(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(got[name], value), name
        else:
            np.testing.assert_array_equal(got[name], value)


@settings(max_examples=60, deadline=None)
@given(st.lists(EXAMPLE, min_size=1, max_size=6), st.integers(0, 60), st.sampled_from([None, 4]), st.integers(1, 7))
def test_pieces_are_the_batches_of_their_pairs(examples, max_tokens, multiple_of, keep):
    examples = with_reference(examples)
    collate = PreferenceCollator(0, pad_to_multiple_of=multiple_of)
    pieces = split_batch(collate(examples), max_tokens, examples=keep, multiple_of=multiple_of)
    kept = examples[:keep]
    order = sorted(range(len(kept)), key=lambda i: -longest(kept[i]))
    taken = []
    for piece in pieces:
        pairs = num_examples(piece)
        members = sorted(order[len(taken) : len(taken) + pairs])
        assert_same_batch(piece, collate([kept[i] for i in members]))
        width = max(longest(kept[i]) for i in members)
        assert pairs == 1 or max_tokens == 0 or 2 * pairs * width <= max_tokens
        taken += members
    assert sorted(taken) == list(range(len(kept)))


def test_lengths_are_known_on_the_host():
    batch = PreferenceCollator(0)(
        [
            {"prompt_ids": [1, 2, 3], "chosen_ids": [4], "rejected_ids": [5, 6]},
            {"prompt_ids": [7], "chosen_ids": [8, 9, 1, 2], "rejected_ids": [3]},
        ]
    )
    assert sequence_lengths(batch).tolist() == batch["attention_mask"].sum(1).tolist() == [4, 5, 5, 2]


@pytest.mark.parametrize("max_tokens", [0, 10_000])
def test_a_batch_that_fits_is_left_as_it_is(max_tokens):
    batch = PreferenceCollator(0)(with_reference([{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}] * 3))
    assert split_batch(batch, max_tokens)[0] is batch


def test_no_pairs_give_no_pieces():
    batch = PreferenceCollator(0)([{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}])
    assert split_batch(batch, 0, examples=0) == []


def test_completions_of_a_prompt_are_grouped():
    batch = {
        "prompts": np.array([0, 0, 2, 5, 5, 5]), "lengths": np.array([5, 6, 4, 9, 8, 7]),
        "cu_seqlens": np.array([0, 2, 5, 7, 12, 16, 19]), "groups": np.arange(6),
    }  # fmt: skip
    grouped = grouped_by_prompt(batch)
    assert grouped["groups"].tolist() == [0, 0, 1, 2, 2, 2]
    assert grouped["prefix_lengths"].tolist() == [3, 0, 4]
    # a prompt and two of its three completions are 13 tokens
    cut = grouped_by_prompt(batch, max_tokens=13)
    assert cut["groups"].tolist() == [0, 0, 1, 2, 2, 3]
    assert cut["prefix_lengths"].tolist() == [3, 0, 4, 0]
    # wherever in the batch they are
    order = np.array([3, 0, 5, 2, 1, 4])
    mixed = {"prompts": batch["prompts"][order], "lengths": batch["lengths"][order], "groups": np.arange(6)}
    mixed["cu_seqlens"] = np.concatenate([[0], np.cumsum(np.diff(batch["cu_seqlens"])[order])])
    assert grouped_by_prompt(mixed)["groups"].tolist() == [2, 0, 2, 1, 0, 2]
    assert grouped_by_prompt(mixed)["prefix_lengths"].tolist() == [3, 0, 4]
