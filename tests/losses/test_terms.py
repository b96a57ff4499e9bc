"""What the losses are made of: f-divergences, log odds, and a logarithm that does not cancel."""

import math

import pytest
import torch
from torch.testing import assert_close

from fastalign.losses import F_DIVERGENCES
from fastalign.losses.terms import MAX_EXPONENT, DPOOptions, log1mexp, log_odds


def test_log1mexp_keeps_its_digits_at_both_ends():
    x = -torch.logspace(-30, 2, 200, dtype=torch.float64)
    exact = [math.log(-math.expm1(v)) if v > -1e-3 else math.log1p(-math.exp(v)) for v in x.tolist()]
    assert_close(log1mexp(x), torch.tensor(exact, dtype=torch.float64), rtol=1e-12, atol=0)
    assert_close(log1mexp(x.float()).double(), log1mexp(x.float().double()), rtol=3e-7, atol=1e-37)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(log1mexp(leaf).sum(), leaf)
    assert_close(grad, 1 / torch.expm1(-x) * -1)


def test_log_odds_of_a_certain_response_are_finite_and_the_largest():
    mean = torch.tensor([-1e6, -50.0, -1.0, -1e-3, -1e-7, -1e-30, 0.0], requires_grad=True)
    odds = log_odds(mean)
    assert odds.isfinite().all()
    assert (odds.diff() >= 0).all()
    assert_close(odds[2].item(), math.log(math.exp(-1) / (1 - math.exp(-1))), rtol=1e-6, atol=0)
    odds.sum().backward()
    assert mean.grad.isfinite().all()
    assert (mean.grad[:4] >= 1).all()


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_f_is_centred_and_increasing(name):
    """0 at the reference, where every divergence pulls alike: slope 1 (js: ½)."""
    f = F_DIVERGENCES[name]
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value = f(zero, 0.5)
    assert value.item() == pytest.approx(0, abs=1e-15)
    assert torch.autograd.grad(value, zero)[0].item() == pytest.approx(0.5 if name == "js_divergence" else 1)
    s = torch.linspace(-20, 20, 401, dtype=torch.float64)
    assert (f(s, 0.5).diff() >= 0).all()


def test_alpha_divergences_hold_the_others():
    s = torch.linspace(-8, 8, 100, dtype=torch.float64)
    alpha = F_DIVERGENCES["alpha_divergence"]
    assert torch.equal(alpha(s, 1.0), s)
    assert_close(alpha(s, 0.0), F_DIVERGENCES["forward_kl"](s, 0.5))
    for near in (1 - 1e-9, 1 + 1e-9, math.nextafter(1, 2)):  # no jump at the limit, and no cancellation before it
        assert_close(alpha(s, near), s, rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", F_DIVERGENCES)
@pytest.mark.parametrize("coef", [-3.0, 0.5, 4.0])
def test_f_of_extreme_log_ratios_is_finite_and_so_is_its_square(name, coef):
    s = torch.tensor([-1e6, -200.0, 200.0, 1e6], requires_grad=True)
    value = F_DIVERGENCES[name](s, coef)
    assert value.square().isfinite().all()
    value.sum().backward()
    assert s.grad.isfinite().all()
    assert math.exp(MAX_EXPONENT) ** 2 < torch.finfo(torch.float32).max


def test_loss_types_are_a_tuple_however_given():
    assert DPOOptions(loss_type="ipo").loss_types == ("ipo",)
    assert DPOOptions(loss_type=["ipo", "sft"]).loss_types == ("ipo", "sft")
