"""Row functions of each backend and instruction set, against the same functions in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastalign.ops import backends
from fastalign.ops import rows as R
from fastalign.ops.known_grads import KnownGrads

IMPLEMENTATIONS = ["torch"]
if backends.available()["cpu"] is None:
    IMPLEMENTATIONS += ["cpu-baseline", "cpu-avx2", "cpu-avx512"]


@pytest.fixture(params=IMPLEMENTATIONS)
def backend(request):
    name, _, instruction_set = request.param.partition("-")
    loaded = backends.resolve(name, torch.zeros(1))
    if not instruction_set:
        yield loaded
        return
    from fastalign.kernels import _C

    before = _C.instruction_set()
    if not _C.choose_instruction_set(instruction_set):
        pytest.skip(f"this processor has no {instruction_set}")
    yield loaded
    _C.choose_instruction_set(before)


def tile_of(u):
    """u (n, v) as a vocabulary-major tile whose rows are padded to 16, the padding poisoned."""
    n, v = u.shape
    buffer = torch.full((v, -(-n // 16) * 16), torch.nan)
    buffer.t()[:n].copy_(u)
    return buffer.t()[:n]


def problem(n, v, scale, seed=0):
    g = torch.Generator().manual_seed(seed)
    u, bias = torch.randn(n, v, generator=g) * scale, torch.randn(v, generator=g)
    targets = torch.randint(0, v, (n,), generator=g)
    if n > 2:
        targets[0] = (u[0] + bias).argmax()
        u[1, targets[1]] += 30  # p up to 1
    return u, bias, targets


def fold(row_stats, u, bias, targets, spec, state, cuts):
    for first, last in itertools.pairwise(cuts):
        row_stats(u[:, first:last], None if bias is None else bias[first:last], targets, first, state, spec)
    return R.finish(state, spec)


FLAGS = {"entropy": True, "top1": True, "sum_sq": True, "sum_z": True}


@pytest.mark.parametrize("scale", [1.0, 12.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(
    ("n", "v", "cuts"),
    [(1, 1, [0, 1]), (5, 33, [0, 1, 20, 33]), (16, 64, [0, 64]), (67, 301, [0, 100, 131, 301]), (300, 70, [0, 70])],
)
def test_against_float64(backend, n, v, cuts, softcap, with_bias, scale):
    u, bias, targets = problem(n, v, scale)
    bias = bias if with_bias else None
    spec = R.RowSpec.make(temperature=0.8, logit_scale=1.1, softcap=softcap, **FLAGS)
    exact_state = R.RowState.start(n, spec, u.device, torch.float64)
    wide = None if bias is None else bias.double()
    exact = fold(R.row_stats, u.double(), wide, targets, spec, exact_state, cuts)
    naive_state = R.RowState.start(n, spec, u.device)
    naive = fold(R.row_stats, u, bias, targets, spec, naive_state, cuts)
    state = R.RowState.start(n, spec, u.device)
    tile = tile_of(u)
    stats = fold(backend.row_stats, tile, bias, targets, spec, state, cuts)

    def check(name, ours, theirs, true):
        error, allowed = (ours.double() - true).abs().max(), 2 * (theirs.double() - true).abs().max()
        assert error <= allowed + 2e-6 * max(1.0, float(true.abs().max())), f"{name}: {error}"

    for name in R.RowStats._fields:
        check(name, getattr(stats, name), getattr(naive, name), getattr(exact, name))
    check("sum_sq", state.values[R.SUM_SQ], naive_state.values[R.SUM_SQ], exact_state.values[R.SUM_SQ])
    check("sum_z", state.values[R.SUM_Z], naive_state.values[R.SUM_Z], exact_state.values[R.SUM_Z])
    if softcap is None or scale == 1:  # where tanh saturates, rounding decides between logits at the cap
        assert torch.equal(state.argmax, naive_state.argmax)
    assert (stats.logps <= 0).all()

    a, c, e = torch.randn(3, n, generator=torch.Generator().manual_seed(3))
    for grad_entropy in (None, e):
        coef, theirs, true = (
            R.coefficients(s, a.to(d), c.to(d), None if grad_entropy is None else grad_entropy.to(d))
            for s, d in ((stats, torch.float32), (naive, torch.float32), (exact, torch.float64))
        )
        outs = [torch.empty(n, v), torch.empty(n, v, dtype=torch.float64)]
        R.row_grad(u, bias, targets, 0, naive, theirs, spec, outs[0])
        R.row_grad(u.double(), wide, targets, 0, exact, true, spec, outs[1])
        mine = tile_of(u)
        backend.row_grad(mine, bias, targets, 0, stats, coef, spec, mine)
        check("gradient", mine, *outs)


def test_ties_take_the_first(backend):
    u = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]]).repeat(20, 1)
    spec = R.RowSpec(top1=True)
    state = R.RowState.start(20, spec, u.device)
    fold(backend.row_stats, tile_of(u), None, torch.zeros(20, dtype=torch.int64), spec, state, [0, 2, 5])
    assert (state.argmax == 1).all()


def test_masked_vocabulary(backend):
    """Columns at −inf have probability 0 and gradient 0, also where a whole slab of them comes first."""
    u = torch.randn(18, 40)
    u[:, :33] = -torch.inf
    targets = torch.full((18,), 35)
    spec = R.RowSpec(entropy=True)
    state = R.RowState.start(18, spec, u.device)
    tile = tile_of(u)
    stats = fold(backend.row_stats, tile, None, targets, spec, state, [0, 32, 40])
    exact = u[:, 33:].double().log_softmax(1)
    torch.testing.assert_close(stats.logps.double(), exact[:, 2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.entropy.double(), -(exact.exp() * exact).sum(1), rtol=1e-5, atol=1e-6)
    backend.row_grad(
        tile, None, targets, 0, stats, R.coefficients(stats, torch.ones(18), None, torch.ones(18)), spec, tile
    )
    assert tile[:, 33:].isfinite().all()
    assert not tile[:, :33].nan_to_num(0.0).any()


def test_nan_shows(backend):
    u = torch.randn(17, 50)
    u[3, 10] = torch.nan
    spec = R.RowSpec()
    state = R.RowState.start(17, spec, u.device)
    stats = fold(backend.row_stats, tile_of(u), None, torch.zeros(17, dtype=torch.int64), spec, state, [0, 32, 50])
    assert stats.logps.isnan().tolist() == [i == 3 for i in range(17)]


def test_exponentials_serve_the_gradient(backend):
    u, bias, targets = problem(37, 90, 2.0)
    spec = R.RowSpec(in_scale=1.3)
    state = R.RowState.start(37, spec, u.device)
    tile = tile_of(u)
    stats = fold(backend.row_stats, tile, bias, targets, spec, state, [0, 90])
    kept = torch.empty(90, 48, dtype=torch.bfloat16).t()[:37]
    backend.row_exp(tile, bias, stats, spec, kept)
    torch.testing.assert_close(kept.float(), ((u + bias) * 1.3 - stats.max[:, None]).exp(), rtol=2**-8, atol=1e-30)
    coef = R.coefficients(stats, torch.randn(37), torch.randn(37), None)
    from_kept, from_u = torch.empty(90, 48).t()[:37], torch.empty(90, 48).t()[:37]
    backend.row_grad(kept, bias, targets, 0, stats, coef, R.with_exponentials(spec), from_kept)
    backend.row_grad(tile, bias, targets, 0, stats, coef, spec, from_u)
    torch.testing.assert_close(from_kept, from_u, rtol=2**-7, atol=1e-7)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("exponentials", [False, True])
def test_picked_rows_get_the_gradient_of_all_rows(backend, exponentials, softcap):
    """Beside the tile and over it; more rows than a vector, a slab of the middle."""
    n, v, v0 = 700, 33, 20
    u, bias, _ = problem(n, v, 2.0)
    g = torch.Generator().manual_seed(4)
    targets = torch.randint(0, 2 * v, (n,), generator=g)
    spec = R.RowSpec.make(temperature=0.8, logit_scale=1.1, softcap=None if exponentials else softcap)
    values = torch.randn(4, n, generator=g)
    stats = R.RowStats(values[0] + 5, values[1] + 3, values[2], values[3] - 4, values[3].abs())
    coef = R.RowCoef(*torch.randn(2, n, generator=g), None if exponentials else torch.randn(n, generator=g))
    if exponentials:
        source = torch.empty(v, n, dtype=torch.bfloat16).t()
        backend.row_exp(tile_of(u), bias, stats, spec, source)
        spec = R.with_exponentials(spec)
    else:
        source = tile_of(u)
    everything = tile_of(torch.zeros(n, v))
    backend.row_grad(source, bias, targets, v0, stats, coef, spec, everything)
    rows = torch.randperm(n, generator=g)[:301].sort().values
    part = targets[rows], v0, *R.take(stats, coef, rows), spec
    beside = tile_of(torch.zeros(len(rows), v))
    backend.row_grad(source, bias, *part, beside, rows)
    assert torch.equal(beside, everything[rows])
    if not exponentials:
        over = source[: len(rows)]
        backend.row_grad(source, bias, *part, over, rows)
        assert torch.equal(over, everything[rows])


def test_live_rows_are_those_with_a_coefficient():
    base, target, entropy = torch.zeros(3, 64)
    base[3], target[40], entropy[5], base[9] = 1e-45, -1.0, torch.nan, -0.0
    assert R.live_rows(R.RowCoef(base, target, entropy)).tolist() == [3, 5, 40]
    assert R.live_rows(R.RowCoef(base, target, None)).tolist() == [3, 40]
    assert R.live_rows(R.RowCoef(base[:16], target[:16], None)) is None  # GEMMs take 16 rows either way
    assert R.live_rows(R.RowCoef(torch.ones(64), target, None)) is None
    assert R.live_rows(R.RowCoef(base[10:12], target[10:12], None)).shape == (0,)
    meta = torch.zeros(64, device="meta")
    assert R.live_rows(R.RowCoef(meta, meta, None)) is None  # another device is not asked


def test_true_class_gradient_survives_high_confidence():
    """p_y − 1 at p = 0.9999: subtracting a rounded p would lose all of it."""
    u = torch.tensor([[10.0, 0.0, 0.5, -1.0]])
    exact = u.double().log_softmax(1)
    spec = R.RowSpec()
    state = R.RowState.start(1, spec, u.device)
    R.row_stats(u, None, torch.tensor([0]), 0, state, spec)
    coef = R.coefficients(R.finish(state, spec), torch.ones(1), None, None)
    assert exact[0, 0].exp() > 0.9998
    torch.testing.assert_close(coef.target.double(), -torch.expm1(exact[:, 0]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("entropy", [False, True])
def test_known_gradients_give_statistics_and_gradient_at_once(backend, entropy):
    u, bias, targets = problem(9, 130, 3.0)
    spec = R.RowSpec(in_scale=1.3, entropy=entropy, top1=True)
    known = KnownGrads(torch.linspace(-1, 1, 9), torch.linspace(0.5, 0, 9) if entropy else None)
    tile = tile_of(u)
    state = R.RowState.start(9, spec, u.device)
    backend.row_loss_grad(tile, bias, targets, state, known, spec, tile)
    wide = KnownGrads(*(None if x is None else x.double() for x in known))
    exact = R.RowState.start(9, spec, u.device, torch.float64)
    grad = torch.empty(9, 130, dtype=torch.float64)
    R.row_stats(u.double(), bias.double(), targets, 0, exact, spec)
    stats = R.finish(exact, spec)
    coef = R.coefficients(stats, wide.logps, None, wide.entropy)
    R.row_grad(u.double(), bias.double(), targets, 0, stats, coef, spec, grad)
    torch.testing.assert_close(R.finish(state, spec).logps.double(), stats.logps, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(tile.double(), grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(state.argmax, exact.argmax)


def test_known_gradients_scale_by_powers_of_two():
    scaled, down = KnownGrads(torch.tensor([-3e-6, 0.0]), torch.tensor([1e-5, 0.0])).rescale()
    assert 0.5 <= scaled.entropy.abs().max() < 1
    assert torch.equal(scaled.logps * down, torch.tensor([-3e-6, 0.0]))
    assert KnownGrads(torch.zeros(2)).rescale()[1] == 1
