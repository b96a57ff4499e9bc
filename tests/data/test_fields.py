"""What is read of examples, and what is said of wrong ones."""

import numpy as np
import pytest

from fastalign.data.fields import column, given, joined, name_of, reference_tensors


def test_prompt_and_response_are_one_sequence():
    found = joined({"prompt_ids": [4, 5], "completion_ids": [6], "row": 3}, "completion_ids")
    assert found["input_ids"].tolist() == [4, 5, 6]
    assert found["completion_mask"].tolist() == [False, False, True]
    assert found["row"] == 3
    one = joined({"prompt_ids": [4], "response_ids": [[5], [6, 7]]}, "response_ids", [6, 7])
    assert one["input_ids"].tolist() == [4, 6, 7]
    assert "row" not in one


def test_columns_are_given_with_all_or_none():
    one, both = {"a": 1}, {"a": 1, "b": 2}
    assert given([one, one], "a")
    assert given([both, both], "a", "b")
    assert not given([one], "c", "d")
    for examples, names, which in (
        ([one, {}], ("a",), "it"), ([both, one], ("a", "b"), "both"), ([one, one], ("a", "b"), "both")
    ):  # fmt: skip
        with pytest.raises(
            ValueError, match=f"some examples have {' or '.join(names)} and some have not; give {which}"
        ):
            given(examples, *names)


def test_an_example_is_named_by_its_row():
    assert name_of({"row": 17}) == "row 17"
    with pytest.raises(ValueError, match="x of an example is empty"):
        column({"x": []}, "x", np.int64)


def test_sums_are_taken_in_float64():
    values = np.full(100_000, 0.1, np.float32)
    tensors = reference_tensors([values, values[:1]], np.array([0, 100_000, 100_001]))
    assert tensors["ref_per_token_logps"].shape == (100_001,)
    assert tensors["ref_logps"].tolist() == [pytest.approx(float(values.astype(np.float64).sum()), rel=1e-7), values[0]]
