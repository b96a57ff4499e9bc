"""Triton row kernels: a float32 tile of head outputs folded into running sums, turned into its gradient, or into
exponentials.

The contract (shapes, formulas, the meaning of every vector) is that of `fastalign.ops.rows`; launchers take its
tensors one by one. With z = in_scale·(u + b), or out_scale·tanh(in_scale·(u + b)) with a softcap, and y the target:

    row_stats_fwd    max z, Σ exp(z − max), z_y, … folded into the running state
    row_grad_bwd     ∂L/∂u = G·dz/du,  G_v = p_v·(base − entropy_coef·log p_v),  G_y = target_coef
    row_exp_fwd      exp(z − max) in 16 bits, from which row_grad_bwd can start too (EXP_TILE): p = E·exp(−log_sum)

Work per logit, instructions counted in the main loops that Triton 3.9 makes for sm_90, and what they come to for 8192 ×
131072 logits on an H200 (132 multiprocessors at 1.75 GHz: 128 instructions or 16 exp a clock each; 4.3 TB/s):

    kernel                        bytes             instructions   exp    memory     issue     exp
    row_stats                     4 read            10.2           1      1.0 ms     0.37 ms   0.29 ms
      + entropy, or top-1, or Σp² 4 read            12 to 13       1      1.0 ms     0.47 ms   0.29 ms
      with a softcap              4 read            33             3      1.0 ms     1.2 ms    0.9 ms
    row_grad in 16 bits           4 read, 2 written 10.3           1      1.5 ms     0.37 ms   0.29 ms
    row_grad in float32           4 read, 4 written 11.1           1      2.0 ms     0.4 ms    0.29 ms
    row_grad, EXP_TILE            2 read, 2 written 4.6            0      1.0 ms     0.17 ms
    row_exp                       4 read, 2 written 8.6            1      1.5 ms     0.31 ms   0.29 ms

So memory is the limit, but for statistics under a softcap. The figures are counts; no device has confirmed them. A
logit is read once (the target's four bytes twice) and written once. Rows whose coefficients are all zero are not read
at all: their gradient is 0, whatever the logits hold. Where in_scale is 1 there is no multiplication by it.

One program per row, on grid x (limit 2^31 − 1), and no split of a row over programs: for fewer than about 132·3 rows
some multiprocessors idle (64 rows take about 40 µs, the GEMM before them reads its weight for 250). A split by columns
would have to be the same for any number of rows, or equal rows would stop giving equal results, and a narrower
gradient could not go over its tile. `csrc/cuda` has one, over clusters.

What latency needs (20 to 30 KB of loads in flight a multiprocessor) comes from 4 to 6 programs of 256 threads with
the next block's 16 KiB each on the way. Any strides are correct; speed wants a column stride of 1, and 16-byte accesses
want row strides that are multiples of 16 elements, whatever the width. For rows that start elsewhere a shifted walk
would align them, and give a row other sums in another place of the tile; so they are read 4 bytes at a time.

Launchers check what would corrupt memory (how `out` overlaps `tile`); shapes and dtypes are checked by the ops that
call them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._alias import narrow_alias
from ._online import logits, merge
from ._rows import output_at, row_state, write_gradient, write_zeros
from ._tiles import RowTiles, row_tiles

THREADS_PER_WARP = 64 if torch.version.hip else 32


@triton.jit
def _row_stats_kernel(
    tile_ptr, bias_ptr, targets_ptr, values_ptr, argmax_ptr,
    n, v, v0, stride_tn, stride_tv, stride_b, in_scale: tl.float32, out_scale: tl.float32,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, TOP1: tl.constexpr, SUM_SQ: tl.constexpr,
    SUM_Z: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tile_ptr += row * stride_tn
    values_ptr += row
    m2, s2, ent2, sq2, sz2, arg2 = row_state(
        tile_ptr, bias_ptr, v, stride_tv, stride_b, in_scale, out_scale, SCALED, SOFTCAP, ENTROPY, TOP1, SUM_SQ, SUM_Z,
        BLOCK, LANES,
    )  # fmt: skip
    m = tl.load(values_ptr)
    s = tl.load(values_ptr + n)
    ent, sq, sz, arg = s, s, s, row
    if ENTROPY:
        ent = tl.load(values_ptr + 3 * n)
    if SUM_SQ:
        sq = tl.load(values_ptr + 4 * n)
    if SUM_Z:
        sz = tl.load(values_ptr + 5 * n)
    if TOP1:
        arg = tl.load(argmax_ptr + row)
        arg2 = arg2.to(tl.int64) + v0
    m, s, ent, sq, sz, arg = merge(m, s, ent, sq, sz, arg, m2, s2, ent2, sq2, sz2, arg2, ENTROPY, TOP1, SUM_SQ, SUM_Z)
    tl.store(values_ptr, m)
    tl.store(values_ptr + n, s)
    if ENTROPY:
        tl.store(values_ptr + 3 * n, ent)
    if SUM_SQ:
        tl.store(values_ptr + 4 * n, sq)
    if SUM_Z:
        tl.store(values_ptr + 5 * n, sz)
    if TOP1:
        tl.store(argmax_ptr + row, arg)

    # The same operations on the same float32 give the same z_y as in the loop above, so z_y ≤ max.
    y = tl.load(targets_ptr + row) - v0
    z_y = logits(
        output_at(tile_ptr, bias_ptr, y, v, stride_tv, stride_b), None, in_scale, out_scale, SOFTCAP, SCALED
    )  # fmt: skip
    tl.store(values_ptr + 2 * n, z_y, mask=(y >= 0) & (y < v))


@triton.jit
def _row_grad_kernel(
    tile_ptr, bias_ptr, targets_ptr, max_ptr, log_sum_ptr, base_ptr, target_coef_ptr, entropy_coef_ptr, out_ptr,
    v, v0, stride_tn, stride_tv, stride_on, stride_ov, stride_b, in_scale: tl.float32, out_scale: tl.float32,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, EXP_TILE: tl.constexpr, NARROW_ALIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tile_ptr += row * stride_tn
    out_ptr += row * stride_on
    y = tl.load(targets_ptr + row) - v0
    log_sum = tl.load(log_sum_ptr + row)
    base = tl.load(base_ptr + row)
    target_coef = tl.load(target_coef_ptr + row)
    live = (base != 0) | (target_coef != 0)
    entropy_coef = None
    if entropy_coef_ptr is not None:
        entropy_coef = tl.load(entropy_coef_ptr + row)
        live = live | (entropy_coef != 0)

    if live:
        row_max = log_sum
        if not EXP_TILE:
            row_max = tl.load(max_ptr + row)
        u_y = output_at(tile_ptr, bias_ptr, y, v, stride_tv, stride_b)
        write_gradient(
            tile_ptr, bias_ptr, out_ptr, y, u_y, row_max, log_sum, base, target_coef, entropy_coef, v, stride_tv,
            stride_ov, stride_b, in_scale, out_scale, SCALED, SOFTCAP, EXP_TILE, NARROW_ALIAS, BLOCK,
        )  # fmt: skip
    else:
        write_zeros(out_ptr, v, stride_ov, BLOCK)


@triton.jit
def _row_exp_kernel(
    tile_ptr, bias_ptr, max_ptr, out_ptr,
    v, stride_tn, stride_tv, stride_on, stride_ov, stride_b, in_scale: tl.float32, out_scale: tl.float32,
    SOFTCAP: tl.constexpr, NARROW_ALIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tile_ptr += row * stride_tn
    out_ptr += row * stride_on
    lanes = tl.arange(0, BLOCK)
    row_max = tl.load(max_ptr + row)
    whole = v // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        cols = (start + lanes).to(tl.int64)
        u = tl.load(tile_ptr + cols * stride_tv).to(tl.float32)
        bias = None
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + cols * stride_b).to(tl.float32)
        if NARROW_ALIAS:
            tl.debug_barrier()  # see row_grad_bwd
        e = tl.exp(logits(u, bias, in_scale, out_scale, SOFTCAP) - row_max)
        tl.store(out_ptr + cols * stride_ov, e.to(out_ptr.dtype.element_ty))
    if whole < v:
        cols = (whole + lanes).to(tl.int64)
        here = cols < v
        u = tl.load(tile_ptr + cols * stride_tv, mask=here, other=0.0).to(tl.float32)
        bias = None
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + cols * stride_b, mask=here, other=0.0).to(tl.float32)
        if NARROW_ALIAS:
            tl.debug_barrier()
        e = tl.exp(logits(u, bias, in_scale, out_scale, SOFTCAP) - row_max)
        tl.store(out_ptr + cols * stride_ov, e.to(out_ptr.dtype.element_ty), mask=here)


def row_stats_fwd(
    tile: Tensor,  # (n, v) float32, any strides
    bias: Tensor | None,  # (v,)
    targets: Tensor,  # (n,) int64, in the whole vocabulary; those outside [v0, v0 + v) leave TARGET as it is
    v0: int,
    values: Tensor,  # (6, n) float32, contiguous: MAX, SUM, TARGET, ENT, SUM_SQ, SUM_Z; updated in place
    argmax: Tensor,  # (n,) int64 with top1, else anything; updated in place
    *,
    in_scale: float = 1.0,
    out_scale: float = 1.0,
    softcap: bool = False,
    entropy: bool = False,
    top1: bool = False,
    sum_sq: bool = False,
    sum_z: bool = False,
    tiles: RowTiles | None = None,
) -> None:
    """Fold a tile into the running state of its rows. Slabs come in ascending order of v0.

    Only the sums whose flags are set are read and written.
    """
    n, v = tile.shape
    if n == 0 or v == 0:
        return
    tiles = tiles or row_tiles(v)
    with torch.cuda.device_of(tile):
        _row_stats_kernel[(n,)](
            tile, bias, targets.contiguous(), values, argmax if top1 else None,
            n, v, v0, tile.stride(0), tile.stride(1), _stride(bias), float(in_scale), float(out_scale),
            SCALED=softcap or in_scale != 1, SOFTCAP=softcap, ENTROPY=entropy, TOP1=top1, SUM_SQ=sum_sq, SUM_Z=sum_z,
            BLOCK=tiles.block, LANES=lanes(tiles), num_warps=tiles.num_warps, enable_fp_fusion=False,
        )  # fmt: skip


def row_grad_bwd(
    tile: Tensor,  # (n, v) float32, any strides; with exp_tile exponentials, bfloat16 or float16
    bias: Tensor | None,  # (v,)
    targets: Tensor,  # (n,) int64
    v0: int,
    max: Tensor | None,  # (n,) float32; not needed with exp_tile
    log_sum: Tensor,  # (n,) float32
    base: Tensor,  # (n,) float32
    target_coef: Tensor,  # (n,) float32
    entropy_coef: Tensor | None,  # (n,) float32
    out: Tensor,  # (n, v) float32, bfloat16 or float16, any strides
    *,
    in_scale: float = 1.0,
    out_scale: float = 1.0,
    softcap: bool = False,
    exp_tile: bool = False,
    tiles: RowTiles | None = None,
) -> None:
    """Write ∂L/∂u of a tile to `out`, rounded once. `out` may be the tile, or a 16-bit view of the first half of each
    tile row.

    Why a 16-bit gradient may be written over the float32 tile it comes from. Let the row be walked in blocks of B
    columns. Block k is read from bytes [4Bk, 4B(k+1)) of the row and written to bytes [2Bk, 2B(k+1)), which hold
    float32 columns of blocks ⌊k/2⌋ ≤ k only. So a write can only meet reads of its own or an earlier block; all of
    these come before the barrier of iteration k in every thread of the program, and the write comes after it. Reads
    of later blocks touch bytes that no write so far has reached, so warps may run ahead as they like. Other rows are
    other programs and other bytes: both views start at the same address with the same row pitch. An `out` of the
    tile's own dtype and strides needs no barrier: each thread overwrites the very element it has read.

    Raises:
        ValueError: `out` overlaps `tile` in another way, or exp_tile with a bias, a softcap or an entropy coefficient.
    """
    if exp_tile and (bias is not None or softcap or entropy_coef is not None):
        raise ValueError("exp_tile takes no bias (the exponentials hold it), no softcap and no entropy_coef")
    n, v = tile.shape
    if n == 0 or v == 0:
        return
    tiles = tiles or row_tiles(v)
    with torch.cuda.device_of(tile):
        _row_grad_kernel[(n,)](
            tile, bias, targets.contiguous(), max, log_sum.contiguous(), base.contiguous(), target_coef.contiguous(),
            None if entropy_coef is None else entropy_coef.contiguous(), out,
            v, v0, tile.stride(0), tile.stride(1), out.stride(0), out.stride(1), _stride(bias),
            float(in_scale), float(out_scale),
            SCALED=softcap or in_scale != 1, SOFTCAP=softcap, EXP_TILE=exp_tile,
            NARROW_ALIAS=narrow_alias(tile, out), BLOCK=tiles.block, num_warps=tiles.num_warps, enable_fp_fusion=False,
        )  # fmt: skip


def row_exp_fwd(
    tile: Tensor,  # (n, v) float32, any strides
    bias: Tensor | None,  # (v,)
    max: Tensor,  # (n,) float32
    out: Tensor,  # (n, v) bfloat16 or float16, any strides
    *,
    in_scale: float = 1.0,
    out_scale: float = 1.0,
    softcap: bool = False,
    tiles: RowTiles | None = None,
) -> None:
    """Write exp(z − max) of a tile to `out`, rounded once; `out` may overlap the tile as in row_grad_bwd.

    Raises:
        ValueError: `out` overlaps `tile` in another way.
    """
    n, v = tile.shape
    if n == 0 or v == 0:
        return
    tiles = tiles or row_tiles(v)
    with torch.cuda.device_of(tile):
        _row_exp_kernel[(n,)](
            tile, bias, max.contiguous(), out,
            v, tile.stride(0), tile.stride(1), out.stride(0), out.stride(1), _stride(bias),
            float(in_scale), float(out_scale),
            SOFTCAP=softcap, NARROW_ALIAS=narrow_alias(tile, out), BLOCK=tiles.block,
            num_warps=tiles.num_warps, enable_fp_fusion=False,
        )  # fmt: skip


def lanes(tiles: RowTiles, threads_per_warp: int = THREADS_PER_WARP) -> int:
    """Running states of a row: one a thread, of columns that it reads four at a time."""
    return min(threads_per_warp * tiles.num_warps, max(1, tiles.block // 4))


def _stride(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.stride(0)
