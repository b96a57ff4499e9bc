"""Batches against a naive loop, for any lengths."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device
from hypothesis import given
from hypothesis import strategies as st

from fastalign.data.collator import CompletionCollator, PreferenceCollator
from fastalign.types import IGNORE_INDEX

PAD = 3  # also an ordinary token below: padding must be told by length, not by id
ids = st.lists(st.integers(0, 9), min_size=1, max_size=7)


@st.composite
def example(draw, with_reference: bool):
    pair = {
        "prompt_ids": draw(ids),
        "chosen_ids": draw(ids),
        "rejected_ids": draw(ids),
        "row": draw(st.integers(0, 99)),
    }
    if with_reference:
        logp = st.floats(-50, 0, width=32)
        for side in ("chosen", "rejected"):
            n = len(pair[f"{side}_ids"])
            pair[f"ref_{side}_logps"] = draw(st.lists(logp, min_size=n, max_size=n))
    return pair


@given(
    st.booleans().flatmap(lambda ref: st.lists(example(ref), min_size=1, max_size=5)),
    st.sampled_from([None, 1, 4, 16]),
)
def test_a_batch_equals_the_naive_loop(examples, multiple):
    batch = PreferenceCollator(PAD, multiple)(examples)
    sides = [(e, side) for side in ("chosen", "rejected") for e in examples]
    sequences = [(e["prompt_ids"], e[f"{side}_ids"]) for e, side in sides]
    length = max(len(p) + len(c) for p, c in sequences)
    if multiple is not None:
        length = -(-length // multiple) * multiple

    rows, scored, ref, sums, cu_seqlens = [], [], [], [], [0]
    input_ids, attention_mask, targets = [], [], []
    for b, (prompt, completion) in enumerate(sequences):
        whole = prompt + completion
        input_ids.append([whole[t] if t < len(whole) else PAD for t in range(length)])
        attention_mask.append([int(t < len(whole)) for t in range(length)])
        targets.append([IGNORE_INDEX] * length)
        for t in range(length):
            if len(prompt) <= t + 1 < len(whole):
                targets[-1][t] = whole[t + 1]
                rows.append(b * length + t)
                scored.append(whole[t + 1])
        cu_seqlens.append(len(rows))
        if "ref_chosen_logps" in examples[0]:
            own = sides[b][0][f"ref_{sides[b][1]}_logps"]
            ref += own
            sums.append(sum(own))

    for name, expected in (("input_ids", input_ids), ("attention_mask", attention_mask), ("targets", targets)):
        assert batch[name].dtype == torch.int64
        assert batch[name].tolist() == expected
    assert batch["rows"].dtype == np.int64
    assert batch["cu_seqlens"].dtype == np.int32
    assert batch["rows"].tolist() == rows
    assert batch["cu_seqlens"].tolist() == cu_seqlens
    # what the consumers rely on
    assert batch["targets"].view(-1)[torch.from_numpy(batch["rows"])].tolist() == scored
    assert scored == [token for _, completion in sequences for token in completion]
    assert ("ref_logps" in batch) == ("ref_per_token_logps" in batch) == bool(ref)
    if ref:
        assert batch["ref_per_token_logps"].dtype == batch["ref_logps"].dtype == torch.float32
        assert batch["ref_per_token_logps"].tolist() == ref
        torch.testing.assert_close(batch["ref_logps"], torch.tensor(sums, dtype=torch.float64).float(), rtol=0, atol=0)


def test_the_documented_shift():
    batch = PreferenceCollator(0)([{"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [1, 2, 5, 0]]
    assert batch["targets"].tolist() == [[-100, 3, 4, -100], [-100, 5, -100, -100]]
    assert batch["rows"].tolist() == [1, 2, 5]
    assert batch["cu_seqlens"].tolist() == [0, 2, 3]


def test_sums_are_rounded_once():
    """Added up one by one in float32, the small values would vanish beside the first."""
    reference = {"ref_chosen_logps": [-(2.0**24)] + [-1.0] * 8, "ref_rejected_logps": [-0.5]}
    batch = PreferenceCollator(0)([{"prompt_ids": [1], "chosen_ids": [1] * 9, "rejected_ids": [2], **reference}])
    assert batch["ref_logps"].tolist() == [-(2.0**24 + 8), -0.5]


def test_arrays_and_tensors_are_taken_as_lists_are():
    lists = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}
    arrays = {key: np.array(value, dtype=np.int32) for key, value in lists.items()}
    tensors = {key: torch.tensor(value) for key, value in lists.items()}
    expected = PreferenceCollator(0)([lists])
    for examples in ([arrays], [tensors]):
        batch = PreferenceCollator(0)(examples)
        assert all(np.array_equal(batch[key], expected[key]) for key in expected)


def test_host_indices_stay_on_the_host():
    batch = PreferenceCollator(0)([{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}])
    moved = send_to_device(batch, torch.device("meta"))
    assert all(moved[key].device.type == "meta" for key in ("input_ids", "attention_mask", "targets"))
    assert all(isinstance(moved[key], np.ndarray) for key in ("rows", "cu_seqlens"))


def test_the_collator_travels_to_data_loader_workers():
    collator = PreferenceCollator(7, pad_to_multiple_of=8)
    assert pickle.loads(pickle.dumps(collator)) == collator


GOOD = {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [3], "row": 17}
REFERENCE = {"ref_chosen_logps": [-1.0, -2.0], "ref_rejected_logps": [-1.0]}


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "no examples"),
        ([{**GOOD, "prompt_ids": []}], "prompt_ids of row 17 is empty"),
        ([GOOD, {**GOOD, "rejected_ids": []}], "rejected_ids of row 17 is empty"),
        ([{"prompt_ids": [1], "chosen_ids": [], "rejected_ids": [1]}], "chosen_ids of an example is empty"),
        ([{**GOOD, "ref_chosen_logps": [-1.0, -2.0]}], "give both with all of them or none"),
        ([{**GOOD, **REFERENCE}, GOOD], "give both with all of them or none"),
        (
            [{**GOOD, **REFERENCE, "ref_chosen_logps": [-1.0]}],
            "ref_chosen_logps of row 17 has 1 values for 2 chosen_ids",
        ),
        ([{**GOOD, **REFERENCE, "ref_rejected_logps": [-1.0] * 4}], "ref_rejected_logps of row 17 has 4 values for 1"),
    ],
)
def test_examples_that_cannot_be_collated(examples, message):
    with pytest.raises(ValueError, match=message):
        PreferenceCollator(0)(examples)


@pytest.mark.parametrize("arguments", [{"pad_token_id": None}, {"pad_token_id": 0, "pad_to_multiple_of": 0}])
def test_collator_options(arguments):
    with pytest.raises(ValueError, match="pad_to"):
        PreferenceCollator(**arguments)


# Sequences to learn from ----------------------------------------------------------------------------------------------


@st.composite
def sequence(draw, packed: bool):
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4 if packed else 1))
    total = sum(lengths)
    mask = draw(st.lists(st.booleans(), min_size=total, max_size=total))
    for start in np.cumsum(lengths) - lengths:
        mask[start] = False
    example = {
        "input_ids": draw(st.lists(st.integers(0, 9), min_size=total, max_size=total)),
        "completion_mask": mask,
        "row": draw(st.integers(0, 99)),
    }
    return example | ({"seq_lengths": lengths} if packed else {})


@given(
    st.booleans().flatmap(lambda packed: st.lists(sequence(packed), min_size=1, max_size=5)),
    st.sampled_from([None, 1, 4]),
)
def test_a_batch_of_sequences_equals_the_naive_loop(examples, multiple):
    batch = CompletionCollator(PAD, multiple)(examples)
    length = max(len(e["input_ids"]) for e in examples)
    if multiple is not None:
        length = -(-length // multiple) * multiple
    input_ids, attention_mask, targets, positions, rows, cu_seqlens = [], [], [], [], [], [0]
    for b, example in enumerate(examples):
        own, mask = example["input_ids"], example["completion_mask"]
        input_ids.append(own + [PAD] * (length - len(own)))
        attention_mask.append([1] * len(own) + [0] * (length - len(own)))
        targets.append([IGNORE_INDEX] * length)
        for t in range(len(own) - 1):
            if mask[t + 1]:
                targets[-1][t] = own[t + 1]
                rows.append(b * length + t)
        cu_seqlens.append(len(rows))
        parts = [*example.get("seq_lengths", [len(own)]), length - len(own)]
        positions.append([t for part in parts for t in range(part)])
    for name, expected in (("input_ids", input_ids), ("attention_mask", attention_mask), ("targets", targets)):
        assert batch[name].dtype == torch.int64
        assert batch[name].tolist() == expected
    assert batch["rows"].tolist() == rows
    assert batch["cu_seqlens"].tolist() == cu_seqlens
    assert batch["groups"].tolist() == list(range(len(examples)))
    assert batch["lengths"].tolist() == [len(e["input_ids"]) for e in examples]
    if "seq_lengths" in examples[0]:
        assert batch["position_ids"].tolist() == positions
        assert [[n for n in row if n] for row in batch["segment_lengths"].tolist()] == [
            e["seq_lengths"] for e in examples
        ]
    else:
        assert not batch.keys() & {"position_ids", "segment_lengths"}


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"input_ids": [], "completion_mask": []}, "input_ids of row 7 is empty"),
        ({"input_ids": [1, 2], "completion_mask": [False]}, "row 7 has 2 input_ids and 1 values in completion_mask"),
        ({"input_ids": [1, 2], "completion_mask": [True, True]}, "completion_mask of row 7 is true for a first token"),
        (
            {"input_ids": [1, 2], "completion_mask": [False, True], "seq_lengths": [1, 1]},
            "completion_mask of row 7 is true for a first token",
        ),
        (
            {"input_ids": [1, 2], "completion_mask": [False, True], "seq_lengths": [1]},
            "seq_lengths of row 7 do not add up to its 2 input_ids",
        ),
    ],
)
def test_sequences_that_cannot_be_are_named(example, message):
    with pytest.raises(ValueError, match=message):
        CompletionCollator(PAD)([example | {"row": 7}])


def test_both_collators_refuse_alike():
    for collator in (PreferenceCollator, CompletionCollator):
        with pytest.raises(ValueError, match="pad_token_id is None"):
            collator(None)
        with pytest.raises(ValueError, match="pad_to_multiple_of must be at least 1"):
            collator(0, 0)
        with pytest.raises(ValueError, match="no examples"):
            collator(0)([])
