"""Tile sizes of the GEMMs over live rows (live_gemm)."""

from dataclasses import dataclass

import torch

from ._tiles import tuned
from .live_rows import PAD

TMA_ARCHITECTURES = ("sm_90", "sm_100", "sm_103")  # and 227 KiB of shared memory for its pipeline


@dataclass(frozen=True, slots=True)
class GemmTiles:
    """One output tile (block_m, block_n) at a time, over blocks of block_k; group_m row blocks share columns in L2.

    A finished tile is stored in `parts` (1, 2, 4, …) pieces of columns. `flatten` overlaps a tile's stores with the
    next one's loads.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    parts: int = 1
    group_m: int = 16
    flatten: bool = False

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k", "num_warps", "parts"):
            size = getattr(self, name)
            if size < 1 or size & (size - 1):
                raise ValueError(f"GemmTiles.{name} must be a power of two, got {size}")
        if PAD % self.block_k:
            raise ValueError(f"GemmTiles.block_k must divide {PAD}, got {self.block_k}")


def gemm_tiles(arch: str, dtype: torch.dtype, *, aligned: bool = True, gathered: str = "") -> GemmTiles:
    """Tiles for an architecture ("sm_90", "gfx942"), the operands' dtype and alignment, and what is gathered by index:
    nothing, "rows" of the result, or the "depth".

    They look at no size, so the bits of a row do not depend on how many rows there are. Where the depth is gathered,
    the next block's numbers are on their way too: the pipeline is half as deep as num_stages says.
    """
    return tuned(_heuristic(arch, dtype, aligned, gathered), arch, "live_matmul", gemm_case(dtype, aligned, gathered))


def gemm_case(dtype: torch.dtype, aligned: bool = True, gathered: str = "") -> str:
    """The case of these GEMMs in a table of tile sizes."""
    bits = f"{8 * dtype.itemsize}-bit"
    return " ".join(
        word for word in (bits, "" if aligned else "unaligned", gathered and f"gathered {gathered}") if word
    )


def _heuristic(arch: str, dtype: torch.dtype, aligned: bool, gathered: str) -> GemmTiles:
    amd = arch.startswith("gfx")
    if dtype == torch.float32:  # IEEE products on the ordinary units, no TF32
        return GemmTiles(64, 128, 16, num_warps=8, num_stages=2 if amd else 5 if gathered == "depth" else 3)
    if not aligned:
        return GemmTiles(64, 128, 32, num_warps=8, num_stages=2)
    if arch in TMA_ARCHITECTURES:
        if gathered == "rows":  # their numbers are loaded once a tile, which only a loop of their own keeps apart
            return GemmTiles(128, 256, 64, num_warps=8, num_stages=4 if arch == "sm_90" else 6, parts=4)
        stages = 7 if gathered else 4
        return GemmTiles(128, 256, 64, num_warps=8, num_stages=stages, parts=4, flatten=True)
    if amd:
        return GemmTiles(128, 128, 64, num_warps=8, num_stages=2)
    return GemmTiles(128, 128, 64, num_warps=8, num_stages=5 if gathered == "depth" else 3, parts=2)


def launch_options(tiles: GemmTiles) -> tuple[dict[str, int | bool], dict[str, int | bool]]:
    """Tile sizes as the kernel's compile-time constants, and the compiler's options."""
    sizes = {
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "GROUP_M": tiles.group_m,
        "PARTS": tiles.parts,
        "FLATTEN": tiles.flatten,
    }
    return sizes, {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "enable_fp_fusion": False}
