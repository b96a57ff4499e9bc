"""The fused forward on a GPU: both kernels against float64, a row in any company, offsets of more than 32 bits, speed.

    pytest -m gpu tests/kernels/test_gpu_fused.py

Tests at small sizes are those of interpreted/test_fused_forward.py, which run compiled where there is a GPU.
"""

from __future__ import annotations

import dataclasses
import os
import statistics

import pytest
import torch

pytest.importorskip("triton")

from fastalign.kernels._tiles import FusedTiles, fused_tiles
from fastalign.kernels.fused_forward import fused_logps_fwd

from fastalign.ops import rows as R

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET is set: nothing is compiled"
    ),
]

LLAMA, QWEN, GPT2 = 128256, 151936, 50257
ALL = dict.fromkeys(("entropy", "top1", "sum_sq", "sum_z"), True)


def need_memory(gigabytes: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of free device memory, {free:.0f} GB are free")


@pytest.fixture(params=["its own", "pointers", "persistent"])
def tiles(request, arch):
    """What the architecture gets, and both kernels whatever it gets."""
    if request.param == "its own":
        return None
    plain = FusedTiles(64, 64, 32, num_warps=4, num_stages=3, parts=2, split_v=512)
    return dataclasses.replace(plain, persistent=request.param == "persistent")


def problem(device, n, hidden_size, vocab, dtype=torch.bfloat16, seed=0):
    """Rows from flat to peaked; H is padded to what tensor descriptors want."""
    g = torch.Generator(device).manual_seed(seed)
    pitch = -(-hidden_size // 8) * 8
    hidden = torch.randn(n, pitch, generator=g, device=device)
    hidden *= torch.linspace(0.1, 3, n, device=device)[:, None]
    weight = torch.randn(vocab, pitch, generator=g, device=device).mul_(3 / hidden_size**0.5)
    targets = torch.randint(0, vocab, (n,), generator=g, device=device)
    return hidden.to(dtype)[:, :hidden_size], weight.to(dtype)[:, :hidden_size], targets


def check(values, argmax, hidden, weight, targets, spec):
    """Against float64 on the same, already rounded inputs, some rows at a time."""
    stats = R.finish(R.RowState(values, argmax), spec)
    assert (stats.logps <= 0).all()
    for rows in torch.arange(len(targets), device=hidden.device).split(64)[:: max(1, len(targets) // 512)]:
        exact_state = R.RowState.start(len(rows), spec, hidden.device, torch.float64)
        R.row_stats(hidden[rows].double() @ weight.double().t(), None, targets[rows], 0, exact_state, spec)
        exact = R.finish(exact_state, spec)
        for name in ("logps", "lse", "entropy"):
            error = (getattr(stats, name)[rows].double() - getattr(exact, name)).abs()
            assert (error <= 2e-5 * getattr(exact, name).abs().clamp(min=1)).all(), (name, error.max().item())
        assert (argmax[rows] == exact_state.argmax).float().mean() > 0.95  # near ties may fall either way
        mine = R.log_sum_sq_probs(R.RowState(values, argmax), stats, spec)[rows]
        theirs = R.log_sum_sq_probs(exact_state, exact, spec)
        assert torch.allclose(mine.double(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("n", "hidden_size", "vocab", "dtype"),
    [
        (1, 4096, LLAMA, torch.bfloat16),
        (1000, 768, GPT2, torch.bfloat16),
        (700, 2048, QWEN, torch.float16),
        (129, 999, 32003, torch.bfloat16),
        (40, 64, 100, torch.float16),
        (200, 512, 32003, torch.float32),
    ],
)
def test_against_float64(n, hidden_size, vocab, dtype, arch, device, tiles):
    need_memory(8)
    hidden, weight, targets = problem(device, n, hidden_size, vocab, dtype)
    spec = R.RowSpec(**ALL)
    values, argmax = fused_logps_fwd(hidden, weight, None, targets, None, **ALL, arch=arch, tiles=tiles)
    check(values, argmax, hidden, weight, targets, spec)


def test_a_row_does_not_see_its_company(arch, device, tiles):
    """Alone, in another order, among more rows, picked by index, by any number of programs, again: the same bits."""
    hidden, weight, targets = problem(device, 700, 1024, 30001)

    def run(rows, **options):
        return fused_logps_fwd(hidden, weight, None, targets[rows], rows, **ALL, arch=arch, tiles=tiles, **options)

    everything = torch.arange(700, device=device)
    values, argmax = run(everything)
    for rows in (everything[:1], everything[-1:], everything[100:229], everything.flip(0), everything):
        some, first = run(rows)
        assert torch.equal(some, values[:, rows])
        assert torch.equal(first, argmax[rows])
    for programs in (1, 7, 1000):
        assert torch.equal(run(everything, programs=programs)[0], values)
    whole, _ = fused_logps_fwd(hidden, weight, None, targets, None, **ALL, arch=arch, tiles=tiles)
    assert torch.equal(whole, values)


def test_flags_add_sums_and_nothing_else(arch, device, tiles):
    hidden, weight, targets = problem(device, 300, 512, 30001)
    full, _ = fused_logps_fwd(hidden, weight, None, targets, None, **ALL, arch=arch, tiles=tiles)
    plain, _ = fused_logps_fwd(hidden, weight, None, targets, None, arch=arch, tiles=tiles)
    assert torch.equal(plain[:3], full[:3])


def test_hidden_beyond_32_bits(arch, device, tiles):
    """600000 × 4096 hidden elements: the last rows are where 32 bits do not reach."""
    need_memory(16)
    hidden = torch.zeros(600_000, 4096, device=device, dtype=torch.bfloat16)
    last, weight, targets = problem(device, 5, 4096, 1000)
    hidden[-5:] = last
    expected, _ = fused_logps_fwd(last, weight, None, targets, None, arch=arch, tiles=tiles)
    rows = torch.arange(599_995, 600_000, device=device)
    picked, _ = fused_logps_fwd(hidden, weight, None, targets, rows, arch=arch, tiles=tiles)
    assert torch.equal(picked, expected)
    every = torch.zeros(600_000, dtype=torch.int64, device=device)
    every[-5:] = targets
    whole, _ = fused_logps_fwd(hidden, weight, None, every, None, arch=arch, tiles=tiles)
    assert torch.equal(whole[:, -5:], expected)


def test_weight_beyond_32_bits(arch, device, tiles):
    """300000 × 8192: all columns but the last three give 0, so lse is known."""
    need_memory(8)
    vocab = 300_000
    weight = torch.zeros(vocab, 8192, device=device, dtype=torch.bfloat16)
    hidden, last, _ = problem(device, 9, 8192, 3)
    weight[-3:] = last
    targets = torch.full((9,), vocab - 1, device=device)
    values, argmax = fused_logps_fwd(hidden, weight, None, targets, None, top1=True, arch=arch, tiles=tiles)
    z = torch.nn.functional.pad(hidden.double() @ last.double().t(), (1, 0))
    lse = (z + torch.tensor([vocab - 3, 1, 1, 1], device=device).log()).logsumexp(1)
    assert torch.allclose(values[R.MAX].double() + values[R.SUM].double().log(), lse, rtol=1e-5)
    assert torch.allclose(values[R.TARGET].double(), z[:, -1], rtol=1e-4, atol=1e-4)
    assert torch.equal(argmax, torch.where(z[:, 1:].amax(1) > 0, z[:, 1:].argmax(1) + vocab - 3, 0))


def test_partial_results_beyond_32_bits(arch, device):
    """Two numbers for each of 4.3 million rows and 256 splits."""
    need_memory(16)
    hidden, weight, targets = problem(device, 4_300_000, 16, 262144)
    values, _ = fused_logps_fwd(hidden, weight, None, targets, None, arch=arch)
    last, _ = fused_logps_fwd(hidden[-3:].contiguous(), weight, None, targets[-3:], None, arch=arch)
    assert torch.equal(values[:, -3:], last)
    exact = hidden[-3:].double() @ weight.double().t()
    assert torch.allclose((values[R.MAX] + values[R.SUM].log())[-3:].double(), exact.logsumexp(1), rtol=1e-5)


@pytest.mark.parametrize("hidden_size", [2048, 4096])
def test_speed_beside_the_product_alone(hidden_size, arch, device):
    """At least 0.85 of what the library reaches for hidden @ weightᵀ, which it must also write."""
    if not fused_tiles(arch, torch.bfloat16).persistent:
        pytest.skip(f"the target is for tensor descriptors; {arch} has pointer loads")
    need_memory(8)
    n, vocab = 8192, 131072
    hidden, weight, targets = problem(device, n, hidden_size, vocab)
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    chunk = hidden[:2048]
    logits = torch.empty(2048, vocab, device=device, dtype=torch.bfloat16)

    def product():
        for _ in range(n // 2048):
            torch.mm(chunk, weight.t(), out=logits)

    def fused():
        fused_logps_fwd(hidden, weight, None, targets, None, arch=arch, programs=programs)

    def seconds(call):
        times = []
        for _ in range(15):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times[3:])

    ours, theirs = seconds(fused), seconds(product)
    rate = 2 * n * hidden_size * vocab / ours / 1e12
    print(f"H = {hidden_size}: {rate:.0f} TFLOP/s, {theirs / ours:.2f} of the library's")
    assert theirs / ours >= 0.85
