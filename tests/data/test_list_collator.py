"""Batches of ranked lists against a naive loop, and cut by `split_batch` with nothing lost."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastalign.data import ListCollator
from fastalign.trainers.batches import num_examples, split_batch
from fastalign.types import IGNORE_INDEX

PAD = 3  # also an ordinary token: padding is told by length
ids = st.lists(st.integers(0, 9), min_size=1, max_size=7)
number = st.floats(-9, 9, width=32)


@st.composite
def ranked(draw, full):
    responses = draw(st.lists(ids, min_size=1, max_size=4))
    k = len(responses)
    example = {"prompt_ids": draw(ids), "response_ids": responses}
    example["ranks"] = draw(st.lists(st.integers(1, 3), min_size=k, max_size=k))
    if full:
        example["scores"] = draw(st.lists(number, min_size=k, max_size=k))
        logps = [draw(st.lists(number, min_size=len(own), max_size=len(own))) for own in responses]
        example["ref_response_logps"] = logps
    return example


lists = st.booleans().flatmap(lambda full: st.lists(ranked(full), min_size=1, max_size=4))


@given(lists, st.sampled_from([None, 1, 4, 16]))
def test_a_batch_equals_the_naive_loop(examples, multiple):
    batch = ListCollator(PAD, multiple)(examples)
    sequences = [(e["prompt_ids"], own) for e in examples for own in e["response_ids"]]
    width = max(len(p) + len(r) for p, r in sequences)
    width = width if multiple is None else -(-width // multiple) * multiple
    rows, cu = [], [0]
    for b, (prompt, response) in enumerate(sequences):
        whole = prompt + response
        assert batch["input_ids"][b].tolist() == whole + [PAD] * (width - len(whole))
        assert batch["attention_mask"][b].tolist() == [1] * len(whole) + [0] * (width - len(whole))
        targets = [IGNORE_INDEX] * width
        for t in range(len(prompt) - 1, len(whole) - 1):
            targets[t] = whole[t + 1]
            rows.append(b * width + t)
        assert batch["targets"][b].tolist() == targets
        cu.append(len(rows))
    assert batch["rows"].tolist() == rows
    assert batch["cu_seqlens"].tolist() == cu
    assert batch["groups"].tolist() == [i for i, e in enumerate(examples) for _ in e["response_ids"]]
    assert batch["lengths"].tolist() == [len(p) + len(r) for p, r in sequences]
    assert batch["ranks"].tolist() == [r for e in examples for r in e["ranks"]]
    assert ("rewards" in batch) == ("ref_logps" in batch) == ("scores" in examples[0])
    if "scores" in examples[0]:
        flat = [own for e in examples for own in e["ref_response_logps"]]
        assert batch["rewards"].tolist() == [s for e in examples for s in e["scores"]]
        assert batch["ref_per_token_logps"].tolist() == [x for own in flat for x in own]
        np.testing.assert_allclose(batch["ref_logps"], [sum(own) for own in flat], rtol=1e-6, atol=1e-6)


@given(lists, st.integers(1, 60))
def test_pieces_hold_whole_lists_and_lose_nothing(examples, max_tokens):
    batch = ListCollator(PAD)(examples)
    pieces = split_batch(batch, max_tokens)
    assert sum(num_examples(piece) for piece in pieces) == len(examples)
    found = []
    for piece in pieces:
        bounds = np.flatnonzero(np.diff(piece["groups"], prepend=-1))
        for own in np.split(np.arange(len(piece["groups"])), bounds[1:]):
            found.append(sorted(piece["input_ids"][i, : piece["lengths"][i]].tolist() for i in own))
        assert piece["targets"].flatten()[torch.from_numpy(piece["rows"])].min() >= 0
        assert len(piece["ranks"]) == len(piece["groups"])
    assert sorted(found) == sorted(sorted(e["prompt_ids"] + r for r in e["response_ids"]) for e in examples)


GOOD = {"prompt_ids": [1], "response_ids": [[2], [3, 4]], "ranks": [1, 2], "row": 7}


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "no examples"),
        ([GOOD | {"prompt_ids": []}], "prompt_ids of row 7 is empty"),
        ([GOOD | {"response_ids": [[2], []]}], "response_ids of row 7 has one that is empty"),
        ([GOOD | {"ranks": [1]}], "ranks of row 7 has 1 values for 2 responses"),
        ([GOOD | {"scores": [1.0, 2.0, 3.0]}], "scores of row 7 has 3 values"),
        ([GOOD | {"scores": [1.0, 2.0]}, GOOD], "some examples have scores and some have not"),
        ([GOOD | {"ref_response_logps": [[0.0], [0.0]]}], "ref_response_logps of row 7 are not one for each token"),
    ],
)
def test_bad_examples(examples, message):
    with pytest.raises(ValueError, match=message):
        ListCollator(PAD)(examples)


def test_padding_is_checked():
    with pytest.raises(ValueError, match="pad_token_id is None"):
        ListCollator(None)
    with pytest.raises(ValueError, match="pad_to_multiple_of"):
        ListCollator(0, 0)
