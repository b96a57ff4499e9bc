"""The suite's numerics find what is wrong: a score or a gradient that is a little off, noise, a log-prob above 0."""

from __future__ import annotations

import pytest
import torch

import fastalign


@pytest.fixture
def wrong(bench, monkeypatch):
    """wrong(change) -> {check: error} of checks that call linear_logps with its result changed."""
    numerics, shapes = bench("cells.numerics"), bench("shapes")
    original = fastalign.linear_logps

    def run(change):
        problem = numerics.Problem.make(shapes.Shape(32, 19, 101), "cpu", torch.float32, False, {})
        monkeypatch.setattr(fastalign, "linear_logps", lambda *a, **k: change(original(*a, **k)))
        return {row["check"]: row["error"] for row in numerics.checks(problem, "torch", plain=False) if row["error"]}

    return run


class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.0001


def test_what_is_right_passes(wrong):
    assert wrong(lambda out: out) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: out._replace(logps=out.logps * (1 + 1e-4)), "logps errs by"),
        (lambda out: out._replace(lse=out.lse + 1e-3), "lse errs by"),
        (lambda out: out._replace(logps=Wrong.apply(out.logps)), "grad_"),
        (lambda out: out._replace(logps=out.logps - 1e-7 * torch.rand(len(out.logps))), "two calls differ"),
        (lambda out: out._replace(logps=out.logps + 1e-7), "above 0"),
        (lambda out: out._replace(lse=out.lse * torch.nan), "lse errs by inf"),
    ],
    ids=["score", "lse", "gradient", "noise", "sign", "nan"],
)
def test_what_is_wrong_is_named(wrong, change, message):
    found = wrong(change)
    assert "deferred" in found
    assert message in found["deferred"]


def test_the_rule_of_kernels_holds_in_every_element(bench):
    kernels = bench("cells.numerics_kernels")
    exact = torch.randn(4, 7, dtype=torch.float64)
    assert kernels.elementwise(exact.float(), exact.float(), exact) < 1
    off = exact.float()
    off[2, 3] *= 1.001
    assert kernels.elementwise(off, exact.float(), exact) > 1
    off[2, 3] = torch.nan
    assert kernels.elementwise(off, exact.float(), exact) == float("inf")
