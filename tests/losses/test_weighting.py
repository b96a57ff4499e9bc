"""Tails of longer responses, and weights of pairs."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fastalign.losses import tail_mask, wpo_weights


@given(lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6))
def test_tail_mask(lengths):
    both = [w for w, _ in lengths] + [v for _, v in lengths]
    cu = torch.tensor([0, *both]).cumsum(0).to(torch.int32)
    expected = []
    for i, n in enumerate(both):
        w, v = lengths[i % len(lengths)]
        expected += [position >= min(w, v) for position in range(n)]
    mask = tail_mask(cu)
    assert mask.dtype == torch.bool
    assert mask.tolist() == expected


def test_wpo_weights_are_how_likely_the_policy_is_to_have_written_the_pair():
    """A response of tokens that all are as likely as the average draw weighs 1; rarer ones less. No gradient."""
    probabilities = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    average = probabilities.square().sum()
    aligned = (probabilities / average).log().requires_grad_()
    weights = wpo_weights(aligned, torch.zeros_like(aligned))
    assert_close(weights, probabilities / average)
    assert not weights.requires_grad
    assert_close(wpo_weights(aligned, aligned), (probabilities / average).square())
