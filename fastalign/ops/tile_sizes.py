"""How large a CPU's tiles are and what they take: the arithmetic under the planner. Integers only, pure.

Those of accelerators are in fastalign.ops.gpu_schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MIN_SLAB = 64
ROW_ALIGN = 16  # GEMMs are markedly slower on row counts that are not a multiple of the vector width


def align(n: int) -> int:
    return -(-n // ROW_ALIGN) * ROW_ALIGN


@dataclass(frozen=True, slots=True)
class Costs:
    """Bytes per unit of the pieces of a tile."""

    H: int
    V: int
    element: int  # bytes of one operand element as the GEMM reads it
    tile: int  # bytes of one tile element
    weight_copy: int  # bytes per slab column for a weight slab in another dtype than the GEMM's
    grad_buffer: bool  # whether a float32 (rows, H) buffer is needed for grad_hidden

    def overlay(self, sink: int) -> int:
        """Rows whose logits fit the memory of a weight gradient of `sink` bytes an element."""
        return self.H * sink // self.tile // ROW_ALIGN * ROW_ALIGN

    def per_row(self) -> int:
        return self.H * self.element + (self.H * 4 if self.grad_buffer else 0)  # the rows are gathered


def head_costs(H: int, V: int, dtype: torch.dtype, weight_dtype: torch.dtype, needs_hidden: bool) -> Costs:
    size = torch.empty((), dtype=dtype).element_size()
    gemm_size = max(size, 4)  # GEMMs run on float32 operands
    converts = weight_dtype != dtype or gemm_size != size
    steps = gemm_size + (size if weight_dtype != dtype and gemm_size != size else 0)  # rounded to `dtype`, then widened
    weight_copy = H * steps if converts else 0
    return Costs(H, V, gemm_size, max(4, gemm_size), weight_copy, grad_buffer=needs_hidden)


def whole_tiles(costs: Costs, n: int, budget: int, group_rows: int | None, sink: int) -> tuple[int, int, int, int]:
    """(rows, slab, overlaid rows, workspace) of tiles that span the vocabulary.

    sink: bytes per element of the memory in which the weight's gradient is summed, 0 where it is not needed.
    """
    per_row = costs.per_row() + costs.V * costs.tile
    slab = min(costs.V, 2048)
    if costs.weight_copy:
        spare = min(budget // 4, budget - per_row * ROW_ALIGN)  # beside the smallest tile
        slab = min(slab, max(MIN_SLAB, spare // costs.weight_copy // MIN_SLAB * MIN_SLAB))
    room = max(budget - slab * costs.weight_copy, per_row * ROW_ALIGN)
    most = 512
    rows = max(ROW_ALIGN, min(room // per_row, most) // ROW_ALIGN * ROW_ALIGN)
    overlaid = 0
    beside = per_row + slab * costs.tile  # a group that fills several tiles overlays, with a slab of scratch beside one
    if sink and group_rows is not None and group_rows > rows and room // beside >= ROW_ALIGN:
        per_row = beside
        rows = min(room // per_row, most) // ROW_ALIGN * ROW_ALIGN
        overlaid = min(n, rows, costs.overlay(sink))
    rows = min(rows, align(n)) if n else ROW_ALIGN
    return rows, slab, overlaid, rows * per_row + slab * costs.weight_copy


def slab_tiles(costs: Costs, n: int, budget: int) -> tuple[int, int, int]:
    """(rows, slab, workspace) of tiles of one slab, as many rows as a quarter of the budget takes the inputs of.

    Tiles of about 8 MiB stay in the last-level cache between the GEMM and the row kernel.
    """
    per_row = costs.per_row()
    most = (budget - MIN_SLAB * costs.weight_copy) // (per_row + MIN_SLAB * costs.tile)  # with the smallest slab
    rows = max(ROW_ALIGN, min(max(budget // 4, 1) // max(1, per_row), most) // ROW_ALIGN * ROW_ALIGN)
    rows = min(rows, align(n)) if n else ROW_ALIGN
    tile_column = align(rows) * costs.tile
    cap = max(512, (8 * 2**20) // max(1, tile_column))
    cap = min(cap, max(MIN_SLAB, (budget - rows * per_row) // (costs.weight_copy + tile_column)))
    slab = min(costs.V, max(MIN_SLAB, cap // MIN_SLAB * MIN_SLAB))
    return rows, slab, rows * per_row + slab * (costs.weight_copy + rows * costs.tile)
