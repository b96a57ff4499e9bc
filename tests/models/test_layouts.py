"""Padded, packed and shared: equal log-probs, scores and gradients, and no token computed for nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.data import CompletionCollator, ListCollator, PreferenceCollator
from fastalign.models.layouts import TOKEN_LAYOUTS, plan_layout

torch.set_num_threads(1)
FAMILIES = (
    "llama", "llama-tied", "llama-eager", "qwen2", "qwen2-window", "qwen3", "mistral-window", "gemma2", "gemma3", "gpt2"
)  # fmt: skip


# What is planned ------------------------------------------------------------------------------------------------------


def test_tokens_of_a_shared_pair():
    examples = [{"prompt_ids": [5, 6], "chosen_ids": [7, 8, 1], "rejected_ids": [7, 9, 9, 1]}]
    batch = PreferenceCollator(0)(examples)
    layout = plan_layout(batch, "shared")
    ids = batch["input_ids"].flatten()[layout.tokens].tolist()
    # the last token of either is predicted and predicts nothing
    assert ids == [5, 6, 7, 8, 9, 9]
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 3, 4]
    assert layout.segments.lengths.tolist() == [3, 1, 2]
    assert layout.segments.prefixes.tolist() == [-1, 0, 0]
    assert layout.rows.tolist() == [1, 2, 3, 1, 2, 4, 5]
    assert layout.segments.needed.tolist() == [1, 2, 3, 4, 5]
    assert (layout.padded, layout.real, layout.computed) == (12, 11, 6)


def test_tokens_of_a_packed_pair():
    examples = [{"prompt_ids": [5, 6], "chosen_ids": [7, 8, 1], "rejected_ids": [7, 1]}]
    batch = PreferenceCollator(0)(examples)
    layout = plan_layout(batch, "packed")
    assert batch["input_ids"].flatten()[layout.tokens].tolist() == [5, 6, 7, 8, 5, 6, 7]
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert layout.rows.tolist() == [1, 2, 3, 5, 6]
    whole = plan_layout(batch, "packed", every_token=True)
    assert batch["input_ids"].flatten()[whole.tokens].tolist() == [5, 6, 7, 8, 1, 5, 6, 7, 1]
    assert whole.segments.needed is None
    assert whole.computed == whole.real == 9


def test_padded_is_no_layout(kit):
    assert plan_layout(PreferenceCollator(0)(kit.pairs()), "padded") is None


def test_a_sequence_without_a_scored_row_keeps_one_token():
    batch = CompletionCollator(0)(
        [
            {"input_ids": [4, 5, 6], "completion_mask": [False, False, True]},
            {"input_ids": [7, 8, 9], "completion_mask": [False, False, False]},
        ]
    )
    layout = plan_layout(batch, "shared")
    assert batch["input_ids"].flatten()[layout.tokens].tolist() == [4, 5, 7]
    assert layout.rows.tolist() == [1]


def test_sequences_of_packed_rows_are_told_apart():
    batch = CompletionCollator(0)(
        [
            {"input_ids": [4, 5, 6, 7], "completion_mask": [False, True, False, True], "seq_lengths": [2, 2]},
            {"input_ids": [8, 9, 3], "completion_mask": [False, True, True], "seq_lengths": [3]},
        ]
    )
    layout = plan_layout(batch, "shared")
    assert batch["input_ids"].flatten()[layout.tokens].tolist() == [4, 6, 8, 9]
    assert layout.position_ids.tolist() == [0, 0, 0, 1]
    assert layout.segments.lengths.tolist() == [1, 1, 2]
    assert layout.rows.tolist() == [0, 1, 2, 3]


def test_tensors_are_made_once_for_a_device(kit):
    layout = plan_layout(PreferenceCollator(0)(kit.pairs()), "shared")
    assert layout.on(torch.device("cpu"))[0] is layout.on(torch.device("cpu"))[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "flat"}, "token layout 'flat' is unknown; accepted are padded, packed, shared"),
        ({"prefix_lengths": np.array([1, 1])}, r"prefix_lengths has shape \(2,\), the batch has 4 groups"),
        ({"prefix_lengths": np.array([9, 1, 99, 5])}, "the prefix of group 2 has 99 tokens, its shortest sequence 13"),
        ({"prefix_lengths": np.array([9, -1, 6, 5])}, "the prefix of group 1 has -1 tokens"),
    ],
)
def test_what_cannot_be_planned(kit, change, message):
    batch = PreferenceCollator(0)(kit.pairs())
    mode = change.pop("mode", "shared")
    with pytest.raises(ValueError, match=message):
        plan_layout(batch | change, mode)


# Exactness ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama-tied",
        "llama-eager",
        "qwen2",
        "qwen2-window",
        "qwen3",
        "mistral-window",
        "gemma2",
        "gemma3",
        "gpt2",
    ],
)
def test_every_layout_equals_sequences_alone(kit, name):
    """float64, 1e-10."""
    batch = PreferenceCollator(0, pad_to_multiple_of=8)(kit.pairs())
    model = kit.make(name)
    own = kit.alone(model, batch)
    expected = own.detach(), kit.gradients(model, own)
    tolerance = 1e-5 if name in kit.IN_FLOAT32 else 1e-10
    computed = [
        layout.computed
        for mode in TOKEN_LAYOUTS
        if (layout := kit.check_equal(model, batch, expected, mode, tolerance))
    ]
    assert computed == [int(batch["lengths"].sum()) - 8, (9 + 6 + 3) + (1 + 2) + (9 + 3 + 3) + 8]


sizes = st.integers(1, 4)
token = st.integers(2, 4)  # few, so that responses begin alike


@st.composite
def lists(draw):
    examples = []
    for _ in range(draw(st.integers(1, 3))):
        prompt = draw(st.lists(token, min_size=1, max_size=6))
        responses = draw(st.lists(st.lists(token, min_size=1, max_size=5), min_size=1, max_size=4))
        if draw(st.booleans()):
            responses.append(responses[0])  # the same once more
        examples.append({"prompt_ids": prompt, "response_ids": responses, "ranks": list(range(len(responses)))})
    return examples


@pytest.fixture(scope="module")
def drawn_models(kit):
    return {name: kit.make(name) for name in ("llama", "qwen2-window")}


@settings(max_examples=25, deadline=None)
@given(examples=lists(), cut=st.integers(0, 3), name=st.sampled_from(["llama", "qwen2-window"]))
def test_any_lists(kit, drawn_models, examples, cut, name):
    """Any group sizes, lengths and prefixes, prefixes of 0 and ones shorter than what is common too."""
    batch = ListCollator(0)(examples)
    batch["prefix_lengths"] = np.maximum(batch["prefix_lengths"] - cut, 0)
    model = drawn_models[name]
    own = kit.alone(model, batch)
    expected = own.detach(), kit.gradients(model, own)
    for mode in TOKEN_LAYOUTS:
        kit.check_equal(model, batch, expected, mode, 1e-10)
