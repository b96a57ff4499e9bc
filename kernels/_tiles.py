"""Tile sizes of the kernels: frozen dataclasses and the heuristic that fills them. No kernel here, nothing is
measured here.

A row's result must not depend on how many rows there are, so no size below looks at n: a row alone and the same row
among ten thousand go through the same sums in the same order.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

SHARED_MEMORY_LIMIT = {
    "sm_80": 166_912,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_103": 232_448,
    "gfx942": 65_536,
}
"""Bytes of shared memory (LDS) one program may use, by architecture: 163, 99, 227, 227, 227 and 64 KiB."""


@dataclass(frozen=True, slots=True)
class RowTiles:
    """One program walks one row in blocks of `block` columns (a power of two)."""

    block: int
    num_warps: int


def row_tiles(v: int) -> RowTiles:
    """Tiles for a slab of v columns: at most 4096 of them at a time, 16 a thread.

    That is 16 KiB of loads in flight for each of the five to eight programs a multiprocessor holds; latency times
    bandwidth asks for 20 to 30 KB. Other programs load while one reduces.
    """
    block = min(4096, max(128, _next_power_of_two(v)))
    return RowTiles(block, num_warps=min(8, max(1, block // 512)))


@dataclass(frozen=True, slots=True)
class FusedTiles:
    """The fused forward: a program owns block_n rows and split_v vocabulary columns, in GEMM tiles (block_n, block_v,
    block_h).

    group_n row blocks take turns over the vocabulary, so that the programs in flight share hidden rows and weight
    tiles in L2. A finished tile is reduced in `parts` (1, 2, 4, …) pieces of columns.
    """

    block_n: int
    block_v: int
    block_h: int
    num_warps: int
    num_stages: int
    parts: int = 1
    split_v: int = 2048
    group_n: int = 16

    def __post_init__(self) -> None:
        for name in ("block_n", "block_v", "block_h", "num_warps", "parts"):
            size = getattr(self, name)
            if size < 1 or size & (size - 1):
                raise ValueError(f"FusedTiles.{name} must be a power of two, got {size}")
        if self.split_v < 1 or self.split_v % self.block_v:
            raise ValueError(f"FusedTiles.split_v must be a multiple of block_v={self.block_v}, got {self.split_v}")


def fused_tiles(arch: str, dtype: torch.dtype, *, aligned: bool = True) -> FusedTiles:
    """Tiles of the fused forward for an architecture ("sm_90", "gfx942") and the dtype and alignment of its operands.

    16-bit on sm_80, sm_90 and sm_10x: the largest tile whose accumulator fits the register file (tensor memory on
    sm_10x), as deep a pipeline as shared memory holds. Every other architecture gets tiles that fit 64 KiB. Rows that
    are not aligned to 16 bytes go through registers on their way to shared memory, which leaves room for smaller
    tiles only. float32 runs on the ordinary FMA units (IEEE products, no TF32).

    AMD reduces a tile in one piece: taking its accumulator apart would go through LDS.

    Raises:
        ValueError: an architecture that is neither sm_* nor gfx*.
    """
    if not re.fullmatch(r"sm_\d{2,3}|gfx[0-9a-f]+", arch):
        raise ValueError(f"arch must look like 'sm_90' or 'gfx942', got {arch!r}")
    amd = arch.startswith("gfx")
    if dtype == torch.float32:
        return FusedTiles(64, 128, 16, num_warps=8, num_stages=2 if amd else 3)
    if not aligned:
        return FusedTiles(128, 128, 16, num_warps=8, num_stages=2)
    if amd:
        return FusedTiles(128, 128, 64, num_warps=8, num_stages=2)
    if arch in ("sm_90", "sm_100", "sm_103"):
        return FusedTiles(128, 256, 64, num_warps=8, num_stages=4, parts=4)
    if arch == "sm_80":
        return FusedTiles(128, 128, 64, num_warps=8, num_stages=3, parts=2)
    return FusedTiles(128, 128, 32, num_warps=8, num_stages=3, parts=2)


def _next_power_of_two(x: int) -> int:
    return 1 << max(0, x - 1).bit_length()
