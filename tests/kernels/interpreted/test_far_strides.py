"""Rows and columns more than 2^31 elements apart: offsets are 64 bits wide. Tokens beyond 2^31: ../test_gpu_scans.py.

The memory between them is reserved and never touched, so it takes no more than a few pages.
"""

from __future__ import annotations

import mmap
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastalign.kernels import fused_exponentials, live_gemm, live_rows, row_kernels, row_loss_grad
from fastalign.kernels._tiles import FusedTiles
from fastalign.kernels.fused_forward import fused_logps_fwd

from fastalign.ops import rows as R

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

FAR = 2**31 + 24
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python names it from 3.13 on
TILES = FusedTiles(16, 32, 16, num_warps=4, num_stages=2, parts=2, split_v=64, group_n=2)


def reserved(elements: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros that no memory stands for until they are written."""
    if sys.platform != "linux":
        pytest.skip("how address space is reserved without memory is Linux's")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        memory = mmap.mmap(-1, elements * dtype.itemsize, flags=flags)
    except OSError:
        pytest.skip(f"no address space for {elements} elements")
    return torch.from_numpy(np.frombuffer(memory, np.uint8)).view(dtype)


def far(tensor: Tensor, dim: int) -> Tensor:
    """The same numbers, `dim` being FAR elements from one to the next."""
    strides = [1, 1]
    strides[dim], strides[1 - dim] = FAR, 1
    memory = reserved((tensor.shape[dim] - 1) * FAR + tensor.shape[1 - dim], tensor.dtype)
    return memory.as_strided(tensor.shape, strides).copy_(tensor)


@pytest.fixture(autouse=True)
def _on_the_cpu(device):
    if device.type != "cpu":
        pytest.skip("address space without memory is the CPU's")


@pytest.mark.parametrize(("n", "v", "dim"), [(2, 150, 0), (4, 3, 1)])
def test_tiles(n, v, dim):
    torch.manual_seed(0)
    tile, targets = torch.randn(n, v) * 3, torch.arange(n) % v
    spec, found = R.RowSpec(entropy=True, top1=True), []
    for own in (tile.clone(), far(tile, dim)):
        state = R.RowState.start(n, spec, tile.device)
        row_kernels.row_stats_fwd(own, None, targets, 0, state.values, state.argmax, entropy=True, top1=True)
        stats = R.finish(state, spec)
        coef = R.coefficients(stats, torch.ones(n), None, None)
        known = own.clone() if own.is_contiguous() else far(tile, dim)
        again = R.RowState.start(n, spec, tile.device)
        row_loss_grad.row_loss_grad(
            known, None, targets, again.values, again.argmax, torch.ones(n), None, known, entropy=True, top1=True
        )
        arguments = stats.max, stats.log_sum, coef.base, coef.target, None
        row_kernels.row_grad_bwd(own, None, targets, 0, *arguments, own)
        found.append([*state, *again, own.clone(), known.clone()])
    for near, distant in zip(*found, strict=True):
        assert torch.equal(near, distant)


@pytest.mark.parametrize(("moved", "dim"), [("hidden", 0), ("hidden", 1), ("weight", 0), ("weight", 1)])
def test_the_fused_forward(moved, dim):
    torch.manual_seed(0)
    rows, columns = (2, 20) if dim == 0 else (20, 2)
    given = {"hidden": torch.randn(rows if moved == "hidden" else 5, columns)}
    given["weight"] = torch.randn(rows if moved == "weight" else 5, columns)
    targets, found = torch.arange(len(given["hidden"])) % len(given["weight"]), []
    for own in (given, given | {moved: far(given[moved], dim)}):
        values, _ = fused_logps_fwd(own["hidden"], own["weight"], None, targets, None, arch="sm_90", tiles=TILES)
        found.append(values)
    assert torch.equal(*found)


def test_a_step_along_the_depth_that_32_bits_do_not_hold():
    """Columns 2^26 elements apart: 64 of them are 2^32. The launcher refuses, or the kernel is right."""
    apart, depth = 2**26, 70
    weight = torch.randn(3, depth)
    memory = reserved((depth - 1) * apart + 3)
    distant = memory.as_strided((3, depth), (1, apart)).copy_(weight)
    hidden, targets = torch.randn(4, depth), torch.tensor([0, 1, 2, 0])
    wide = FusedTiles(16, 32, 64, num_warps=4, num_stages=2, split_v=64)
    with pytest.raises(ValueError, match=r"weight has its columns 67108864 elements apart: give weight\.contiguous"):
        fused_logps_fwd(hidden, distant, None, targets, None, arch="sm_90", tiles=wide)
    right, _ = fused_logps_fwd(hidden, weight, None, targets, None, arch="sm_90", tiles=TILES)
    values, _ = fused_logps_fwd(hidden, distant, None, targets, None, arch="sm_90", tiles=TILES)
    assert torch.equal(values, right)


def test_rows_that_are_done_again_read_a_weight_that_lies_transposed():
    """H · V above 2^31, as the transposed head of a large vocabulary has it."""
    apart, depth, vocab = 2**25 + 8, 70, 260
    weight = (torch.randn(vocab, depth) / 8).bfloat16()
    weight[258] = 3.0  # beyond the sample: the maximum is out of its reach
    memory = reserved((depth - 1) * apart + vocab, torch.bfloat16)
    distant = memory.as_strided((vocab, depth), (1, apart)).copy_(weight)
    hidden, targets, found = torch.ones(2, depth).bfloat16(), torch.tensor([1, 2]), []
    for own in (weight, distant):
        out = torch.zeros(2, vocab, dtype=torch.bfloat16)
        _, _, reference = fused_exponentials.fused_exponentials_fwd(hidden, own, None, targets, None, out, arch="sm_80")
        found.append([out, reference])
    assert (found[0][1] > 100).all(), "no row was done again"
    for near, far_off in zip(*found, strict=True):
        torch.testing.assert_close(near, far_off, rtol=1e-2, atol=1e-2)


def test_live_rows_and_their_products():
    torch.manual_seed(0)
    a, b, base = torch.randn(2, 20), torch.randn(20, 3), torch.tensor([0.0, 1.0])
    index, count = live_rows.live_rows(base, base, None)
    found = []
    for own in (a.clone(), far(a, 0)):
        out, gathered = torch.zeros(2, 3), torch.zeros(64, 20)
        live_gemm.rows_matmul(own, b, count, out, index=index, out_index=index, arch="sm_90", programs=1)
        live_rows.gather_rows(own, index, count, gathered)
        found.append([out, gathered])
    for near, distant in zip(*found, strict=True):
        assert torch.equal(near, distant)
    assert found[0][0][1].any()
