"""GEMMs over the live rows of a tile, whose number is read from device memory: no host synchronisation.

With m = count rows gathered to the front of G (n, v) and of h (n, H) by `live_rows`, W (v, H) and 16-bit operands:

    rows_matmul    out[index[i]] = start[i] + scale · Σ_k a[i, k]·b[k, :]   for i < m: grad_hidden = G·W, logits = h·Wᵀ
    depth_matmul   out           = start    + scale · Σ_{i<m} a[i, :]ᵀ b[i, :]:        grad_weight = Gᵀ·h

Sums are float32 in a fixed order, one rounding at the end, no atomics, no split over the depth: the same inputs give
the same bits, and a row of rows_matmul does not see the others. A library's GEMM needs its sizes on the host; it adds
in another order, which is all that a result of this file differs in.

Why G is gathered to other memory by the row kernel instead of by these loads. In either case a logit is read once and
a live row's gradient written once (4 + 2 bytes), so gathering costs no traffic, only room: 2 bytes · n · slab, 134 MB
for 8192 rows of 8192 columns. What it buys are dense operands, loaded by tensor memory accelerator (TMA): one
instruction a tile. Rows picked by index are no TMA box (before sm_100): a tile of 64 × (128 + 256) operands is then
12 asynchronous 16-byte copies a thread with their 64-bit addresses, 24 registers beside the 128 of the accumulator,
for which Triton's own measurements lose 13 % of a 16-bit GEMM. Nor could G be gathered in place: row i would be
written while the program that owns row j < i with index[j] = i may not have read it.

Work for m live of n rows, per slab of v columns: 2·2·m·v·H FLOP. One output tile of 128 × 256 does 128·256·2 FLOP for
(128 + 256)·2 bytes of operands, 85 FLOP/B from L2 and, with the tiles in flight forming a patch of about 2048 × 2048,
1000 FLOP/B from memory, where an H200 has balance at 184. Against cuBLAS at relative speed e (0.85 to 0.95 for such a
kernel) they win once m/n < e, which is why `fastalign.ops.live` decides when to call them.

Programs are persistent, one for each multiprocessor, and take output tiles in turn; with few live rows most find none.
Operands come from memory through TMA descriptors made on the host where their rows are aligned to 16 bytes and the
architecture has TMA, else through pointers. A transposed operand is a transposed view of loaded memory; no product
ever is an operand.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .live_rows import PAD, padded

TMA_ARCHITECTURES = ("sm_90", "sm_100", "sm_103")  # and 227 KiB of shared memory for its pipeline


@triton.jit
def _operand(
    source, row, col, num_rows, num_cols, stride_row, stride_col,
    TMA: tl.constexpr, TRANS: tl.constexpr, WIDEN: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Elements [row : row + ROWS, col : col + COLS] of a matrix, transposed if TRANS.

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
        row_at = tl.minimum(rows, num_rows - 1).to(tl.int64) * stride_row
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
    acc, row, col, num_rows, num_cols, start_ptr, out_ptr, index_ptr, scale, stride_start_row, stride_start_col,
    stride_out_row, stride_out_col, PARTS: tl.constexpr,
):  # fmt: skip
    """Scale, add and store an accumulator in PARTS pieces of columns, left to right."""
    if PARTS > 1:
        HALF: tl.constexpr = acc.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, [acc.shape[0], 2, HALF]), [0, 2, 1]))
        _store_tile(
            left, row, col, num_rows, num_cols, start_ptr, out_ptr, index_ptr, scale, stride_start_row,
            stride_start_col, stride_out_row, stride_out_col, PARTS // 2,
        )  # fmt: skip
        _store_tile(
            right, row, col + HALF, num_rows, num_cols, start_ptr, out_ptr, index_ptr, scale, stride_start_row,
            stride_start_col, stride_out_row, stride_out_col, PARTS // 2,
        )  # fmt: skip
    else:
        rows, cols = row + tl.arange(0, acc.shape[0]), (col + tl.arange(0, acc.shape[1])).to(tl.int64)
        here = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
        places = rows.to(tl.int64)
        acc *= scale
        if start_ptr is not None:
            ptrs = start_ptr + places[:, None] * stride_start_row + cols[None, :] * stride_start_col
            acc += tl.load(ptrs, mask=here, other=0.0).to(tl.float32)
        if index_ptr is not None:
            places = tl.load(index_ptr + places, mask=rows < num_rows, other=0)
        ptrs = out_ptr + places[:, None] * stride_out_row + cols[None, :] * stride_out_col
        tl.store(ptrs, acc.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def _live_matmul_kernel(
    a, b, start_ptr, out_ptr, index_ptr, count_ptr, scale_ptr,
    m, n, k, stride_ar, stride_ac, stride_br, stride_bc, stride_sr, stride_sc, stride_or, stride_oc,
    COUNT_IS_DEPTH: tl.constexpr, TRANS_B: tl.constexpr, TMA: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    count = tl.load(count_ptr)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    if COUNT_IS_DEPTH:
        k = padded(count, BLOCK_K)  # zeros behind the last live row, and one block of them without any
    else:
        m = count
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    tiles_k = tl.cdiv(k, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        # Tiles in flight form a patch of GROUP_M row blocks and as many column blocks as fit beside them.
        group = tile // (GROUP_M * tiles_n)
        blocks_in_group = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
        within = tile % (GROUP_M * tiles_n)
        row = (group * GROUP_M + within % blocks_in_group) * BLOCK_M
        col = (within // blocks_in_group) * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(tiles_k):
            at = step * BLOCK_K
            if COUNT_IS_DEPTH:
                x = _operand(
                    a, at, row, k, m, stride_ar, stride_ac, TMA, True, WIDEN, False, not EVEN_M, BLOCK_K, BLOCK_M
                )  # fmt: skip
            else:
                x = _operand(
                    a, row, at, m, k, stride_ar, stride_ac, TMA, False, WIDEN, False, not EVEN_K, BLOCK_M, BLOCK_K
                )  # fmt: skip
            if TRANS_B:
                y = _operand(
                    b, col, at, n, k, stride_br, stride_bc, TMA, True, WIDEN, False, not EVEN_K, BLOCK_N, BLOCK_K
                )  # fmt: skip
            else:
                y = _operand(
                    b, at, col, k, n, stride_br, stride_bc, TMA, False, WIDEN, not EVEN_K, not EVEN_N, BLOCK_K, BLOCK_N
                )  # fmt: skip
            acc = tl.dot(x, y, acc, input_precision="ieee")
        _store_tile(
            acc, row, col, m, n, start_ptr, out_ptr, index_ptr, scale, stride_sr, stride_sc, stride_or, stride_oc, PARTS
        )


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


def gemm_tiles(arch: str, dtype: torch.dtype, *, aligned: bool = True) -> GemmTiles:
    """Tiles for an architecture ("sm_90", "gfx942") and the operands' dtype and alignment.

    They look at no size, so the bits of a row do not depend on how many rows there are.
    """
    amd = arch.startswith("gfx")
    if dtype == torch.float32:  # IEEE products on the ordinary units, no TF32
        return GemmTiles(64, 128, 16, num_warps=8, num_stages=2 if amd else 3)
    if not aligned:
        return GemmTiles(64, 128, 32, num_warps=8, num_stages=2)
    if arch in TMA_ARCHITECTURES:
        return GemmTiles(128, 256, 64, num_warps=8, num_stages=4, parts=4, flatten=True)
    if amd:
        return GemmTiles(128, 128, 64, num_warps=8, num_stages=2)
    return GemmTiles(128, 128, 64, num_warps=8, num_stages=3, parts=2)


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


def rows_matmul(
    a: Tensor,  # (≥ m, k) float32, bfloat16 or float16: rows gathered to the front
    b: Tensor,  # (k, n) of a's dtype, any strides; (n, k) transposed is taken as it lies
    count: Tensor,  # (1,) int32 on the device: m
    out: Tensor,  # (N, n) float32, bfloat16 or float16, any strides
    *,
    index: Tensor | None = None,  # (≥ m,) int64, distinct: rows of out; None: row i goes to out[i]
    start: Tensor | None = None,  # (≥ m, n) float32, added to row i; it may be out where there is no index
    scale: Tensor | None = None,  # 0-dim float32 on the device, multiplies the product
    arch: str,
    programs: int,  # how many multiprocessors there are
    tiles: GemmTiles | None = None,
) -> None:
    """out[index[i]] = start[i] + scale · (a @ b)[i] for i < m; all other rows of out are left as they are."""
    _launch(a, b, count, out, index, start, scale, False, arch, programs, tiles)


def depth_matmul(
    a: Tensor,  # (≥ m rounded up to PAD, M) float32, bfloat16 or float16; rows between m and there are zero
    b: Tensor,  # (≥ m rounded up to PAD, N) of a's dtype, likewise
    count: Tensor,  # (1,) int32 on the device: m
    out: Tensor,  # (M, N) float32, bfloat16 or float16, any strides
    *,
    start: Tensor | None = None,  # (M, N) float32, added; it may be out
    scale: Tensor | None = None,  # 0-dim float32 on the device, multiplies the product
    arch: str,
    programs: int,
    tiles: GemmTiles | None = None,
) -> None:
    """out = start + scale · a[:m]ᵀ @ b[:m], every element of it; zero or `start` without a live row."""
    _launch(a, b, count, out, None, start, scale, True, arch, programs, tiles)


def _launch(
    a: Tensor, b: Tensor, count: Tensor, out: Tensor, index: Tensor | None, start: Tensor | None, scale: Tensor | None,
    count_is_depth: bool, arch: str, programs: int, tiles: GemmTiles | None,
) -> None:  # fmt: skip
    if out.numel() == 0:
        return
    m, k = (a.shape[1], a.shape[0]) if count_is_depth else a.shape
    n = b.shape[1]
    trans_b = b.stride(1) != 1 and b.stride(0) == 1
    b_rows = b.t() if trans_b else b
    aligned = _aligned(a) and _aligned(b_rows)
    tma = aligned and a.element_size() == 2 and arch in TMA_ARCHITECTURES
    if tiles is None:
        tiles = gemm_tiles(arch, a.dtype, aligned=aligned)
    sizes, options = launch_options(tiles)
    block_a = [tiles.block_k, tiles.block_m] if count_is_depth else [tiles.block_m, tiles.block_k]
    block_b = [tiles.block_n, tiles.block_k] if trans_b else [tiles.block_k, tiles.block_n]
    interpreted = not isinstance(_live_matmul_kernel, triton.JITFunction)
    with torch.cuda.device_of(out):
        _live_matmul_kernel[(max(1, programs),)](
            TensorDescriptor.from_tensor(a, block_a) if tma else a,
            TensorDescriptor.from_tensor(b_rows, block_b) if tma else b_rows,
            start, out, index, count, scale, m, n, k, *a.stride(), *b_rows.stride(),
            *((0, 0) if start is None else start.stride()), *out.stride(),
            COUNT_IS_DEPTH=count_is_depth, TRANS_B=trans_b, TMA=tma,
            EVEN_M=m % tiles.block_m == 0, EVEN_N=n % tiles.block_n == 0,
            EVEN_K=count_is_depth or k % tiles.block_k == 0, WIDEN=interpreted, **sizes, **options,
        )  # fmt: skip


def _aligned(matrix: Tensor) -> bool:
    """Whether rows start on 16 bytes and are contiguous, which TMA descriptors and asynchronous copies want."""
    pitch = matrix.stride(0) * matrix.element_size()
    return matrix.stride(1) == 1 and pitch % 16 == 0 and matrix.data_ptr() % 16 == 0
