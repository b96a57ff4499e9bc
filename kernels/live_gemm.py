"""GEMMs over the live rows of a tile, whose number is read from device memory: no host synchronisation.

With m = count live rows of n, numbered by `live_rows.live_rows`' index, and 16-bit operands:

    rows_matmul    out[o[i]] = start[o[i]] + scale · factors[index[i]] · Σ_k a[index[i], k]·b[k, :]   for i < m
    depth_matmul   out       = start + scale · Σ_{i<m} a[index[i], :]ᵀ b[i, :]

which are hidden's gradient G·W (and the logits h·Wᵀ again) and the weight's, Gᵀ·h.

Sums are float32 in a fixed order, one rounding at the end, no atomics, no split over the depth: the same inputs give
the same bits, and a row of rows_matmul does not see the others. A library's GEMM needs its sizes on the host; it adds
in another order, which is all that a result of this file differs in.

Work: 2·2·m·V·H FLOP. An output tile of 128 × 256 does 85 FLOP per byte it takes from L2 and, with the tiles in flight
forming a patch of about 2048 × 2048, 1000 FLOP per byte from memory, where an H200 has balance at 184. Against a
library at relative speed e (0.85 to 0.95 expected of such a kernel) they win once m/n < e: `fastalign.ops.live`.

Why G stays where the row kernel wrote it and is gathered by the loads. Rows gathered to the front would be a dense
matrix that the tensor memory accelerator (TMA) loads, one instruction a tile. In place that is a race: row i would be
written while the program that owns row j < i with index[j] = i may not have read it. In other memory it comes in
slabs, and then hidden's gradient is read and written once a slab: with 8192 columns 8·m·H bytes each, 4.5 % of the two
products; as much as a pass over exponentials, which need no row kernel, would take. Gathering costs four asynchronous
16-byte copies a thread for a block of G (128 × 64 elements); two thirds of the operands' bytes still come by TMA, and
without any of it a kernel loses 13 % by Triton's own measurements. So a caller changes its products and nothing else.

Programs are persistent, one for each multiprocessor, and take output tiles in turn; with few live rows most find none.
TMA descriptors are made on the host, where rows are aligned to 16 bytes and the architecture has TMA. A transposed
operand is a transposed view of loaded memory; no product ever is an operand.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._live_tiles import TMA_ARCHITECTURES, GemmTiles, gemm_case, gemm_tiles, launch_options
from .fused_forward import describable
from .live_rows import PAD

__all__ = ["PAD", "GemmTiles", "depth_matmul", "gemm_case", "gemm_tiles", "launch_options", "rows_matmul"]


@triton.jit
def _operand(
    source, index_ptr, row, col, num_rows, num_cols, stride_row, stride_col,
    TMA: tl.constexpr, TRANS: tl.constexpr, WIDEN: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Elements [row : row + ROWS, col : col + COLS] of a matrix, or of its rows index[row : row + ROWS]; transposed if
    TRANS.

    Zeros where it ends and a mask is asked for; without MASK_ROWS its last row once more. Columns are never clamped:
    they would cease to look contiguous.
    """
    if TMA:
        x = source.load([row, col])
        if TRANS:
            x = x.T
    else:
        rows, cols = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
        row_here, col_here = rows < num_rows, cols < num_cols
        places = tl.maximum(tl.minimum(rows, num_rows - 1), 0).to(tl.int64)
        if index_ptr is not None:
            places = tl.load(index_ptr + places)
        row_at = places * stride_row
        col_at = cols.to(tl.int64) * stride_col
        if TRANS:
            ptrs = source + col_at[:, None] + row_at[None, :]
            here = (col_here | (not MASK_COLS))[:, None] & (row_here | (not MASK_ROWS))[None, :]
        else:
            ptrs = source + row_at[:, None] + col_at[None, :]
            here = (row_here | (not MASK_ROWS))[:, None] & (col_here | (not MASK_COLS))[None, :]
        x = tl.load(ptrs, mask=here, other=0.0) if MASK_ROWS or MASK_COLS else tl.load(ptrs)
    if WIDEN:
        x = x.to(tl.float32)
    return x


