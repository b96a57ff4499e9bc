"""Launches of the live rows' kernels without a GPU, as in test_launch.py: descriptors, and what is specialised."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fastalign.kernels import live_gemm, live_rows
from triton.runtime.jit import JITFunction

_spec = importlib.util.spec_from_file_location("launch", Path(__file__).parent / "test_launch.py")
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
launches, pytestmark = _module.launches, _module.pytestmark


@pytest.fixture(autouse=True)
def forget():
    yield
    for value in (*vars(live_rows).values(), *vars(live_gemm).values()):
        if isinstance(value, JITFunction):
            value.device_caches.pop(_module.NO_DEVICE, None)


def assembly(launch):
    return launch.compiled.asm.get("ptx") or launch.compiled.asm["amdgcn"]


@pytest.mark.parametrize(("n", "width", "vocab"), [(1000, 72, 203), (64, 33, 203)])
def test_a_block_of_live_rows(n, width, vocab, launches):
    """Sizes that are no multiples of a tile, and a width whose rows do not start on 16 bytes."""
    on = {"arch": launches.arch, "programs": 7}
    coef = torch.ones(n)
    index, count = live_rows.live_rows(coef, coef, None)
    h, weight = torch.zeros(n, width, dtype=torch.bfloat16), torch.zeros(vocab, width, dtype=torch.bfloat16)
    grad = torch.zeros(n, -(-vocab // 8) * 8).view(torch.bfloat16)[:, :vocab]  # over a float32 tile
    front = torch.empty(-(-n // 16) * 16, width, dtype=torch.bfloat16)
    live_rows.gather_rows(h, index, count, front)
    out, weights = torch.zeros(n, width), torch.zeros(vocab, width, dtype=torch.bfloat16)
    logits, scale = torch.zeros(n, vocab), torch.ones(())
    live_gemm.rows_matmul(grad, weight, count, out, index=index, out_index=index, start=out, **on)
    live_gemm.depth_matmul(grad, front, count, weights, index=index, scale=scale, **on)
    live_gemm.rows_matmul(front, weight.t(), count, logits, out_index=index, **on)
    names = [launch.name for launch in launches.recorded]
    assert names == ["_count_live_kernel", "_partition_kernel", "_gather_rows_kernel", *["_live_matmul_kernel"] * 3]
    for launch in launches.recorded[3:]:
        assert launch.grid == (7,)
        code = assembly(launch)
        assert "wgmma.mma_async" in code or "v_mfma" in code
        assert ("cp.async.bulk.tensor" in code) == (launches.arch == "sm_90" and width % 8 == 0)


def test_a_column_and_a_row(launches):
    """Sizes of 1, which Triton makes compile-time constants."""
    on = {"arch": launches.arch, "programs": 1}
    index, count = live_rows.live_rows(torch.ones(1), torch.ones(1), torch.ones(1))
    grad, h, weight = (torch.zeros(1, 1, dtype=torch.bfloat16) for _ in range(3))
    live_gemm.rows_matmul(grad, weight, count, torch.zeros(1, 1), index=index, factors=torch.ones(1), **on)
    live_gemm.depth_matmul(grad, h, count, torch.zeros(1, 1), **on)
    assert len(launches.recorded) == 4
