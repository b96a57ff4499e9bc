"""Tile sizes of the kernels: tables by architecture, and a heuristic for architectures without one.

`tiles/<arch>.json` holds what was chosen for an architecture; a file of the same name in the user's folder
(`fastalign bench tune` writes it) goes first, size by size. No kernel here, nothing is measured here.

A row's result must not depend on how many rows there are, so no choice below looks at n: a row alone and the same row
among ten thousand go through the same sums in the same order. Another table may give a row other last bits.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

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


Tiles = TypeVar("Tiles")
TABLES = Path(__file__).parent / "tiles"
USER_TABLES = Path.home() / ".config" / "fastalign" / "tiles"


@functools.cache
def table(arch: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Kernel -> case -> sizes for an architecture ("sm_90"); empty where nobody has chosen.

    Raises:
        ValueError: a table that is no JSON object of this form.
    """
    merged: dict[str, dict[str, dict[str, Any]]] = {}
    for path in (TABLES / f"{arch}.json", USER_TABLES / f"{arch}.json"):
        if path.exists():
            for kernel, cases in read_table(path).items():
                for case, sizes in cases.items():
                    merged.setdefault(kernel, {}).setdefault(case, {}).update(sizes)
    return merged


def read_table(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The kernels of one file; its "about" says where the sizes come from and is left out."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            kernel: {case: dict(sizes) for case, sizes in cases.items()}
            for kernel, cases in content.items()
            if kernel != "about"
        }
    except (json.JSONDecodeError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no table of tile sizes ({error}): delete it or run `fastalign bench tune`"
        ) from None


def tuned(default: Tiles, arch: str, kernel: str, case: str) -> Tiles:
    """A dataclass, the heuristic's choice, with those sizes in its place that were chosen for a case of a kernel.

    Raises:
        ValueError: a table with a size that `default` does not have, or that it does not accept.
    """
    sizes = table(arch).get(kernel, {}).get(case, {})
    instance: Any = default
    known = {field.name for field in fields(instance)}
    if unknown := sizes.keys() - known:
        raise ValueError(
            f"tiles of {kernel!r}, {case!r} for {arch}: unknown {sorted(unknown)}, there are {sorted(known)}"
        )
    return replace(instance, **sizes)


@dataclass(frozen=True, slots=True)
class RowTiles:
    """One program walks one row in blocks of `block` columns (a power of two)."""

    block: int
    num_warps: int


def row_tiles(v: int, arch: str = "") -> RowTiles:
    """Tiles for a slab of v columns: at most 4096 of them at a time, 16 a thread.

    That is 16 KiB of loads in flight for each of the five to eight programs a multiprocessor holds; latency times
    bandwidth asks for 20 to 30 KB. Other programs load while one reduces.
    """
    most = tuned(RowTiles(4096, num_warps=8), arch, "row_kernels", "all")
    block = min(most.block, max(128, _next_power_of_two(v)))
    return RowTiles(block, num_warps=max(1, most.num_warps * block // most.block))


@dataclass(frozen=True, slots=True)
class FusedTiles:
    """The fused forward: a unit of work is block_n rows and split_v columns, in GEMM tiles (block_n, block_v, block_h).

    group_n row blocks take turns over the vocabulary, so that the programs in flight share hidden rows and weight
    tiles in L2. A finished tile is reduced in `parts` (1, 2, 4, …) pieces of columns. `persistent`: tensor descriptors
    and one program for each multiprocessor; else pointer loads and one for each unit.
    """

    block_n: int
    block_v: int
    block_h: int
    num_warps: int
    num_stages: int
    parts: int = 1
    split_v: int = 2048
    group_n: int = 16
    persistent: bool = False

    def __post_init__(self) -> None:
        for name in ("block_n", "block_v", "block_h", "num_warps", "parts"):
            size = getattr(self, name)
            if size < 1 or size & (size - 1):
                raise ValueError(f"FusedTiles.{name} must be a power of two, got {size}")
        for name in ("num_stages", "group_n"):
            if getattr(self, name) < 1:
                raise ValueError(f"FusedTiles.{name} must be positive, got {getattr(self, name)}")
        if self.split_v < 1 or self.split_v % self.block_v:
            raise ValueError(f"FusedTiles.split_v must be a multiple of block_v={self.block_v}, got {self.split_v}")


def fused_case(dtype: torch.dtype, aligned: bool) -> str:
    """The case of the fused forward in a table."""
    return "32-bit" if dtype == torch.float32 else "16-bit" if aligned else "16-bit unaligned"


def fused_tiles(arch: str, dtype: torch.dtype, *, aligned: bool = True) -> FusedTiles:
    """Tiles of the fused forward for an architecture ("sm_90", "gfx942") and the dtype and alignment of its operands.

    Without a table: tiles that fit 64 KiB of shared memory. Rows that are not aligned to 16 bytes go through registers
    on their way to shared memory, which leaves room for smaller tiles only. float32 runs on the ordinary FMA units
    (IEEE products, no TF32).

    AMD reduces a tile in one piece: taking its accumulator apart would go through LDS.

    Raises:
        ValueError: an architecture that is neither sm_* nor gfx*; a table with impossible sizes.
    """
    if not re.fullmatch(r"sm_\d{2,3}|gfx[0-9a-f]+", arch):
        raise ValueError(f"arch must look like 'sm_90' or 'gfx942', got {arch!r}")
    amd = arch.startswith("gfx")
    if dtype == torch.float32:
        default = FusedTiles(64, 128, 16, num_warps=8, num_stages=2 if amd else 3)
    elif not aligned:
        default = FusedTiles(128, 128, 16, num_warps=8, num_stages=2)
    elif amd:
        default = FusedTiles(128, 128, 64, num_warps=8, num_stages=2)
    else:
        default = FusedTiles(128, 128, 32, num_warps=8, num_stages=3, parts=2)
    return tuned(default, arch, "fused_forward", fused_case(dtype, aligned))


def _next_power_of_two(x: int) -> int:
    return 1 << max(0, x - 1).bit_length()
