"""Statistics and gradient in one pass against float64: interpreted on the CPU; ../test_gpu_rows.py runs it on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastalign.kernels import _tiles, row_loss_grad

from fastalign.ops import rows as R

# Triton's interpreter evaluates both branches of a `where`, in numpy, which comments on the one that is dropped.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

ALL = dict.fromkeys(("entropy", "top1", "sum_sq", "sum_z"), True)


@pytest.fixture
def run():
    def call(tile, bias, targets, a, e, spec, out):
        state = R.RowState.start(tile.shape[0], spec, tile.device)
        state.values.fill_(7.0)  # nothing of what was there may matter
        row_loss_grad.row_loss_grad(
            tile, bias, targets, state.values, state.argmax, a, e, out, in_scale=spec.in_scale,
            out_scale=spec.out_scale, softcap=spec.softcap, **{name: getattr(spec, name) for name in ALL},
        )  # fmt: skip
        return state

    return call


def upstream(n, device):
    a = torch.linspace(-1, 1, n, device=device)
    a[n // 2] = 0.0
    return a, torch.linspace(0.5, -0.2, n, device=device)


def two_passes(u, bias, targets, a, e, spec, dtype):
    state = R.RowState.start(u.shape[0], spec, u.device, dtype)
    bias = None if bias is None else bias.to(dtype)
    R.row_stats(u.to(dtype), bias, targets, 0, state, spec)
    stats = R.finish(state, spec)
    coef = R.coefficients(stats, a.to(dtype), None, None if e is None else e.to(dtype))
    grad = torch.empty_like(u, dtype=dtype)
    R.row_grad(u.to(dtype), bias, targets, 0, stats, coef, spec, grad)
    return state, stats, grad


@pytest.mark.parametrize("block", [32, 4096])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("n", "v"), [(1, 1), (9, 131), (7, 64)])
def test_against_float64(n, v, softcap, entropy, block, run, make_tile, assert_within_rule, kit, monkeypatch):
    """Random and peaked rows; a target with p = 1 − 1e-12 keeps a relative accuracy that p − 1 would not."""
    monkeypatch.setattr(row_loss_grad, "loss_grad_tiles", lambda v: _tiles.RowTiles(block, 1))
    u, bias, targets = make_tile(n, v, scale=3.0)
    bias = bias if softcap is None else None
    a, e = upstream(n, u.device)
    e = e if entropy else None
    spec = kit.spec_of(softcap, **ALL)
    exact_state, exact, exact_grad = two_passes(u, bias, targets, a, e, spec, torch.float64)
    _, naive, naive_grad = two_passes(u, bias, targets, a, e, spec, torch.float32)
    out = torch.empty_like(u)
    state = run(u, bias, targets, a, e, spec, out)
    ours = R.finish(state, spec)
    for name in ("max", "target", "logps", "lse", "entropy"):
        assert_within_rule(name, *(getattr(stats, name) for stats in (ours, naive, exact)))
    assert torch.equal(state.argmax, exact_state.argmax)
    assert_within_rule("grad", out, naive_grad, exact_grad, floor=2e-6)
    assert (ours.logps <= 0).all()
    for name in ("SUM_SQ", "SUM_Z"):
        row = getattr(R, name)
        torch.testing.assert_close(state.values[row].double(), exact_state.values[row], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [32, 4096])
def test_over_the_tile_itself(block, dtype, run, make_tile, kit, monkeypatch, rounded):
    """In place, in float32 and in 16 bits over the first half of each row: as into other memory."""
    monkeypatch.setattr(row_loss_grad, "loss_grad_tiles", lambda v: _tiles.RowTiles(block, 1))
    u, bias, targets = make_tile(5, 101)
    spec = kit.spec_of(entropy=True)
    a, e = upstream(5, u.device)
    expected = torch.empty_like(u)
    run(u, bias, targets, a, e, spec, expected)
    kept = torch.full((5, 112), 3.0, device=u.device)
    tile = kept[:, :101]
    tile.copy_(u)
    out = tile if dtype == torch.float32 else tile.view(dtype)[:, :101]
    run(tile, bias, targets, a, e, spec, out)
    assert torch.equal(out, rounded(expected, dtype))
    assert (kept[:, 101:] == 3).all()


def test_rows_without_upstream_gradient_get_zeros(run, make_tile, kit):
    u, bias, targets = make_tile(3, 50)
    u[1, 3] = torch.nan
    spec = kit.spec_of()
    out = torch.full_like(u, torch.nan)
    state = run(u, bias, targets, torch.tensor([1.0, 0.0, -1.0], device=u.device), None, spec, out)
    assert (out[1] == 0).all()
    assert out.isfinite().all()
    assert state.values[R.SUM, 1].isnan()


def test_a_row_does_not_see_its_neighbours(run, make_tile, kit):
    u, bias, targets = make_tile(6, 130)
    a, e = upstream(6, u.device)
    spec = kit.spec_of(**ALL)
    together = torch.empty_like(u)
    run(u, bias, targets, a, e, spec, together)
    for row in range(6):
        part = slice(row, row + 1)
        alone = torch.empty_like(u[part])
        run(u[part], bias, targets[part], a[part], e[part], spec, alone)
        assert torch.equal(alone, together[part])


def test_an_entropy_gradient_needs_the_entropy(run, make_tile, kit):
    u, bias, targets = make_tile(2, 10)
    a, e = upstream(2, u.device)
    with pytest.raises(ValueError, match="grad_entropy was given without entropy=True"):
        run(u, bias, targets, a, e, kit.spec_of(), u)
