"""The fused forward against float64: on the CPU through Triton's interpreter; ../test_gpu.py runs the same on a GPU."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from fastalign.kernels import fused_forward
from fastalign.kernels._tiles import FusedTiles
from fastalign.kernels.fused_forward import fused_logps_fwd

from fastalign.ops import rows as R

# Triton's interpreter evaluates both branches of a `where`, in numpy, which comments on the one that is dropped.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

FLAGS = ("entropy", "top1", "sum_sq", "sum_z")
ALL = dict.fromkeys(FLAGS, True)
# So small that a small problem has several row blocks, splits, tiles and pieces, but not too small for tensor cores.
TILES = FusedTiles(16, 32, 16, num_warps=4, num_stages=2, parts=2, split_v=64, group_n=2)
KINDS = {"pointers": TILES, "persistent": dataclasses.replace(TILES, persistent=True)}


def spec_of(softcap=None, **flags):
    return R.RowSpec.make(temperature=0.7, logit_scale=1.1, softcap=softcap, **flags)


@pytest.fixture(params=KINDS)
def tiles(request):
    """Both kernels."""
    return KINDS[request.param]


def run(hidden, weight, bias, targets, spec, arch, rows=None, tiles=TILES, **options):
    flags = {name: getattr(spec, name) for name in FLAGS}
    state = fused_logps_fwd(
        hidden,
        weight,
        bias,
        targets,
        rows,
        spec.in_scale,
        spec.out_scale,
        spec.softcap,
        **flags,
        arch=arch,
        tiles=tiles,
        **options,
    )
    return R.RowState(*state)


def reference(hidden, weight, bias, targets, spec, dtype):
    """The state from logits in `dtype`: float64, or float32 for what plain PyTorch makes of the same inputs."""
    state = R.RowState.start(hidden.shape[0], spec, hidden.device, dtype)
    wide = None if bias is None else bias.to(dtype)
    R.row_stats(hidden.to(dtype) @ weight.to(dtype).t(), wide, targets, 0, state, spec)
    return state


@pytest.fixture(scope="module")
def problem(device):
    """problem(N, H, V, dtype) -> hidden, weight, bias, targets. Rows: flat to peaked; each other target is top.

    Rows start on 16 bytes whatever H is, as tensor descriptors want it.
    """

    def padded(x, dtype):
        wide = torch.full((x.shape[0], -(-x.shape[1] // 16) * 16), torch.nan, device=device, dtype=dtype)
        return wide[:, : x.shape[1]].copy_(x)

    def make(n, hidden_size, vocab, dtype=torch.float32, seed=0):
        g = torch.Generator().manual_seed(seed)
        hidden, weight = torch.randn(n, hidden_size, generator=g), torch.randn(vocab, hidden_size, generator=g)
        hidden *= torch.linspace(0.1, 3, n)[:, None]
        bias, targets = torch.randn(vocab, generator=g), torch.randint(0, vocab, (n,), generator=g)
        best = (hidden @ weight.t() + bias).argmax(1)
        targets[::2] = best[::2]
        return padded(hidden, dtype), padded(weight, dtype), bias.to(device, dtype), targets.to(device)

    return make


def check(ours, naive, exact, spec, vocab, assert_within_rule, floor=3e-6):
    results = [R.finish(state, spec) for state in (ours, naive, exact)]
    for name in ("max", "target", "logps", "lse", *(["entropy"] if spec.entropy else [])):
        assert_within_rule(name, *(getattr(stats, name) for stats in results), floor=floor)
    assert (results[0].logps <= 0).all()
    assert (ours.values[R.SUM] >= 1).all()
    if spec.sum_sq:
        assert_within_rule(
            "Σ p²", *(s.values[R.SUM_SQ] / s.values[R.SUM] ** 2 for s in (ours, naive, exact)), floor=floor
        )
    if spec.sum_z:
        assert_within_rule("mean z", *(s.values[R.SUM_Z] / vocab for s in (ours, naive, exact)), floor=4 * floor)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "hidden_size", "vocab"), [(1, 1, 1), (37, 33, 150), (16, 48, 128)])
def test_against_float64(n, hidden_size, vocab, dtype, with_bias, softcap, problem, arch, assert_within_rule, tiles):
    """16-bit inputs are held to what float32 makes of them: products and sums are float32, nothing else is rounded."""
    hidden, weight, bias, targets = problem(n, hidden_size, vocab, dtype)
    bias = bias if with_bias else None
    spec = spec_of(softcap, **ALL)
    ours = run(hidden, weight, bias, targets, spec, arch, tiles=tiles)
    naive, exact = (reference(hidden, weight, bias, targets, spec, kind) for kind in (torch.float32, torch.float64))
    check(ours, naive, exact, spec, vocab, assert_within_rule)
    z = R.tile_logits(hidden.double() @ weight.double().t(), None if bias is None else bias.double(), spec)
    shortfall = exact.values[R.MAX] - z.gather(1, ours.argmax[:, None])[:, 0]  # a softcap makes near ties
    assert (shortfall <= 1e-5 * exact.values[R.MAX].abs().clamp(min=1)).all()


@pytest.mark.parametrize("flag", [None, *FLAGS])
def test_a_flag_adds_its_sums_and_nothing_else(flag, problem, arch, tiles):
    hidden, weight, _, targets = problem(5, 20, 70)
    state = run(hidden, weight, None, targets, spec_of(**({} if flag is None else {flag: True})), arch, tiles=tiles)
    full = run(hidden, weight, None, targets, spec_of(**ALL), arch, tiles=tiles)
    assert torch.equal(state.values[: R.ENT], full.values[: R.ENT])
    for name, row in (("entropy", R.ENT), ("sum_sq", R.SUM_SQ), ("sum_z", R.SUM_Z)):
        assert torch.equal(state.values[row], full.values[row] if flag == name else torch.zeros_like(full.values[row]))
    assert state.argmax.shape == (5 if flag == "top1" else 0,)
    if flag == "top1":
        assert torch.equal(state.argmax, full.argmax)


def test_scored_rows(problem, arch, tiles):
    """`rows` picks rows of hidden in the order of the targets, repeats included."""
    hidden, weight, bias, targets = problem(40, 20, 70)
    rows = torch.tensor([39, 0, 7, 7, 21, 3], device=hidden.device)
    spec = spec_of(**ALL)
    picked = run(hidden, weight, bias, targets[rows], spec, arch, rows=rows, tiles=tiles)
    expected = run(hidden[rows], weight, bias, targets[rows], spec, arch, tiles=tiles)
    assert torch.equal(picked.values, expected.values)
    assert torch.equal(picked.argmax, expected.argmax)


def test_picked_rows_come_in_parts(problem, arch, monkeypatch):
    """Tensor descriptors want the picked rows side by side: so many bytes of them at a time."""
    monkeypatch.setattr(fused_forward, "GATHER_BYTES", 1)
    hidden, weight, bias, targets = problem(100, 19, 70)
    rows = torch.arange(99, -1, -1, device=hidden.device)
    spec = spec_of(**ALL)
    state, expected = (
        run(hidden, weight, bias, targets[rows], spec, arch, rows=rows, tiles=tiles) for tiles in KINDS.values()
    )
    assert torch.allclose(state.values, expected.values, rtol=1e-5)
    assert torch.equal(state.argmax, expected.argmax)


def test_the_number_of_programs_does_not_matter(problem, arch):
    hidden, weight, bias, targets = problem(40, 20, 150)
    spec = spec_of(**ALL)
    states = [
        run(hidden, weight, bias, targets, spec, arch, tiles=KINDS["persistent"], programs=programs)
        for programs in (1, 2, 7, 132)
    ]
    for state in states[1:]:
        assert torch.equal(state.values, states[0].values)
        assert torch.equal(state.argmax, states[0].argmax)


@pytest.mark.parametrize("in_scale", [-0.7, 0.0])
def test_scales_that_are_not_positive(in_scale, problem, arch, assert_within_rule, tiles):
    hidden, weight, bias, targets = problem(20, 20, 70)
    spec = R.RowSpec(in_scale=in_scale, **ALL)
    ours = run(hidden, weight, bias, targets, spec, arch, tiles=tiles)
    naive, exact = (reference(hidden, weight, bias, targets, spec, kind) for kind in (torch.float32, torch.float64))
    check(ours, naive, exact, spec, 70, assert_within_rule)
    assert torch.equal(ours.argmax, exact.argmax)


def test_tensor_descriptors_need_aligned_rows(problem, arch):
    hidden, weight, _, targets = problem(5, 20, 70)
    with pytest.raises(ValueError, match=r"contiguous rows that start on 16 bytes, got torch.float32 \(5, 19\)"):
        run(hidden[:, 1:], weight[:, 1:].contiguous(), None, targets, R.RowSpec(), arch, tiles=KINDS["persistent"])


def test_a_row_depends_on_nothing_but_itself(problem, arch, tiles):
    """Alone, in another order, in another block, among more rows: the same bits.

    Inputs are multiples of 1/8, so that dot products are exact however the interpreter's matrix product (the CPU's
    BLAS, which does treat rows differently) adds them up.
    """
    hidden, weight, bias, targets = problem(37, 40, 150)
    hidden, weight = (hidden * 8).round() / 8, (weight * 8).round() / 8
    spec = spec_of(**ALL)
    together = run(hidden, weight, bias, targets, spec, arch, tiles=tiles)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0)).to(hidden.device)
    shuffled = run(hidden[order], weight, bias, targets[order], spec, arch, tiles=tiles)
    assert torch.equal(shuffled.values, together.values[:, order])
    for row in (0, 15, 16, 36):
        alone = run(hidden[row : row + 1], weight, bias, targets[row : row + 1], spec, arch, tiles=tiles)
        assert torch.equal(alone.values[:, 0], together.values[:, row])


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("split_v", [32, 96, 256])
def test_tiles_do_not_matter(split_v, parts, problem, arch, assert_within_rule):
    hidden, weight, bias, targets = problem(20, 33, 150)
    spec = spec_of(entropy=True, top1=True)
    tiles = FusedTiles(16, 32, 16, num_warps=4, num_stages=2, parts=parts, split_v=split_v, group_n=1)
    ours = run(hidden, weight, bias, targets, spec, arch, tiles=tiles)
    naive, exact = (reference(hidden, weight, bias, targets, spec, kind) for kind in (torch.float32, torch.float64))
    check(ours, naive, exact, spec, 150, assert_within_rule)
    assert torch.equal(ours.argmax, exact.argmax)


def test_the_architectures_own_tiles(problem, arch, assert_within_rule):
    spec = spec_of(**ALL)
    for dtype, hidden_size in ((torch.bfloat16, 64), (torch.bfloat16, 33), (torch.float32, 33)):
        hidden, weight, bias, targets = problem(3, hidden_size, 300, dtype)
        ours = run(hidden, weight, bias, targets, spec, arch, tiles=None)
        naive, exact = (reference(hidden, weight, bias, targets, spec, kind) for kind in (torch.float32, torch.float64))
        check(ours, naive, exact, spec, 300, assert_within_rule)


@pytest.mark.parametrize("height", [0.0, -300.0])
@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 65, 129])
def test_columns_past_the_vocabulary_do_not_count(vocab, height, device, arch, tiles):
    """Equal logits give lse = logit + log V for any V: a column too many, or a maximum that starts at 0, would show."""
    hidden = torch.full((3, 16), height, device=device)
    weight = torch.full((vocab, 16), 1 / 16, device=device)
    targets = torch.full((3,), vocab - 1, device=device)
    spec = R.RowSpec(entropy=True, top1=True, sum_z=True)
    state = run(hidden, weight, None, targets, spec, arch, tiles=tiles)
    stats = R.finish(state, spec)
    assert (state.values[R.MAX] == height).all()
    assert torch.allclose(stats.logps, torch.full_like(stats.logps, -math.log(vocab)), atol=1e-6)
    assert torch.allclose(stats.entropy, torch.full_like(stats.logps, math.log(vocab)), atol=1e-6)
    assert torch.allclose(state.values[R.SUM_Z], torch.full_like(stats.logps, height * vocab))
    assert (state.argmax == 0).all()


def test_nothing_outside_the_inputs_is_read(problem, arch):
    hidden, weight, bias, targets = problem(21, 23, 71)
    spec = spec_of(**ALL)
    expected = run(hidden, weight, bias, targets, spec, arch)

    def inside(x):
        big = x.new_full([size + 40 for size in x.shape], torch.nan)
        view = big[tuple(slice(0, size) for size in x.shape)]
        return view.copy_(x)

    state = run(inside(hidden), inside(weight), inside(bias), targets, spec, arch)
    assert torch.equal(state.values, expected.values)
    transposed = [x.t().contiguous().t() for x in (hidden, weight)]
    state = run(*transposed, bias, targets, spec, arch)
    assert torch.equal(state.values, expected.values)


def test_first_of_equal_maxima_wins(device, arch, tiles):
    """Equal columns in different pieces, tiles and splits."""
    hidden = torch.ones(4, 16, device=device)
    targets = torch.zeros(4, dtype=torch.int64, device=device)
    for columns in ([70, 150], [20, 10], [40, 70, 33], [149, 63, 64]):
        weight = torch.zeros(151, 16, device=device)
        weight[columns] = 1.0
        state = run(hidden, weight, None, targets, R.RowSpec(top1=True), arch, tiles=tiles)
        assert state.argmax.tolist() == [min(columns)] * 4


def test_impossible_columns_count_for_nothing(problem, arch, assert_within_rule, tiles):
    """A bias of -inf rules columns out, even all of a split."""
    hidden, weight, bias, targets = problem(5, 16, 150)
    targets = targets % 50 + 100
    bias[:100] = -torch.inf
    spec = spec_of(entropy=True, top1=True, sum_sq=True)
    ours = run(hidden, weight, bias, targets, spec, arch, tiles=tiles)
    rest = (hidden, weight[100:], bias[100:], targets - 100, spec)
    naive, exact = reference(*rest, torch.float32), reference(*rest, torch.float64)
    check(ours, naive, exact, spec, 150, assert_within_rule)
    assert torch.equal(ours.argmax, exact.argmax + 100)


def test_no_rows(problem, arch, tiles):
    hidden, weight, bias, targets = problem(3, 8, 40)
    state = run(hidden, weight, bias, targets[:0], spec_of(**ALL), arch, rows=targets[:0])
    assert state.values.shape == (6, 0)
    assert state.argmax.shape == (0,)


@settings(max_examples=12)
@given(
    n=st.integers(1, 40), hidden_size=st.integers(1, 50), vocab=st.integers(1, 140), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_any_shape(n, hidden_size, vocab, seed, dtype, problem, arch, assert_within_rule):
    hidden, weight, bias, targets = problem(n, hidden_size, vocab, dtype, seed)
    spec = spec_of(entropy=True)
    ours = run(hidden, weight, bias, targets, spec, arch)
    naive, exact = (reference(hidden, weight, bias, targets, spec, kind) for kind in (torch.float32, torch.float64))
    check(ours, naive, exact, spec, vocab, assert_within_rule, floor=1e-5)
