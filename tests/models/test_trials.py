"""A trial in the midst of a forward has none of its modes."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastalign.models.trials import in_own_thread


def test_a_trial_has_its_own_modes():
    def modes():
        weight = torch.ones(2, 2, requires_grad=True)
        (grad,) = torch.autograd.grad((weight @ weight).sum(), weight)
        return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), grad.dtype

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert in_own_thread(modes) == (True, False, torch.float32)


def test_a_trial_does_not_count_for_a_checkpoint():
    """Which asks of the second forward what the first kept: a trial is in the first alone."""
    tried = []

    def layer(x):
        if not tried:
            tried.append(in_own_thread(lambda: torch.ones(2, requires_grad=True).exp().sum()))
        return x.exp()

    x = torch.zeros(3, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert x.grad.tolist() == [1.0] * 3


def test_what_it_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        in_own_thread(lambda: 1 // 0)
