"""The kernels on silicon, at real sizes against float64; the tests of `interpreted/` are run there as well, compiled.

pytest -m gpu tests/kernels    with 16 GB of device memory; the largest test asks for more and skips without it
"""

from __future__ import annotations

import importlib
import os
import re

import pytest
import torch

pytest.importorskip("triton")

from fastalign.kernels import row_kernels
from fastalign.kernels._tiles import fused_tiles
from fastalign.kernels.fused_forward import fused_logps_fwd

from fastalign.ops import rows as R

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET is set: nothing is compiled"
    ),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]


DEVICE = torch.device("cuda")
LLAMA, QWEN, GPT2 = 128256, 151936, 50257


def need_memory(gigabytes: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of free device memory, {free:.0f} GB are free")


def random_tile(n: int, v: int, scale: float = 4.0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator(DEVICE).manual_seed(0)
    u = torch.randn(n, v, generator=g, device=DEVICE).mul_(scale)
    targets = torch.randint(0, v, (n,), generator=g, device=DEVICE)
    u[::4].scatter_(1, targets[::4, None], 30.0)  # peaked rows
    return u, targets


def stats_of(u, targets, dtype=torch.float32):
    """Finished rows: Triton's in float32, the contract's in float64, chunk by chunk."""
    spec = R.RowSpec(entropy=True, top1=True)
    state = R.RowState.start(u.shape[0], spec, u.device, dtype)
    if dtype == torch.float32:
        row_kernels.row_stats_fwd(u, None, targets, 0, state.values, state.argmax, entropy=True, top1=True)
    else:
        for first in range(0, u.shape[0], 128):
            rows = slice(first, first + 128)
            part = R.RowState(state.values[:, rows].contiguous(), state.argmax[rows].contiguous())
            R.row_stats(u[rows].to(dtype), None, targets[rows], 0, part, spec)
            state.values[:, rows] = part.values
            state.argmax[rows] = part.argmax
    return state, R.finish(state, spec)


def grad(u, targets, stats, coef, out):
    row_kernels.row_grad_bwd(
        u, None, targets, 0, stats.max, stats.log_sum, coef.base, coef.target, coef.entropy, out
    )  # fmt: skip
    return out


@pytest.fixture
def numerics(monkeypatch, repository):
    """The grid that benchmarks/suite.py goes through before it times anything."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    return importlib.import_module("cells.numerics")


@pytest.mark.parametrize("part", ["head/.*/float32/", "head/.*/bfloat16/", "head/.*/float16/", "rows/", "scans/"])
def test_every_schedule_and_kernel_is_within_the_rule(numerics, part):
    cells = [cell for cell in numerics.cells("cuda", False) if re.match(f"numerics/{part}", cell.name)]
    assert cells
    wrong = []
    for cell in cells:
        if torch.cuda.mem_get_info()[0] < cell.gib * 2**30:
            continue
        wrong += [f"{cell.name}: {row}" for row in numerics.run(cell, lambda name: None, {}) if row["error"]]
        torch.cuda.empty_cache()
    assert not wrong, "\n".join(wrong[:10])


@pytest.mark.parametrize(("n", "v"), [(4096, LLAMA), (2048, QWEN), (4095, GPT2), (70001, 1000)])
def test_rows_at_real_sizes(n, v):
    """Odd widths (unaligned rows), more rows than a grid's y or z dimension could hold."""
    need_memory(4 * n * v * 4 / 1e9)
    u, targets = random_tile(n, v)
    state, stats = stats_of(u, targets)
    exact_state, exact = stats_of(u, targets, torch.float64)
    assert torch.equal(state.argmax, exact_state.argmax)
    assert (stats.logps <= 0).all()
    for name in ("logps", "lse", "entropy"):
        error = (getattr(stats, name).double() - getattr(exact, name)).abs()
        assert (error <= 1e-5 * getattr(exact, name).abs().clamp(min=1)).all(), (name, error.max().item())
    ones = torch.ones(n, dtype=torch.float64, device=DEVICE)
    exact_coef = R.coefficients(exact, ones, 0.1 * ones, 0.01 * ones)
    coef = R.RowCoef(*(x.float() for x in exact_coef))
    out = grad(u, targets, stats, coef, torch.empty_like(u))
    for first in range(0, n, 512):
        rows = slice(first, first + 512)
        part = torch.empty_like(u[rows], dtype=torch.float64)
        some = R.RowStats(*(x[rows] for x in exact))
        R.row_grad(
            u[rows].double(), None, targets[rows], 0, some, R.RowCoef(*(x[rows] for x in exact_coef)), R.RowSpec(), part
        )
        assert ((out[rows].double() - part).abs() <= 2e-5 * part.abs() + 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("v", [GPT2, 32768, 8192, 4096, 4097, 8191, 100])
def test_gradient_over_its_own_tile_has_no_race(v, dtype):
    """What the barrier is for: many warps, blocks over bytes of earlier blocks, run often enough for a race to show."""
    u, targets = random_tile(2048, v)
    _, stats = stats_of(u, targets)
    coef = R.coefficients(stats, torch.ones(2048, device=DEVICE), None, torch.ones(2048, device=DEVICE))
    expected = grad(u, targets, stats, coef, torch.empty_like(u, dtype=dtype))
    for _ in range(30):
        tile = u.clone()
        out = grad(tile, targets, stats, coef, tile.view(dtype)[:, :v])
        assert torch.equal(out.view(torch.int16), expected.view(torch.int16))


def test_more_elements_than_32_bits_count():
    """2.6e9 logits: offsets of the last rows do not fit 32 bits."""
    need_memory(32)
    n, v = 20000, 131072
    u = torch.zeros(n, v, device=DEVICE)
    targets = torch.full((n,), v - 1, device=DEVICE)
    u[-3:] = torch.randn(3, v, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    _, stats = stats_of(u, targets)
    _, last = stats_of(u[-3:].contiguous(), targets[-3:])
    assert torch.equal(stats.logps[-3:], last.logps)
    assert torch.allclose(stats.logps[:-3], torch.tensor(-float(v)).abs().log().neg().to(DEVICE), atol=1e-5)
    coef = R.coefficients(stats, torch.ones(n, device=DEVICE), None, None)
    expected = grad(
        u[-3:].contiguous(),
        targets[-3:],
        last,
        R.RowCoef(coef.base[-3:], coef.target[-3:], None),
        torch.empty_like(u[-3:]),
    )
    assert torch.equal(grad(u, targets, stats, coef, u)[-3:], expected)


@pytest.mark.parametrize(
    ("n", "hidden_size", "vocab", "dtype"),
    [
        (2048, 4096, LLAMA, torch.bfloat16),
        (2048, 2048, QWEN, torch.float16),
        (1000, 768, GPT2, torch.bfloat16),
        (999, 2304, 256000, torch.bfloat16),
        (513, 1001, GPT2, torch.bfloat16),
        (300, 1000, 32003, torch.float32),
    ],
)
def test_fused_forward_at_real_sizes(n, hidden_size, vocab, dtype, arch):
    """Aligned and unaligned H, V no multiple of a tile; float64 on the same, already rounded inputs is the measure."""
    need_memory(12)
    g = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(n, hidden_size, generator=g, device=DEVICE).to(dtype)
    weight = torch.randn(vocab, hidden_size, generator=g, device=DEVICE).mul_(3 / hidden_size**0.5).to(dtype)
    targets = torch.randint(0, vocab, (n,), generator=g, device=DEVICE)
    spec = R.RowSpec(entropy=True, top1=True)

    def fused(rows):
        values, argmax = fused_logps_fwd(hidden, weight, None, targets[rows], rows, entropy=True, top1=True, arch=arch)
        return R.RowState(values, argmax)

    everything = torch.arange(n, device=DEVICE)
    state = fused(everything)
    stats = R.finish(state, spec)
    assert (stats.logps <= 0).all()
    for rows in everything.split(64)[::4]:
        exact_state = R.RowState.start(len(rows), spec, DEVICE, torch.float64)
        R.row_stats(hidden[rows].double() @ weight.double().t(), None, targets[rows], 0, exact_state, spec)
        exact = R.finish(exact_state, spec)
        for name in ("logps", "lse", "entropy"):
            error = (getattr(stats, name)[rows].double() - getattr(exact, name)).abs()
            assert (error <= 2e-5 * getattr(exact, name).abs().clamp(min=1)).all(), (name, error.max().item())
        assert (state.argmax[rows] == exact_state.argmax).float().mean() > 0.99  # near ties may fall either way
    for _ in range(3):
        again = fused(everything)
        assert torch.equal(again.values, state.values), "not deterministic"
    for rows in (everything[:1], everything[-1:], everything[100:229], everything.flip(0)):
        assert torch.equal(fused(rows).values, state.values[:, rows]), "depends on the other rows"


def test_fused_forward_needs_no_logits(arch):
    """Peak memory beside the inputs: the partial results, 8 bytes for each row and split."""
    n, vocab = 8192, LLAMA
    hidden = torch.randn(n, 1024, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(vocab, 1024, device=DEVICE, dtype=torch.bfloat16)
    targets = torch.zeros(n, dtype=torch.int64, device=DEVICE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fused_logps_fwd(hidden, weight, None, targets, None, arch=arch)
    peak = torch.cuda.max_memory_allocated() - before
    splits = -(-vocab // fused_tiles(arch, torch.bfloat16).split_v)
    assert peak <= 8 * n * splits + 24 * n + 2**20
    assert peak < 20e6


def test_tensors_of_another_device_than_the_current_one(arch):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    u, targets = (x.to("cuda:1") for x in random_tile(5, 300))
    with torch.cuda.device(0):
        _, stats = stats_of(u, targets)
        values, _ = fused_logps_fwd(u, u, None, targets % 5, None, arch=arch)
    assert torch.allclose(stats.lse, u.logsumexp(1))
    assert torch.allclose(values[R.MAX], (u @ u.t()).amax(1), rtol=1e-4)


def test_a_stream_of_its_own():
    u, targets = random_tile(64, 5000)
    expected, _ = stats_of(u, targets)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        moved = u.clone()
        state, _ = stats_of(moved, targets)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(state.values, expected.values)
