"""Row statistics against float64: on the CPU through Triton's interpreter; ../test_gpu.py runs the same on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from fastalign.kernels import _tiles, row_kernels

from fastalign.ops import rows as R

# Triton's interpreter evaluates both branches of a `where`, in numpy, which comments on the one that is dropped.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

FLAGS = ("entropy", "top1", "sum_sq", "sum_z")
ALL = dict.fromkeys(FLAGS, True)


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    """Slabs within one block of columns, and slabs over many of them."""
    if request.param == "many blocks":
        monkeypatch.setattr(row_kernels, "row_tiles", lambda v: _tiles.RowTiles(32, 1))


@pytest.mark.parametrize("scale", [1.0, 12.0])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("n", "v", "cuts"), [(1, 1, [0, 1]), (7, 33, [0, 1, 20, 33]), (9, 151, [0, 100, 131, 151])])
@pytest.mark.usefixtures("blocks")
def test_stats(n, v, cuts, with_bias, softcap, scale, make_tile, assert_within_rule, kit):
    u, bias, targets = make_tile(n, v, scale)
    bias = bias if with_bias else None
    spec = kit.spec_of(softcap, **ALL)
    exact = kit.fold(R.row_stats, u, bias, targets, spec, cuts, torch.float64)
    naive = kit.fold(R.row_stats, u, bias, targets, spec, cuts)
    ours = kit.fold(kit.row_stats, u, bias, targets, spec, cuts)
    for name, row in (("max", R.MAX), ("target", R.TARGET)):
        assert_within_rule(name, *(state.values[row] for state in (ours, naive, exact)))
    assert_within_rule("mean z", *(state.values[R.SUM_Z] / v for state in (ours, naive, exact)), floor=2e-6 * scale)
    for name in ("logps", "lse", "entropy"):
        results = (getattr(R.finish(state, spec), name) for state in (ours, naive, exact))
        assert_within_rule(name, *results)
    assert_within_rule("Σ p²", *((s.values[R.SUM_SQ] / s.values[R.SUM] ** 2) for s in (ours, naive, exact)))
    assert torch.equal(ours.argmax, naive.argmax)


@pytest.mark.parametrize("flag", [None, *FLAGS])
def test_a_flag_adds_its_sums_and_nothing_else(flag, make_tile, kit):
    u, bias, targets = make_tile(3, 40)
    spec = kit.spec_of(**({} if flag is None else {flag: True}))
    full = kit.fold(kit.row_stats, u, bias, targets, kit.spec_of(**ALL), [0, 17, 40])
    state = R.RowState.start(3, spec, u.device)
    state.values[R.ENT :] = 7.0
    kit.row_stats(u[:, :17], bias[:17], targets, 0, state, spec)
    kit.row_stats(u[:, 17:], bias[17:], targets, 17, state, spec)
    assert torch.equal(state.values[: R.ENT], full.values[: R.ENT])
    for name, row in (("entropy", R.ENT), ("sum_sq", R.SUM_SQ), ("sum_z", R.SUM_Z)):
        if flag != name:
            assert (state.values[row] == 7).all(), f"{name} was written without being asked for"
    if flag == "top1":
        assert torch.equal(state.argmax, full.argmax)


def layouts(u):
    """The same values with other strides; what lies between them is poisoned."""
    n, v = u.shape
    padded = u.new_full((n, v + 5), torch.nan)
    padded[:, 2 : v + 2] = u
    every_third = u.new_full((n, 3 * v), torch.nan)
    every_third[:, ::3] = u
    major = u.new_full((v, n + 3), torch.nan)
    major[:, :n] = u.t()
    return {"padded rows": padded[:, 2 : v + 2], "strided": every_third[:, ::3], "vocabulary-major": major.t()[:n]}


@pytest.mark.parametrize("layout", ["padded rows", "strided", "vocabulary-major"])
def test_strides_do_not_matter(layout, make_tile, kit):
    u, bias, targets = make_tile(5, 77)
    spec = kit.spec_of(**ALL)
    strided_bias = torch.stack([bias, torch.full_like(bias, torch.nan)], 1)[:, 0]
    expected = kit.fold(kit.row_stats, u, bias, targets, spec, [0, 77])
    state = R.RowState.start(5, spec, u.device)
    kit.row_stats(layouts(u)[layout], strided_bias, targets, 0, state, spec)
    assert torch.equal(state.values, expected.values)
    assert torch.equal(state.argmax, expected.argmax)

    _, _, stats, coef = kit.gradient_problem(u, bias, targets, spec)
    expected_grad = torch.empty_like(u)
    kit.row_grad(u, bias, targets, 0, stats, coef, spec, expected_grad)
    out = layouts(torch.zeros_like(u))[layout]
    kit.row_grad(layouts(u)[layout], strided_bias, targets, 0, stats, coef, spec, out)
    assert torch.equal(out, expected_grad)
    exponentials, expected_exponentials = (torch.empty_like(u, dtype=torch.bfloat16) for _ in range(2))
    row_kernels.row_exp_fwd(u, bias, stats.max, expected_exponentials)
    row_kernels.row_exp_fwd(layouts(u)[layout], strided_bias, stats.max, exponentials)
    assert torch.equal(exponentials, expected_exponentials)


@pytest.mark.usefixtures("blocks")
def test_first_of_equal_maxima_wins(device, kit):
    u = torch.zeros(4, 90, device=device)
    for row, columns in enumerate(([17, 18, 80], [40, 5], [89], [])):
        u[row, columns] = 3.0
    state = kit.fold(
        kit.row_stats,
        u,
        None,
        torch.zeros(4, dtype=torch.int64, device=device),
        kit.spec_of(top1=True),
        [0, 20, 40, 90],
    )
    assert state.argmax.tolist() == [17, 5, 89, 0]


def test_target_of_another_slab_is_left_alone(make_tile, kit):
    u, bias, _ = make_tile(3, 50)
    targets = torch.tensor([9, 30, 10**6], device=u.device)
    spec = kit.spec_of()
    state = R.RowState.start(3, spec, u.device)
    state.values[R.TARGET] = 42.0
    kit.row_stats(u[:, 10:30], bias[10:30], targets, 10, state, spec)
    assert state.values[R.TARGET].tolist() == [42.0] * 3


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_log_probs_are_never_positive(softcap, device, kit):
    """A row that is all but one-hot, at any size of the winning logit: its term of the sum is exp(0) = 1 exactly."""
    heights = torch.linspace(0.1, 90, 64, device=device)
    u = torch.full((64, 40), -200.0, device=device)
    u[:, 11] = heights
    targets = torch.full((64,), 11, device=device)
    spec = kit.spec_of(softcap)
    state = kit.fold(kit.row_stats, u, None, targets, spec, [0, 40])
    assert (state.values[R.SUM] >= 1).all()
    assert (R.finish(state, spec).logps <= 0).all()


def test_impossible_columns_count_for_nothing(make_tile, assert_within_rule, kit):
    """Columns ruled out by a bias of -inf, even a whole slab and the first one."""
    u, bias, targets = make_tile(5, 60)
    targets = targets % 10 + 40
    bias[:33] = -torch.inf
    spec = kit.spec_of(entropy=True, sum_sq=True, top1=True)
    ours = kit.fold(kit.row_stats, u, bias, targets, spec, [0, 20, 60])
    naive, exact = (
        kit.fold(R.row_stats, u[:, 33:], bias[33:], targets - 33, spec, [0, 27], dtype)
        for dtype in (torch.float32, torch.float64)
    )
    assert torch.equal(ours.argmax, exact.argmax + 33)
    for name in ("logps", "lse", "entropy"):
        assert_within_rule(name, *(getattr(R.finish(state, spec), name) for state in (ours, naive, exact)))
    stats = R.finish(ours, spec)
    coef = R.coefficients(stats, *torch.ones(3, 5, device=u.device))
    grad = torch.empty_like(u)
    kit.row_grad(u, bias, targets, 0, stats, coef, spec, grad)
    assert grad.isfinite().all()
    assert (grad[:, :33] == 0).all()


def test_broken_logits_show(make_tile, kit):
    u, _, targets = make_tile(3, 40)
    u[1, 20] = torch.nan
    u[2, 20] = torch.inf
    spec = kit.spec_of(entropy=True)
    stats = R.finish(kit.fold(kit.row_stats, u, None, targets, spec, [0, 40]), spec)
    assert stats.logps.isnan().tolist() == [False, True, True]
    assert stats.entropy.isnan().tolist() == [False, True, True]


@pytest.mark.usefixtures("blocks")
def test_a_row_does_not_see_its_neighbours(make_tile, kit):
    u, bias, targets = make_tile(6, 130)
    spec = kit.spec_of(**ALL)
    together = kit.fold(kit.row_stats, u, bias, targets, spec, [0, 50, 130])
    for row in range(6):
        alone = kit.fold(kit.row_stats, u[row : row + 1], bias, targets[row : row + 1], spec, [0, 50, 130])
        assert torch.equal(alone.values[:, 0], together.values[:, row])


def test_nothing_to_do(device, kit):
    spec = kit.spec_of(**ALL)
    for n, v in ((0, 5), (3, 0)):
        u, targets = torch.zeros(n, v, device=device), torch.zeros(n, dtype=torch.int64, device=device)
        state = R.RowState.start(n, spec, u.device)
        kit.row_stats(u, None, targets, 0, state, spec)
        assert (state.values[R.MAX] == -torch.inf).all()
        vector = torch.zeros(n, device=device)
        stats, coef = R.RowStats(*[vector] * 5), R.RowCoef(*[vector] * 3)
        kit.row_grad(u, None, targets, 0, stats, coef, spec, torch.empty_like(u))
        row_kernels.row_exp_fwd(u, None, vector, torch.empty_like(u, dtype=torch.float16))


@settings(max_examples=15)
@given(
    n=st.integers(1, 5), v=st.integers(1, 70), block=st.sampled_from([8, 32]), seed=st.integers(0, 99),
    scale=st.sampled_from([0.0, 1.0, 60.0]), cut=st.floats(0, 1), softcap=st.sampled_from([None, 2.0]),
)  # fmt: skip
def test_any_shape(n, v, block, seed, scale, cut, softcap, make_tile, assert_within_rule, kit):
    u, bias, targets = make_tile(n, v, scale, seed)
    spec = kit.spec_of(softcap, **ALL)
    cuts = sorted({0, round(cut * v), v})
    original = row_kernels.row_tiles
    row_kernels.row_tiles = lambda v: _tiles.RowTiles(block, 1)
    try:
        ours = kit.fold(kit.row_stats, u, bias, targets, spec, cuts)
        exact_s, exact_c, stats, coef = kit.gradient_problem(u, bias, targets, spec)
        grad, naive_grad = torch.empty_like(u), torch.empty_like(u)
        kit.row_grad(u, bias, targets, 0, stats, coef, spec, grad)
    finally:
        row_kernels.row_tiles = original
    naive, exact = (
        kit.fold(R.row_stats, u, bias, targets, spec, cuts, dtype) for dtype in (torch.float32, torch.float64)
    )
    for name in ("logps", "entropy"):
        results = (getattr(R.finish(state, spec), name) for state in (ours, naive, exact))
        assert_within_rule(name, *results, floor=1e-5)
    R.row_grad(u, bias, targets, 0, stats, coef, spec, naive_grad)
    assert_within_rule("grad", grad, naive_grad, kit.exact_gradient(u, bias, targets, exact_s, exact_c, spec))
