"""Row gradients against float64: on the CPU through Triton's interpreter; ../test_gpu.py runs the same on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastalign.kernels import _tiles, row_kernels

from fastalign.ops import rows as R

# Triton's interpreter evaluates both branches of a `where`, in numpy, which comments on the one that is dropped.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    """Slabs within one block of columns, and slabs over many of them."""
    if request.param == "many blocks":
        monkeypatch.setattr(row_kernels, "row_tiles", lambda v: _tiles.RowTiles(32, 1))


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.usefixtures("blocks")
def test_gradient(with_bias, softcap, entropy, make_tile, assert_within_rule, rounded, kit):
    """In float32 within the rule; in 16 bits that very number, rounded."""
    u, bias, targets = make_tile(9, 101, scale=3.0)
    bias = bias if with_bias else None
    spec = kit.spec_of(softcap)
    exact_s, exact_c, stats, coef = kit.gradient_problem(u, bias, targets, spec, entropy=entropy)

    def in_slabs(function, dtype):
        out = torch.empty_like(u, dtype=dtype)
        for first, last in ((0, 40), (40, 101)):
            part = None if bias is None else bias[first:last]
            function(u[:, first:last], part, targets, first, stats, coef, spec, out[:, first:last])
        return out

    ours = in_slabs(kit.row_grad, torch.float32)
    naive = in_slabs(R.row_grad, torch.float32)
    assert_within_rule("grad", ours, naive, kit.exact_gradient(u, bias, targets, exact_s, exact_c, spec), floor=1e-6)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(in_slabs(kit.row_grad, dtype), rounded(ours, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_confident_targets_keep_their_gradient(dtype, make_tile, rounded, kit):
    """p_y − 1 of a row with p_y = 0.9999 has full relative accuracy: it is not a difference of rounded numbers."""
    u, bias, targets = make_tile(4, 60)
    stats = kit.exact_stats(u, bias, targets, R.RowSpec())
    ones = torch.ones(4, dtype=torch.float64, device=u.device)
    coef = R.coefficients(stats, ones, None, None)
    out = torch.empty_like(u, dtype=dtype)
    kit.row_grad(u, bias, targets, 0, kit.as_float32(stats), kit.as_float32(coef), R.RowSpec(), out)
    expected = -torch.expm1(stats.logps)
    assert expected[3] < 2e-4
    picked = out.gather(1, targets[:, None])[:, 0]
    assert torch.equal(picked, rounded(expected.float(), dtype))


def test_softcap_is_accurate_at_both_ends(device):
    """tanh of small numbers and 1 − tanh² of large ones, which 1 − 2/(exp(2x) + 1) and 1 − t² would cancel away."""
    x = torch.logspace(-6, 1, 400, dtype=torch.float64)
    x = torch.cat([-x.flip(0), torch.zeros(1, dtype=torch.float64), x]).float().to(device)
    n = x.shape[0]
    u, targets, one = x[:, None] * 50, torch.zeros(n, dtype=torch.int64, device=device), torch.ones(n, device=device)
    scales = {"in_scale": 1 / 50, "out_scale": 50.0, "softcap": True}
    state = R.RowState.start(n, R.RowSpec(), u.device)
    row_kernels.row_stats_fwd(u, None, targets, 0, state.values, state.argmax, **scales)
    slope = torch.empty_like(u)
    row_kernels.row_grad_bwd(u, None, targets, 0, state.values[R.MAX], one, one, one, None, slope, **scales)
    exact = (u[:, 0].double() * float(torch.tensor(1 / 50))).cpu()
    for ours, expected in ((state.values[R.MAX] / 50, exact.tanh()), (slope[:, 0], 1 / exact.cosh() ** 2)):
        error = (ours.double().cpu() - expected).abs()
        assert (error <= 1e-6 * expected.abs()).all(), (error / expected.abs()).nan_to_num().max().item()


@pytest.mark.parametrize("v", [1, 2, 15, 16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("blocks")
def test_gradient_over_the_tile_itself(out_dtype, v, make_tile, kit):
    """In float32, and in 16 bits over the first half of each row of a slab: as into other memory, no byte beyond."""
    u, bias, targets = make_tile(5, v)
    spec = kit.spec_of(5.0)
    _, _, stats, coef = kit.gradient_problem(u, bias, targets, spec)
    expected = torch.empty_like(u)
    kit.row_grad(u, bias, targets, 0, stats, coef, spec, expected)
    expected_narrow = torch.empty_like(u, dtype=out_dtype)
    kit.row_grad(u, bias, targets, 0, stats, coef, spec, expected_narrow)

    kept = torch.full((5, v + 7), 3.0, device=u.device)
    tile = kept[:, 2 : v + 2]
    tile.copy_(u)
    kit.row_grad(tile, bias, targets, 0, stats, coef, spec, tile)
    assert torch.equal(tile, expected)

    tile.copy_(u)
    out = tile.view(out_dtype)[:, :v]
    kit.row_grad(tile, bias, targets, 0, stats, coef, spec, out)
    assert torch.equal(out, expected_narrow)
    untouched = torch.full((5, v + 7), 3.0, device=u.device)
    untouched[:, 2 : v + 2] = u
    assert torch.equal(kept.view(torch.int16)[:, 4 + v :], untouched.view(torch.int16)[:, 4 + v :])
    assert (kept[:, :2] == 3).all()


def test_other_overlaps_are_refused(make_tile, kit):
    u, bias, targets = make_tile(4, 32)
    spec = kit.spec_of()
    _, _, stats, coef = kit.gradient_problem(u, bias, targets, spec, entropy=False)
    halves = u.view(torch.bfloat16)
    major = u.t().contiguous().t()
    refused = {
        "packed rows reach into other rows": (u, halves.flatten()[: 4 * 32].view(4, 32)),
        "second half of each row": (u, halves[:, 32:]),
        "every other column": (u, halves[:, ::2]),
        "shifted": (u[:, :16], u[:, 8:24]),
        "narrower, vocabulary-major": (major, major.t().view(torch.bfloat16)[:, :4].t()),
    }
    for tile, out in refused.values():
        with pytest.raises(ValueError, match="overlaps tile"):
            kit.row_grad(tile, bias[: tile.shape[1]], targets, 0, stats, coef, spec, out)
    with pytest.raises(ValueError, match="overlaps tile"):
        row_kernels.row_exp_fwd(u, None, stats.max, halves[:, 32:])
    with pytest.raises(
        ValueError, match="overlaps tile"
    ):  # wider than the tile: it would overwrite what is still to be read
        kit.row_grad(halves[:, :32], None, targets, 0, stats, coef, R.with_exponentials(spec), u)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_rows_without_coefficients_are_not_read(out_dtype, make_tile, kit):
    u, bias, targets = make_tile(5, 70)
    spec = kit.spec_of()
    _, _, stats, coef = kit.gradient_problem(u, bias, targets, spec)
    for vector in coef:
        vector[[1, 3]] = 0.0
    expected = torch.empty_like(u, dtype=out_dtype)
    kit.row_grad(u, bias, targets, 0, stats, coef, spec, expected)
    u[[1, 3]] = torch.nan
    out = torch.full_like(u, torch.nan, dtype=out_dtype)
    kit.row_grad(u, bias, targets, 0, stats, coef, spec, out)
    assert (out[[1, 3]] == 0).all()
    assert torch.equal(out, expected)


def test_an_entropy_coefficient_alone_is_a_gradient(make_tile, assert_within_rule, kit):
    u, bias, targets = make_tile(3, 50)
    spec = kit.spec_of()
    exact_s, exact_c, stats, coef = kit.gradient_problem(u, bias, targets, spec)
    zero = torch.zeros(3, device=u.device)
    coef = R.RowCoef(zero, zero, coef.entropy)
    exact_c = R.RowCoef(zero.double(), zero.double(), exact_c.entropy)
    ours, naive = torch.empty_like(u), torch.empty_like(u)
    kit.row_grad(u, bias, targets, 0, stats, coef, spec, ours)
    R.row_grad(u, bias, targets, 0, stats, coef, spec, naive)
    exact = kit.exact_gradient(u, bias, targets, exact_s, exact_c, spec)
    assert_within_rule("grad", ours, naive, exact, floor=1e-6)
    assert (exact != 0).any(1).all()


def test_coefficients_may_be_broadcast(make_tile, kit):
    u, bias, targets = make_tile(4, 30)
    spec = kit.spec_of()
    _, _, stats, coef = kit.gradient_problem(u, bias, targets, spec)
    broadcast = coef._replace(entropy=coef.entropy[:1].expand(4))
    expected, out = torch.empty_like(u), torch.empty_like(u)
    kit.row_grad(u, bias, targets, 0, stats, coef._replace(entropy=coef.entropy[:1].repeat(4)), spec, expected)
    kit.row_grad(u, bias, targets, 0, stats, broadcast, spec, out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("blocks")
def test_exponentials(dtype, softcap, make_tile, assert_within_rule, rounded, kit):
    u, bias, targets = make_tile(6, 90)
    spec = kit.spec_of(softcap)
    stats = kit.exact_stats(u, bias, targets, spec)
    exact, naive = (
        torch.exp(R.tile_logits(u.to(kind), bias.to(kind), spec) - stats.max[:, None].to(kind))
        for kind in (torch.float64, torch.float32)
    )
    scales = {"in_scale": spec.in_scale, "out_scale": spec.out_scale, "softcap": spec.softcap}
    wide, out = torch.empty_like(u), torch.empty_like(u, dtype=dtype)
    row_kernels.row_exp_fwd(u, bias, stats.max.float(), wide, **scales)
    row_kernels.row_exp_fwd(u, bias, stats.max.float(), out, **scales)
    assert_within_rule("exp", wide, naive, exact, floor=1e-6)
    assert torch.equal(out, rounded(wide, dtype))
    tile = u.clone()
    row_kernels.row_exp_fwd(tile, bias, stats.max.float(), tile.view(dtype)[:, :90], **scales)
    assert torch.equal(tile.view(dtype)[:, :90], out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("blocks")
def test_gradient_from_exponentials(dtype, make_tile, assert_within_rule, rounded, kit):
    """A gradient from 16-bit exponentials is what the contract makes of them: off by their rounding, but not at y."""
    u, bias, targets = make_tile(6, 90)
    spec = kit.spec_of()
    exact_s, exact_c, stats, coef = kit.gradient_problem(u, bias, targets, spec, entropy=False)
    exponentials = torch.exp(R.tile_logits(u, bias, spec) - stats.max[:, None]).to(dtype)
    spec = R.with_exponentials(spec)
    ours, naive = torch.empty_like(u), torch.empty_like(u)
    kit.row_grad(exponentials, None, targets, 0, stats, coef, spec, ours)
    R.row_grad(exponentials, None, targets, 0, stats, coef, spec, naive)
    exact = torch.empty_like(u, dtype=torch.float64)
    R.row_grad(exponentials, None, targets, 0, exact_s, exact_c, spec, exact)
    assert_within_rule("grad", ours, naive, exact, floor=1e-6)
    assert torch.equal(ours.gather(1, targets[:, None])[:, 0], coef.target * spec.in_scale)
    kit.row_grad(exponentials, None, targets, 0, stats, coef, spec, exponentials)
    assert torch.equal(exponentials, rounded(ours, dtype))


@pytest.mark.parametrize("extra", ["bias", "softcap", "entropy"])
def test_exponentials_hold_all_but_the_coefficients(extra, make_tile, kit):
    u, bias, targets = make_tile(2, 10)
    spec = R.with_exponentials(kit.spec_of(5.0 if extra == "softcap" else None))
    _, _, stats, coef = kit.gradient_problem(u, bias, targets, kit.spec_of(), entropy=extra == "entropy")
    tile = torch.zeros(2, 10, dtype=torch.bfloat16, device=u.device)
    with pytest.raises(ValueError, match="exp_tile takes no bias"):
        kit.row_grad(tile, bias if extra == "bias" else None, targets, 0, stats, coef, spec, tile)
