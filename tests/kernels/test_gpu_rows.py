"""Statistics and gradient of rows in one pass, on a GPU at real sizes: Triton's kernel and the CUDA one (csrc/cuda).

    pytest -m gpu tests/kernels/test_gpu_rows.py

The row kernels of two passes have their tests in test_gpu.py. Float64 on the same float32 tile is the measure.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fastalign.ops import backends
from fastalign.ops import rows as R
from fastalign.ops.known_grads import KnownGrads

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET is set: nothing is compiled"
    ),
]

_path = Path(__file__).parent / "interpreted" / "test_row_loss_grad.py"
_spec = importlib.util.spec_from_file_location("interpreted_row_loss_grad", _path)
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
globals().update({  # the interpreter's tests, compiled
    key: value for key, value in vars(_module).items()
    if key.startswith("test_") or isinstance(value, type(pytest.fixture(lambda: None)))
})  # fmt: skip

LLAMA, QWEN, GPT2, GEMMA = 128256, 151936, 50257, 256000
SHAPES = [(257, LLAMA), (130, QWEN), (65, GPT2), (40, GEMMA), (9, 460_000), (700, 4097), (1000, 1000), (33, 31), (5, 1)]
NONE: dict[str, bool] = {}
ALL = dict.fromkeys(("entropy", "top1", "sum_sq", "sum_z"), True)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["triton", "cuda"])
def backend(request, device):
    try:
        return backends.resolve(request.param, torch.zeros(1, device=device))
    except ValueError as error:
        pytest.skip(str(error))


def need_memory(gigabytes):
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of free device memory, {free:.0f} GB are free")


def problem(n, v, device, *, pitch=None, seed=0):
    """Flat, random and peaked rows of a tile whose rows are `pitch` columns apart, NaN between them."""
    g = torch.Generator(device).manual_seed(seed)
    memory = torch.full((n, v if pitch is None else pitch), torch.nan, device=device)
    tile = memory[:, :v].normal_(generator=g)
    tile *= torch.linspace(0, 8, n, device=device)[:, None]
    targets = torch.randint(0, v, (n,), generator=g, device=device)
    rows = torch.arange(0, n, 4, device=device)
    tile[rows, targets[rows]] = 60.0  # p up to 1
    bias = torch.randn(v, generator=g, device=device)
    known = KnownGrads(torch.linspace(-1, 0.8, n, device=device), torch.linspace(0.3, -0.2, n, device=device))
    return tile, bias, targets, known


def fill(backend, tile, bias, targets, known, spec, out):
    state = R.RowState.start(tile.shape[0], spec, tile.device)
    backend.row_loss_grad(tile, bias, targets, state, known, spec, out)
    return state


def exact(tile, bias, targets, known, spec, dtype=torch.float64):
    state = R.RowState.start(tile.shape[0], spec, tile.device, dtype)
    wide, bias = tile.to(dtype), None if bias is None else bias.to(dtype)
    R.row_stats(wide, bias, targets, 0, state, spec)
    stats = R.finish(state, spec)
    entropy = None if known.entropy is None else known.entropy.to(dtype)
    grad = torch.empty_like(wide, memory_format=torch.contiguous_format)
    R.row_grad(
        wide, bias, targets, 0, stats, R.coefficients(stats, known.logps.to(dtype), None, entropy), spec, grad
    )  # fmt: skip
    return state, stats, grad


def pitched(v):
    return -(-v // 16) * 16


@pytest.mark.parametrize("flags", [NONE, ALL], ids=["plain", "all"])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize(("n", "v"), SHAPES)
def test_at_real_sizes(n, v, softcap, flags, backend, device, assert_within_rule):
    tile, bias, targets, known = problem(n, v, device, pitch=pitched(v))
    spec = R.RowSpec.make(temperature=0.8, logit_scale=1.0, softcap=softcap, **flags)
    if not flags:
        bias, known = None, KnownGrads(known.logps)
    out = torch.empty(n, v, device=device)
    state = fill(backend, tile, bias, targets, known, spec, out)
    ours = R.finish(state, spec)
    assert (ours.logps <= 0).all()
    assert (state.values[R.SUM] >= 1).all()
    for rows in torch.arange(n, device=device).split(32):
        part = KnownGrads(*(None if x is None else x[rows] for x in known))
        results = [
            exact(tile[rows], bias, targets[rows], part, spec, dtype) for dtype in (torch.float32, torch.float64)
        ]
        (_, naive, naive_grad), (exact_state, best, best_grad) = results
        for name in ("max", "target", "logps", "lse", *(["entropy"] if flags else [])):
            assert_within_rule(name, getattr(ours, name)[rows], getattr(naive, name), getattr(best, name), floor=5e-6)
        assert_within_rule("gradient", out[rows], naive_grad, best_grad, floor=5e-6)
        if flags:
            assert torch.equal(state.argmax[rows], exact_state.argmax) or softcap  # a softcap makes near ties
            for row in (R.SUM_SQ, R.SUM_Z):
                scale = exact_state.values[row].abs().clamp(min=v**0.5)
                assert ((state.values[row, rows].double() - exact_state.values[row]).abs() <= 2e-5 * scale).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pitch", ["tight", "padded"])
@pytest.mark.parametrize("v", [LLAMA, GPT2, 32000, 8191, 4096, 100])
def test_over_its_own_tile_without_a_race(v, pitch, dtype, backend, device):
    """Twenty times, more rows than the machine holds at once: the bits of a gradient that was written elsewhere."""
    n = 400 if v > 60000 else 2000
    pitch = v + v % 2 if pitch == "tight" else pitched(v)
    tile, bias, targets, known = problem(n, v, device, pitch=pitch)
    spec = R.RowSpec(entropy=True)
    apart = torch.empty(n, v, dtype=dtype, device=device)
    expected = fill(backend, tile, bias, targets, known, spec, apart)
    for _ in range(20):
        memory = torch.zeros(n, pitch, device=device)
        own = memory[:, :v].copy_(tile)
        out = own if dtype == torch.float32 else memory.view(dtype)[:, :v]
        state = fill(backend, own, bias, targets, known, spec, out)
        assert torch.equal(out, apart)
        assert torch.equal(state.values, expected.values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_once_to_the_nearest(dtype, backend, device):
    tile, bias, targets, known = problem(300, 5000, device)
    wide, out = torch.empty(300, 5000, device=device), torch.empty(300, 5000, dtype=dtype, device=device)
    for target in (wide, out):
        fill(backend, tile, bias, targets, known, R.RowSpec(entropy=True), target)
    assert torch.equal(out, wide.to(dtype))


@pytest.mark.parametrize("v", [LLAMA, GPT2, 3000])
def test_a_row_depends_on_nothing_but_itself(v, backend, device):
    """Alone, among others, in another order; where the CUDA kernel is concerned also from another address modulo 16."""
    tile, bias, targets, known = problem(300, v, device, pitch=pitched(v))
    spec = R.RowSpec(in_scale=1.2, **ALL)
    grad = torch.empty(300, v, device=device)
    state = fill(backend, tile, bias, targets, known, spec, grad)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0)).to(device)
    for rows in (order, order[:1], order[:7], torch.arange(299, 300, device=device)):
        picked = torch.empty(len(rows), pitched(v), device=device)[:, :v].copy_(tile[rows])
        part = KnownGrads(*(x[rows] for x in known))
        out = torch.empty(len(rows), v, device=device)
        again = fill(backend, picked, bias, targets[rows], part, spec, out)
        assert torch.equal(again.values, state.values[:, rows])
        assert torch.equal(again.argmax, state.argmax[rows])
        assert torch.equal(out, grad[rows])
    if backend.name == "cuda":
        shifted = torch.empty(300 * v + 1, device=device)[1:].view(300, v).copy_(tile)
        out = torch.empty(300, v, device=device)
        assert torch.equal(fill(backend, shifted, bias, targets, known, spec, out).values, state.values)
        assert torch.equal(out, grad)


def test_more_elements_than_32_bits_count(backend, device):
    """2.6e9 logits: offsets of the last rows do not fit 32 bits."""
    need_memory(24)
    n, v = 20000, 131072
    tile = torch.zeros(n, v, device=device)
    last, bias, targets, known = problem(3, v, device, seed=1)
    tile[-3:] = last
    everywhere = KnownGrads(
        known.logps.new_full((n,), -1e-3).index_copy_(0, torch.arange(n - 3, n, device=device), known.logps)
    )
    all_targets = torch.full((n,), v - 1, device=device).index_copy_(0, torch.arange(n - 3, n, device=device), targets)
    expected = torch.empty(3, v, dtype=torch.bfloat16, device=device)
    few = fill(backend, last, bias, targets, KnownGrads(known.logps), R.RowSpec(), expected)
    out = tile.view(torch.bfloat16)[:, :v]
    state = fill(backend, tile, bias, all_targets, everywhere, R.RowSpec(), out)
    assert torch.equal(state.values[:, -3:], few.values)
    assert torch.equal(out[-3:], expected)


def test_impossible_columns_broken_logits_and_rows_without_gradient(backend, device):
    tile, bias, targets, known = problem(4, 40000, device)
    bias[:30000] = -torch.inf
    targets[:] = 35000
    known.logps[1] = known.entropy[1] = 0.0
    tile[2, 31000], tile[3, 31000] = torch.nan, torch.inf
    out = torch.full((4, 40000), torch.nan, dtype=torch.bfloat16, device=device)
    spec = R.RowSpec(entropy=True)
    stats = R.finish(fill(backend, tile, bias, targets, known, spec, out), spec)
    assert stats.logps.isnan().tolist() == [False, False, True, True]
    assert (out[0, :30000] == 0).all()
    assert out[0].isfinite().all()
    assert (out[1] == 0).all()


def test_cross_entropy_of_the_same_logits(backend, device):
    """What users compare with: F.cross_entropy and its gradient, in float64."""
    n, v = 500, 32003
    tile, _, targets, _ = problem(n, v, device)
    wide = tile.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(wide, targets)
    loss.backward()
    spec, out = R.RowSpec(), torch.empty(n, v, device=device)
    known = KnownGrads(torch.full((n,), -1 / n, device=device))
    stats = R.finish(fill(backend, tile, None, targets, known, spec, out), spec)
    torch.testing.assert_close(-stats.logps.double().mean(), loss.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.double(), wide.grad, rtol=2e-5, atol=1e-9)


def test_a_stream_of_its_own_and_a_graph(backend, device):
    """Launched on the current stream, nothing allocated or waited for: it can be captured and replayed."""
    tile, bias, targets, known = problem(64, 5000, device)
    spec, out = R.RowSpec(), torch.empty(64, 5000, dtype=torch.bfloat16, device=device)
    known = KnownGrads(known.logps)
    expected = fill(backend, tile, bias, targets, known, spec, out).values.clone()
    wanted = out.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        moved = tile.clone()
        state = fill(backend, moved, bias, targets, known, spec, out.zero_())
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(state.values, expected)
    assert torch.equal(out, wanted)
    state, graph = R.RowState.start(64, spec, device), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.row_loss_grad(tile, bias, targets, state, known, spec, out)
    out.zero_()
    graph.replay()
    assert torch.equal(out, wanted)
    assert torch.equal(state.values[: R.ENT], expected[: R.ENT])


def test_tensors_of_another_device_than_the_current_one(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    tile, bias, targets, known = problem(5, 3000, torch.device("cuda:1"))
    out = torch.empty_like(tile)
    with torch.cuda.device(0):
        state = fill(backend, tile, bias, targets, known, R.RowSpec(entropy=True), out)
        assert torch.cuda.current_device() == 0
    lse = (tile + bias).double().logsumexp(1)
    assert torch.allclose(R.finish(state, R.RowSpec(entropy=True)).lse.double(), lse, rtol=1e-5)


def test_a_vocabulary_that_no_cluster_holds_is_refused(backend, device):
    if backend.name != "cuda":
        pytest.skip("Triton's kernel takes any")
    from fastalign.kernels import cuda_rows

    tile, _, targets, known = problem(1, cuda_rows.MAX_COLUMNS + 1, device)
    with pytest.raises(ValueError, match="take backend='triton'"):
        fill(backend, tile, None, targets, KnownGrads(known.logps), R.RowSpec(), tile)
