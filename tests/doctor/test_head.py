"""The head's identities hold where they should, and each failure is found by the check that is there for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastalign.doctor import FAILED, OK, SKIPPED, HeadProblem, examine_head
from fastalign.doctor.head import oracle
from fastalign.ops import backends


def problem(dtype=torch.float32, **options) -> HeadProblem:
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 9, 3, 7, 11, 4]
    n, width, vocab = sum(lengths), 24, 101
    hidden, weight = torch.randn(n, width, generator=generator), torch.randn(vocab, width, generator=generator)
    return HeadProblem(
        hidden.to(dtype), weight.to(dtype), torch.randint(vocab, (n,), generator=generator),
        torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).to(torch.int32), **options,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3}])
def test_nothing_fails_on_a_sound_machine(dtype, options):
    findings = list(examine_head(problem(dtype, **options)))
    assert [finding for finding in findings if finding.status == FAILED] == []
    for name, reason in backends.available().items():
        statuses = {f.status for f in findings if f.check == f"head on backend {name}"}
        assert statuses == ({SKIPPED} if reason and not backends.interpreting() else {OK})
    left_out = {f.check for f in findings if f.status == SKIPPED}
    assert ("hidden · 2 at temperature · 2" in left_out) == bool(options)


def test_the_oracle_is_autograd_of_the_formula():
    given = replace(problem(), softcap=5.0, logit_scale=0.7, temperature=1.3, bias=torch.linspace(-1, 1, 101))
    hidden = given.hidden.double().requires_grad_()
    u = hidden @ given.weight.double().T + given.bias.double()
    z = 5.0 * torch.tanh(0.7 * u / 5.0) / 1.3
    logps = z.log_softmax(-1)[torch.arange(len(hidden)), given.targets]
    (logps * given.coefficients()).sum().backward()
    found = oracle(given)
    torch.testing.assert_close(found[0], logps.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], hidden.grad, rtol=1e-12, atol=1e-12)


def broken(monkeypatch, name, function) -> set[str]:
    """The checks that fail with one function of the plain backend replaced."""
    sound = backends._load("torch")
    spoilt = replace(sound, **{name: function(getattr(sound, name))})
    loaded = backends._load
    monkeypatch.setattr(backends, "_load", lambda wanted: spoilt if wanted == "torch" else loaded(wanted))
    return {finding.check for finding in examine_head(problem()) if finding.status == FAILED}


def test_a_wrong_gradient_is_found(monkeypatch):
    def wrong(row_grad):
        def spoilt(tile, bias, targets, v0, stats, coef, spec, out, rows=None):
            row_grad(tile, bias, targets, v0, stats, coef, spec, out, rows)
            out[:, :1].mul_(1.01)

        return spoilt

    assert broken(monkeypatch, "row_grad", wrong) == {"head on backend torch"}


def test_a_wrong_log_prob_is_found(monkeypatch):
    def wrong(row_stats):
        def spoilt(tile, bias, targets, v0, state, spec):
            row_stats(tile, bias, targets, v0, state, spec)
            state.values[2] += 1e-3

        return spoilt

    assert broken(monkeypatch, "row_stats", wrong) == {"head on backend torch"}


def test_a_wrong_scan_is_found(monkeypatch):
    def wrong(gae):
        return lambda rewards, values, mask, gamma, lam: gae(rewards, values, mask, gamma, 0.9 * lam)

    assert broken(monkeypatch, "gae", wrong) == {"gae on backend torch, λ = 1"}


def test_what_breaks_is_a_finding(monkeypatch):
    def wrong(row_stats):
        def spoilt(*args):
            raise RuntimeError("no kernel image\nis available")

        return spoilt

    monkeypatch.setattr(backends, "_reasons", lambda: {"torch": None})
    assert "head" in broken(monkeypatch, "row_stats", wrong)
    detail = next(f.detail for f in examine_head(problem()) if f.check == "head")
    assert detail == "RuntimeError: no kernel image is available"


def test_nan_in_a_hidden_state_is_found():
    given = problem()
    given.hidden[3, 2] = torch.nan
    assert "head on backend torch" in {f.check for f in examine_head(given) if f.status == FAILED}
