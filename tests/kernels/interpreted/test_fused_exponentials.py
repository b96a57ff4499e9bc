"""The fused forward that leaves exponentials: the state is the same as without, E within a bfloat16's rounding."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastalign.kernels import _fold
from fastalign.kernels._tiles import fused_tiles
from fastalign.kernels.fused_exponentials import SAMPLE, fused_exponentials_fwd
from fastalign.kernels.fused_forward import fused_logps_fwd

from fastalign.ops import rows as R
from fastalign.ops import whole_tiles

CASES = {  # n, H, V, rows, bias, and what z is of u
    "aligned": (140, 64, 531, False, False, R.RowSpec()),
    "rows, bias, scale": (37, 40, 300, True, True, R.RowSpec(in_scale=0.7)),
    "ragged": (20, 27, 290, True, False, R.RowSpec(entropy=True, top1=True, sum_sq=True)),
    "softcap": (20, 64, 300, False, True, R.RowSpec(in_scale=0.1, out_scale=9.0, softcap=True)),
}


def scales(spec):
    flags = {name: getattr(spec, name) for name in ("entropy", "top1", "sum_sq", "sum_z", "softcap")}
    return {"in_scale": spec.in_scale, "out_scale": spec.out_scale} | flags


def build(n, H, V, device, *, rows, bias, peak=1.0):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n + 9, H, generator=g).bfloat16()
    weight = (torch.randn(V, H, generator=g) * 0.3).bfloat16()
    hidden[::16] *= peak
    weight[SAMPLE:] *= 1 + (peak > 1)
    picked = torch.randperm(n + 9, generator=g)[:n] if rows else None
    if picked is None:
        hidden = hidden[:n].clone()
    targets = torch.randint(0, V, (n,), generator=g)
    b = torch.randn(V, generator=g).bfloat16() if bias else None
    return [None if t is None else t.to(device) for t in (hidden, weight, b, targets, picked)]


def exact(hidden, weight, bias, rows, spec):
    u = (hidden if rows is None else hidden[rows]).double() @ weight.double().T
    return R.tile_logits(u, None if bias is None else bias.double(), spec)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("peak", [1.0, 40.0], ids=["within reach", "out of reach"])
def test_state_and_exponentials(case, peak, device, arch):
    n, H, V, rows, bias, spec = CASES[case]
    hidden, weight, b, targets, picked = build(n, H, V, device, rows=rows, bias=bias, peak=peak)
    memory = torch.full((n, -(-V // 8) * 8 + 8), torch.nan, dtype=torch.bfloat16, device=device)
    out = memory[:, :V]
    values, argmax, reference = fused_exponentials_fwd(
        hidden, weight, b, targets, picked, out, **scales(spec), arch=arch, programs=5
    )
    same, same_argmax = fused_logps_fwd(hidden, weight, b, targets, picked, **scales(spec), arch=arch)
    if fused_tiles(arch, hidden.dtype, aligned=H % 8 == 0).persistent:
        assert torch.equal(values, same)
    torch.testing.assert_close(values, same, rtol=1e-5, atol=1e-5)
    assert torch.equal(argmax, same_argmax)
    assert memory[:, V:].isnan().all(), "written past the vocabulary"
    assert out.isfinite().all()
    distance = values[R.MAX] - reference
    assert (distance >= 0).all()
    assert (distance <= whole_tiles.REACH).all()
    z = exact(hidden, weight, b, picked, spec)
    redone = (distance == 0) & (z[:, :SAMPLE].amax(1) < z.amax(1) - 1)
    assert bool(redone.any()) == (peak > 1 and case in ("aligned", "rows, bias, scale"))
    expected = (z - reference[:, None].double()).exp()
    # float32 logits of magnitude |z| are off by a few ulps; bfloat16 rounds (the interpreter truncates)
    tolerance = 2**-7 + 2e-6 * z.abs().amax()
    wrong = (out.double() - expected).abs() > tolerance * expected + 1e-37
    assert not wrong.any()


def test_every_side_means_the_same_reach():
    assert _fold.KEPT_REACH.value == whole_tiles.REACH


def test_masked_columns_and_no_rows(device, arch):
    """A bias of −inf over the sample and more: its exponentials are 0, whatever the reference."""
    hidden, weight, bias, targets, _ = build(3, 32, 400, device, rows=False, bias=True)
    bias[:300] = -torch.inf
    out = torch.empty(3, 400, dtype=torch.bfloat16, device=device)
    values, _, reference = fused_exponentials_fwd(hidden, weight, bias, targets, None, out, arch=arch)
    assert not out[:, :300].any()
    assert torch.equal(values[R.MAX], reference)
    assert (out.amax(1) >= 0.99).all()
    nothing = fused_exponentials_fwd(hidden[:0], weight, bias, targets[:0], None, out[:0], arch=arch)
    assert [t.shape[-1] for t in nothing] == [0, 0, 0]
