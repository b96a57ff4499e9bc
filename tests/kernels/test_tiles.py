"""The choice of tile sizes. What the choices cost on each architecture is test_compiled.py's business."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fastalign.kernels import _tiles

ARCHITECTURES = (
    "sm_75",
    "sm_80",
    "sm_86",
    "sm_89",
    "sm_90",
    "sm_100",
    "sm_103",
    "sm_120",
    "gfx90a",
    "gfx942",
    "gfx950",
)


@pytest.mark.parametrize("v", [1, 2, 127, 128, 129, 4096, 4097, 151936])
def test_row_tiles(v):
    tiles = _tiles.row_tiles(v)
    assert tiles.block & (tiles.block - 1) == 0
    assert tiles.block >= min(v, 4096)
    assert tiles.block <= 16 * 32 * max(1, tiles.num_warps)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_operands_fit_shared_memory(arch, dtype, aligned):
    """The pipeline's buffers, counted generously; architectures without an entry get 64 KiB."""
    tiles = _tiles.fused_tiles(arch, dtype, aligned=aligned)
    stage = (tiles.block_n + tiles.block_v) * tiles.block_h * dtype.itemsize
    stages = tiles.num_stages - 1 if arch.startswith("gfx") else tiles.num_stages
    assert stage * stages <= _tiles.SHARED_MEMORY_LIMIT.get(arch, 65_536)
    accumulator = tiles.block_n * tiles.block_v // (tiles.num_warps * 32)
    assert accumulator <= 128, "more than half of a thread's registers"


def test_unknown_architecture():
    with pytest.raises(ValueError, match=r"arch must look like 'sm_90' or 'gfx942', got 'hopper'"):
        _tiles.fused_tiles("hopper", torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_n": 48}, "block_n must be a power of two, got 48"),
        ({"parts": 0}, "parts must be a power of two, got 0"),
        ({"split_v": 100}, "split_v must be a multiple of block_v=256, got 100"),
    ],
)
def test_impossible_tiles(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(_tiles.fused_tiles("sm_90", torch.bfloat16), **change)
