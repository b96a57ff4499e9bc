from __future__ import annotations

import numpy as np
import pytest
import torch

from fastalign.rollouts import SamplingOptions
from fastalign.rollouts.types import check_prompts


def test_the_defaults_sample_from_the_softmax_alone():
    options = SamplingOptions(max_new_tokens=4)
    assert options.is_pure
    assert SamplingOptions(max_new_tokens=4, temperature=0.3, stop_token_ids=(1, 2)).is_pure
    assert not SamplingOptions(max_new_tokens=4, top_k=3).is_pure
    assert not SamplingOptions(max_new_tokens=4, top_p=0.9).is_pure
    assert not SamplingOptions(max_new_tokens=4, min_new_tokens=1).is_pure


def test_integers_come_in_every_kind():
    options = SamplingOptions(max_new_tokens=np.int64(4), stop_token_ids=[np.int32(7), 8])
    assert options.max_new_tokens == 4
    assert options.stop_token_ids == (7, 8)
    assert hash(options) == hash(SamplingOptions(max_new_tokens=4, stop_token_ids=(7, 8)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, got 0"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be an integer of at least 1, got 2.0"),
        ({"max_new_tokens": True}, "max_new_tokens must be an integer of at least 1, got True"),
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"temperature": -1}, "temperature must be a positive number, got -1"),
        ({"temperature": float("nan")}, "temperature must be a positive number, got nan"),
        ({"temperature": float("inf")}, "temperature must be a positive number, got inf"),
        ({"temperature": None}, "temperature must be a positive number, got None"),
        ({"top_k": -1}, "top_k must be an integer of at least 0, got -1"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p must lie in \(0, 1\], got 1.1"),
        ({"min_new_tokens": -1}, "min_new_tokens must be an integer of at least 0, got -1"),
        ({"min_new_tokens": 9}, "min_new_tokens=9 is more than max_new_tokens=8"),
        ({"stop_token_ids": (3, -1)}, "stop_token_ids must be an integer of at least 0, got -1"),
        ({"stop_token_ids": ("<eos>",)}, "stop_token_ids must be an integer of at least 0, got '<eos>'"),
    ],
)
def test_values_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**{"max_new_tokens": 8, **settings})


def test_prompts():
    assert check_prompts([(1, 2), np.array([3]), torch.tensor([4, 5])], 1) == [[1, 2], [3], [4, 5]]
    assert check_prompts([], 3) == []
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        check_prompts([[1], []], 1)
    with pytest.raises(ValueError, match="prompt 0 must be a sequence of token ids, got str"):
        check_prompts(["a text"], 1)
    with pytest.raises(ValueError, match="prompt 1 must be a sequence of token ids, got int"):
        check_prompts([[1], 2], 1)
    with pytest.raises(ValueError, match="num_samples must be an integer of at least 1, got 0"):
        check_prompts([[1]], 0)