@triton.jit
def _store_tile(
    acc, row, col, num_rows, num_cols, start_ptr, out_ptr, index_ptr, factor, stride_start_row, stride_start_col,
    stride_out_row, stride_out_col, PARTS: tl.constexpr,
):  # fmt: skip
    """Multiply by factor (R, 1) or a scalar, add and store an accumulator in PARTS pieces of columns, left to right."""
    if PARTS > 1:
        HALF: tl.constexpr = acc.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, [acc.shape[0], 2, HALF]), [0, 2, 1]))
        _store_tile(
            left, row, col, num_rows, num_cols, start_ptr, out_ptr, index_ptr, factor, stride_start_row,
            stride_start_col, stride_out_row, stride_out_col, PARTS // 2,
        )  # fmt: skip
        _store_tile(
            right, row, col + HALF, num_rows, num_cols, start_ptr, out_ptr, index_ptr, factor, stride_start_row,
            stride_start_col, stride_out_row, stride_out_col, PARTS // 2,
        )  # fmt: skip
    else:
        rows, cols = row + tl.arange(0, acc.shape[0]), (col + tl.arange(0, acc.shape[1])).to(tl.int64)
        here = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
        places = rows.to(tl.int64)
        if index_ptr is not None:
            places = tl.load(index_ptr + places, mask=rows < num_rows, other=0)
        acc *= factor
        if start_ptr is not None:
            ptrs = start_ptr + places[:, None] * stride_start_row + cols[None, :] * stride_start_col
            acc += tl.load(ptrs, mask=here, other=0.0).to(tl.float32)
        ptrs = out_ptr + places[:, None] * stride_out_row + cols[None, :] * stride_out_col
        tl.store(ptrs, acc.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def _add_product(
    acc, a, b, a_index_ptr, row, col, at, m, n, k, stride_ar, stride_ac, stride_br, stride_bc,
    COUNT_IS_DEPTH: tl.constexpr, TRANS_B: tl.constexpr, TMA_A: tl.constexpr, TMA_B: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, MASK_K: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The accumulator of an output tile with the products of one block of the depth, from `at` on."""
    if COUNT_IS_DEPTH:
        x = _operand(
            a, a_index_ptr, at, row, k, m, stride_ar, stride_ac, TMA_A, True, WIDEN, True, not EVEN_M, BLOCK_K, BLOCK_M
        )  # fmt: skip
    else:
        x = _operand(
            a, a_index_ptr, row, at, m, k, stride_ar, stride_ac, TMA_A, False, WIDEN, False, MASK_K, BLOCK_M, BLOCK_K
        )  # fmt: skip
    if TRANS_B:
        y = _operand(
            b, None, col, at, n, k, stride_br, stride_bc, TMA_B, True, WIDEN, False, MASK_K, BLOCK_N, BLOCK_K
        )  # fmt: skip
    else:
        y = _operand(
            b, None, at, col, k, n, stride_br, stride_bc, TMA_B, False, WIDEN, MASK_K, not EVEN_N, BLOCK_K, BLOCK_N
        )  # fmt: skip
    return tl.dot(x, y, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["m", "k"])
def _live_matmul_kernel(
    a, b, a_index_ptr, start_ptr, out_ptr, out_index_ptr, count_ptr, scale_ptr, factors_ptr,
    m, m_end, n, k, stride_ar, stride_ac, stride_br, stride_bc, stride_sr, stride_sc, stride_or, stride_oc,
    COUNT_IS_DEPTH: tl.constexpr, TRANS_B: tl.constexpr, TMA_A: tl.constexpr, TMA_B: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, MASK_K: tl.constexpr, LAST_ALONE: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    count = tl.load(count_ptr)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    if COUNT_IS_DEPTH:
        k = count
    else:
        m = count
        m_end = count
    # No loop is empty, for wgmma's sake: without a live row the depth is a block of zeros. A mask of columns that end
    # at no multiple of 16 goes element by element, so the last block has one to itself.
    steps = tl.maximum(k // BLOCK_K if LAST_ALONE else tl.cdiv(k, BLOCK_K), 1)
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        # Tiles in flight form a patch of GROUP_M row blocks and as many column blocks as fit beside them.
        group = tile // (GROUP_M * tiles_n)
        blocks_in_group = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
        within = tile % (GROUP_M * tiles_n)
        row = (group * GROUP_M + within % blocks_in_group) * BLOCK_M
        col = (within // blocks_in_group) * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(steps):
            acc = _add_product(
                acc, a, b, a_index_ptr, row, col, step * BLOCK_K, m_end, n, k, stride_ar, stride_ac, stride_br,
                stride_bc, COUNT_IS_DEPTH, TRANS_B, TMA_A, TMA_B, EVEN_M, EVEN_N, MASK_K, WIDEN,
                BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        if LAST_ALONE:
            acc = _add_product(
                acc, a, b, a_index_ptr, row, col, steps * BLOCK_K, m_end, n, k, stride_ar, stride_ac, stride_br,
                stride_bc, COUNT_IS_DEPTH, TRANS_B, TMA_A, TMA_B, EVEN_M, EVEN_N, True, WIDEN,
                BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        factor = scale
        if factors_ptr is not None:
            rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
            if a_index_ptr is not None:
                rows = tl.load(a_index_ptr + rows, mask=rows < m, other=0)
            factor = tl.load(factors_ptr + rows, mask=row + tl.arange(0, BLOCK_M) < m, other=0.0)[:, None] * scale
        _store_tile(
            acc, row, col, m, n, start_ptr, out_ptr, out_index_ptr, factor, stride_sr, stride_sc, stride_or, stride_oc,
            PARTS,
        )  # fmt: skip


def rows_matmul(
    a: Tensor,  # (N, k) float32, bfloat16 or float16; without index at least m rows
    b: Tensor,  # (k, n) of a's dtype, any strides; (n, k) transposed is taken as it lies
    count: Tensor,  # (1,) int32 on the device: m
    out: Tensor,  # (O, n) float32, bfloat16 or float16, any strides
    *,
    index: Tensor | None = None,  # (≥ m,) int64, rows of a; None: the first m
    out_index: Tensor | None = None,  # (≥ m,) int64, distinct rows of out and start; None: the first m
    start: Tensor | None = None,  # (O, n) float32, added; it may be out
    scale: Tensor | None = None,  # 0-dim float32 on the device, multiplies the product
    factors: Tensor | None = None,  # (N,) float32, multiply it by rows of a
    arch: str,
    programs: int,  # how many multiprocessors there are
    tiles: GemmTiles | None = None,
) -> None:
    """out[o] = start[o] + scale · (a[index[i]] @ b) with o = out_index[i] for i < m; others stay as they are.

    The product of row i is multiplied by factors[index[i]] too.
    """
    trans_b = b.stride(1) != 1 and b.stride(0) == 1
    stored = b.t() if trans_b else b
    _launch(a, stored, count, out, index, out_index, start, scale, factors, False, trans_b, arch, programs, tiles)


def depth_matmul(
    a: Tensor,  # (N, M) float32, bfloat16 or float16; without index at least as many rows as b
    b: Tensor,  # (≥ m rounded up to PAD, N) of a's dtype; rows between m and there are finite
    count: Tensor,  # (1,) int32 on the device: m
    out: Tensor,  # (M, N) float32, bfloat16 or float16, any strides
    *,
    index: Tensor | None = None,  # (≥ m,) int64, rows of a; None: the first m, and those up to b's padding are zero
    start: Tensor | None = None,  # (M, N) float32, added; it may be out
    scale: Tensor | None = None,  # 0-dim float32 on the device, multiplies the product
    arch: str,
    programs: int,
    tiles: GemmTiles | None = None,
) -> None:
    """out = start + scale · a[index[:m]]ᵀ @ b[:m], every element of it; zero or `start` without a live row."""
    _launch(a, b, count, out, index, None, start, scale, None, True, False, arch, programs, tiles)


def _launch(
    a: Tensor, b: Tensor, count: Tensor, out: Tensor, index: Tensor | None, out_index: Tensor | None,
    start: Tensor | None, scale: Tensor | None, factors: Tensor | None, depth: bool, trans_b: bool, arch: str,
    programs: int, tiles: GemmTiles | None,
) -> None:  # fmt: skip
    if out.numel() == 0:
        return
    (k, m), n = a.shape if depth else a.shape[::-1], out.shape[1]
    aligned = describable(a) and describable(b)
    tma = aligned and a.element_size() == 2 and arch in TMA_ARCHITECTURES
    if tiles is None:
        gathered = "" if index is None else "depth" if depth else "rows"
        tiles = gemm_tiles(arch, a.dtype, aligned=aligned, gathered=gathered)
    sizes, options = launch_options(tiles)
    tma_a = tma and index is None
    block_a = [tiles.block_k, tiles.block_m] if depth else [tiles.block_m, tiles.block_k]
    block_b = [tiles.block_n, tiles.block_k] if trans_b else [tiles.block_k, tiles.block_n]
    interpreted = not isinstance(_live_matmul_kernel, triton.JITFunction)
    ragged = not depth and k % tiles.block_k != 0 and not tma_a  # past a descriptor's end there are zeros
    alone = ragged and aligned and k > tiles.block_k
    m_end = _readable(a, m) if depth else m
    with torch.cuda.device_of(out):
        _live_matmul_kernel[(max(1, programs),)](
            TensorDescriptor.from_tensor(a, block_a) if tma_a else a,
            TensorDescriptor.from_tensor(b, block_b) if tma else b,
            index, start, out, out_index, count, scale, None if factors is None else factors.contiguous(),
            m, m_end, n, k, *a.stride(), *b.stride(), *((0, 0) if start is None else start.stride()), *out.stride(),
            COUNT_IS_DEPTH=depth, TRANS_B=trans_b, TMA_A=tma_a, TMA_B=tma,
            EVEN_M=m % tiles.block_m == 0, EVEN_N=n % tiles.block_n == 0, MASK_K=depth or ragged > alone,
            LAST_ALONE=alone, WIDEN=interpreted, **sizes | ({"FLATTEN": False} if alone else {}), **options,
        )  # fmt: skip


def _readable(a: Tensor, columns: int) -> int:
    """The columns rounded up to 16 where the memory behind them is the matrix's too: nothing is made of what it holds,
    and up to a multiple of 16 copies of 16 bytes can be masked."""
    rounded = -(-columns // 16) * 16
    last = a.storage_offset() + (a.shape[0] - 1) * a.stride(0) + rounded
    inside = a.stride(1) == 1 and last <= a.untyped_storage().nbytes() // a.element_size()
    return rounded if inside else columns
