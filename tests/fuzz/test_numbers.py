"""Targets outside the vocabulary, NaN and infinities, and arguments that do not fit: never a wrong finite number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from fastalign import linear_logps
from fastalign.ops import arguments, backends
from fastalign.ops import rows as R
from fastalign.ops.linear_logps import linear_logps_reference

torch.set_num_threads(1)
BACKENDS = [
    name
    for name, reason in backends.available().items()
    if reason is None and (name != "triton" or backends.interpreting())
]
OUTSIDE = (-5, 11, 2**31, 2**32 + 3, 2**40, -(2**63))
SPECIAL = (torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-45, 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", ["auto", "deferred", "cached", "forward"])
def test_a_target_outside_is_never_an_address(monkeypatch, backend, schedule):
    """As on an accelerator, where nothing waits for a look at the targets: NaN for that row, all others as ever."""
    monkeypatch.setattr(arguments, "scored_rows", None)
    monkeypatch.setattr("fastalign.ops.logps_op.scored_rows", lambda targets, rows, ignore, V: (None, len(targets)))
    learns = schedule != "forward"
    hidden, weight = torch.randn(20, 8, requires_grad=learns), torch.randn(11, 8, requires_grad=learns)
    targets = torch.arange(20) % 11
    bad = torch.zeros(20, dtype=torch.bool)
    for at, value in zip(range(1, 20, 3), OUTSIDE, strict=False):
        targets[at], bad[at] = value, True
    out = linear_logps(hidden, weight, targets, entropy=True, top1=True, backend=backend, schedule=schedule)
    assert out.logps.isnan().equal(bad)
    right = linear_logps_reference(hidden.detach(), weight.detach(), torch.where(bad, 0, targets))
    torch.testing.assert_close(out.logps[~bad], right.logps[~bad])
    torch.testing.assert_close(out.lse, right.lse)
    if learns:
        torch.autograd.grad(out.logps.sum(), [hidden, weight])


@pytest.mark.parametrize("value", OUTSIDE)
def test_it_is_named_where_it_may_be_looked_at(monkeypatch, value):
    hidden, weight, targets = torch.randn(4, 3), torch.randn(11, 3), torch.tensor([0, 1, value, 2])
    with pytest.raises(ValueError, match=rf"targets\[2\] = {value} is out of range: the vocabulary has 11"):
        linear_logps(hidden, weight, targets)
    assert not backends.checks_targets()
    monkeypatch.setenv("FASTALIGN_CHECK_TARGETS", "1")
    assert backends.checks_targets()


def test_the_check_is_off_and_on_away_from_the_cpu(monkeypatch):
    """With a tensor that says it is elsewhere: what would be a synchronisation happens only when asked for."""

    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device("cuda", 0) if self.dtype == torch.int64 else super().device

    targets = torch.tensor([0, 99]).as_subclass(Elsewhere)
    rows = torch.arange(2).as_subclass(Elsewhere)
    assert arguments.scored_rows(targets, rows, -100, 11)[1] == 2
    monkeypatch.setenv("FASTALIGN_CHECK_TARGETS", "1")
    with pytest.raises(ValueError, match=r"targets\[1\] = 99 is out of range"):
        arguments.scored_rows(targets, rows, -100, 11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinities_are_where_ieee_has_them(fuzz, backend):
    def check(n: int, v: int, h: int, places: list[tuple[bool, int, float]], seed: int) -> None:
        torch.manual_seed(seed)
        hidden, weight = torch.randn(n, h), torch.randn(v, h)
        for in_weight, at, value in places:
            tensor = weight if in_weight else hidden
            tensor.view(-1)[at % tensor.numel()] = value
        targets = torch.arange(n) % v
        ours = linear_logps(hidden, weight, targets, backend=backend, entropy=True).logps
        u = hidden.double() @ weight.double().T
        sound = (u.abs() < 1e37).all(1)  # beyond it float32 products may overflow where float64's do not
        exact = u.log_softmax(1).gather(1, targets[:, None])[:, 0]
        if sound.any():
            tolerance = 1e-4 + 1e-6 * u[sound].abs().max().item()
            torch.testing.assert_close(ours[sound].double(), exact[sound], rtol=1e-5, atol=tolerance)
        lost = u.isnan().any(1) | (u == torch.inf).any(1)
        assert not ours[lost].isfinite().any(), "a finite number for a row whose logits are NaN or infinite"
        hidden.requires_grad_(), weight.requires_grad_()
        linear_logps(hidden, weight, targets, backend=backend).logps.sum().backward()

    place = st.tuples(st.booleans(), st.integers(0, 10_000), st.sampled_from(SPECIAL))
    fuzz(
        check, st.integers(1, 40), st.integers(1, 70), st.integers(1, 9), st.lists(place, max_size=4), st.integers(0, 9)
    )


def test_arguments_that_do_not_fit(fuzz):
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64]
    shape = st.lists(st.integers(0, 4), max_size=3).map(tuple)
    options: dict[str, Any] = {
        "temperature": st.floats() | st.integers(-1, 2), "softcap": st.none() | st.floats(), "logit_scale": st.floats(),
        "workspace_mb": st.none() | st.floats(), "backend": st.sampled_from(["auto", "torch", "cpu", "triton", ""]),
        "schedule": st.sampled_from(["auto", "deferred", "overlaid", "cached", "frozen", "forward", "streamed", "x"]),
        "rows": st.none() | st.lists(st.integers(-2, 5), max_size=4).map(lambda ids: torch.tensor(ids).long()),
        "bias": st.none() | shape.map(torch.zeros), "entropy": st.booleans(), "top1": st.booleans(),
    }  # fmt: skip

    def tensor(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    device = st.sampled_from(["cpu", "cpu", "cpu", "meta"])
    any_tensor = st.builds(tensor, shape, st.sampled_from(dtypes), device)

    def check(hidden: Any, weight: Any, targets: Any, given: dict[str, Any]) -> None:
        linear_logps(hidden, weight, targets, **given)

    sizes = st.tuples(st.integers(0, 3), st.integers(1, 2))
    near = st.builds(tensor, sizes, st.sampled_from(dtypes), st.just("cpu"))
    targets = any_tensor | st.integers(0, 3).map(lambda n: torch.zeros(n).long())
    fuzz(check, any_tensor | near, any_tensor | near, targets, st.fixed_dictionaries({}, optional=options))


def test_rows_start_without_a_target():
    state = R.RowState.start(3, R.RowSpec(), torch.device("cpu"))
    assert state.values[R.TARGET].isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["temperature", "softcap", "logit_scale"])
def test_scales_that_would_make_every_log_prob_nan(name, value):
    hidden, weight, targets = torch.randn(4, 3), torch.randn(11, 3), torch.arange(4)
    with pytest.raises(ValueError, match=f"{name} must be .*finite"):
        linear_logps(hidden, weight, targets, **{name: value})
