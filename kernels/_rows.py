"""Device functions that walk one row of a tile in blocks: once for its statistics, once for its gradient.

Shared by the kernels of `row_kernels` and `row_loss_grad`. A block is `BLOCK` columns, 16 a thread. The next block is
on its way while one is worked on: 16 KiB of loads for each program of 256 threads, twice that at the turn. Whole blocks
go without a mask, so that a width that is no multiple of 4 still has 16-byte accesses wherever rows start on 16 bytes.
"""

import triton
import triton.language as tl

from ._online import fold_lanes, logits, reduce_lanes, start_lanes, tanh_and_slope


@triton.jit
def row_state(
    tile_ptr, bias_ptr, v, stride_tv, stride_b, in_scale, out_scale,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, TOP1: tl.constexpr, SUM_SQ: tl.constexpr,
    SUM_Z: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """State (six scalars, as `reduce_lanes` returns them) of a row of v head outputs at tile_ptr.

    A lane is a thread: it keeps a state of its own over the columns it reads, four neighbours at a time, and the lanes
    meet once, at the end. So there is no barrier and no exchange in the loop. Which columns a lane sees follows from
    BLOCK and LANES alone.
    """
    VECTOR: tl.constexpr = 4 if BLOCK >= 4 * LANES else BLOCK // LANES
    vectors = tl.arange(0, BLOCK // (LANES * VECTOR))[:, None, None] * (LANES * VECTOR)
    cols = vectors + tl.arange(0, LANES)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    m, s, ent, sq, sz, arg = start_lanes(LANES)
    whole = v // BLOCK * BLOCK
    if whole > 0:
        ahead = tl.load(tile_ptr + cols.to(tl.int64) * stride_tv)
        for start in range(0, whole, BLOCK):
            u = ahead.to(tl.float32)
            after = start + BLOCK
            more = tl.zeros_like(cols) < whole - after  # one condition for all: accesses stay 16 bytes wide
            ahead = tl.load(tile_ptr + (after + cols).to(tl.int64) * stride_tv, mask=more)
            bias = None
            if bias_ptr is not None:
                bias = tl.load(bias_ptr + (start + cols).to(tl.int64) * stride_b).to(tl.float32)
            z = logits(u, bias, in_scale, out_scale, SOFTCAP, SCALED)
            m, s, ent, sq, sz, arg = fold_lanes(
                m, s, ent, sq, sz, arg, z, start + cols, v, False, ENTROPY, TOP1, SUM_SQ, SUM_Z
            )
    if whole < v:
        here = whole + cols < v
        u = tl.load(tile_ptr + (whole + cols).to(tl.int64) * stride_tv, mask=here, other=0.0).to(tl.float32)
        bias = None
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + (whole + cols).to(tl.int64) * stride_b, mask=here, other=0.0).to(tl.float32)
        z = logits(u, bias, in_scale, out_scale, SOFTCAP, SCALED)
        m, s, ent, sq, sz, arg = fold_lanes(
            m, s, ent, sq, sz, arg, z, whole + cols, v, True, ENTROPY, TOP1, SUM_SQ, SUM_Z
        )
    return reduce_lanes(m, s, ent, sq, sz, arg, ENTROPY, TOP1, SUM_SQ, SUM_Z)


@triton.jit
def output_at(tile_ptr, bias_ptr, y, v, stride_tv, stride_b):
    """Head output (with bias) at column y, 0 where y is not one of the v columns."""
    inside = (y >= 0) & (y < v)
    u = tl.load(tile_ptr + y * stride_tv, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        u += tl.load(bias_ptr + y * stride_b, mask=inside, other=0.0).to(tl.float32)
    return u


@triton.jit
def write_gradient(
    tile_ptr, bias_ptr, out_ptr, y, u_y, row_max, log_sum, base, target_coef, entropy_coef,
    v, stride_tv, stride_ov, stride_b, in_scale, out_scale,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, EXP_TILE: tl.constexpr, NARROW_ALIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """∂L/∂u of a row, to out_ptr; u_y is `output_at` the target, whose column is written last, by itself.

    entropy_coef None: there is none. NARROW_ALIAS: see row_kernels.row_grad_bwd.
    """
    lanes = tl.arange(0, BLOCK)
    if SCALED and not SOFTCAP:
        base, target_coef = base * in_scale, target_coef * in_scale
        if entropy_coef is not None:
            entropy_coef *= in_scale
    if EXP_TILE:
        base *= tl.exp(-log_sum)
    # u_y is read by every warp; over the tile itself, the first store may already change it
    tl.debug_barrier()
    whole = v // BLOCK * BLOCK
    if whole > 0:
        ahead = tl.load(tile_ptr + lanes.to(tl.int64) * stride_tv)
        for start in range(0, whole, BLOCK):
            u = ahead.to(tl.float32)
            after = start + BLOCK
            more = tl.zeros_like(lanes) < whole - after
            ahead = tl.load(tile_ptr + (after + lanes).to(tl.int64) * stride_tv, mask=more)
            cols = (start + lanes).to(tl.int64)
            if bias_ptr is not None:
                u += tl.load(bias_ptr + cols * stride_b).to(tl.float32)
            if NARROW_ALIAS:
                tl.debug_barrier()
            grad = gradient(
                u, row_max, log_sum, base, entropy_coef, in_scale, out_scale, SCALED, SOFTCAP, EXP_TILE
            )  # fmt: skip
            tl.store(out_ptr + cols * stride_ov, grad.to(out_ptr.dtype.element_ty))
    if whole < v:
        cols = (whole + lanes).to(tl.int64)
        here = cols < v
        u = tl.load(tile_ptr + cols * stride_tv, mask=here, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            u += tl.load(bias_ptr + cols * stride_b, mask=here, other=0.0).to(tl.float32)
        if NARROW_ALIAS:
            tl.debug_barrier()
        grad = gradient(u, row_max, log_sum, base, entropy_coef, in_scale, out_scale, SCALED, SOFTCAP, EXP_TILE)
        tl.store(out_ptr + cols * stride_ov, grad.to(out_ptr.dtype.element_ty), mask=here)
    if SOFTCAP:
        target_coef *= _slope(u_y * in_scale) * (in_scale * out_scale)
    tl.debug_barrier()  # the target's column has been written by another warp
    tl.store(out_ptr + y * stride_ov, target_coef.to(out_ptr.dtype.element_ty), mask=(y >= 0) & (y < v))


@triton.jit
def gradient(
    u, row_max, log_sum, base, entropy_coef, in_scale, out_scale,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, EXP_TILE: tl.constexpr,
):  # fmt: skip
    """∂L/∂u beside the target. Without a softcap in_scale is in the coefficients, with EXP_TILE exp(−log_sum) too."""
    if EXP_TILE:
        grad = u * base
    else:
        z = u
        if SCALED:
            z = u * in_scale
        if SOFTCAP:
            z, sech2 = tanh_and_slope(z)
            z *= out_scale
        logp = (z - row_max) - log_sum
        grad = tl.exp(logp)
        if entropy_coef is not None:
            grad = tl.where(grad > 0, grad * (base - entropy_coef * logp), grad)  # z = −inf: 0, not 0·∞
        else:
            grad *= base
        if SOFTCAP:
            grad *= sech2 * (in_scale * out_scale)
    return grad


@triton.jit
def _slope(x):
    _, slope = tanh_and_slope(x)
    return slope


@triton.jit
def write_zeros(out_ptr, v, stride_ov, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
    whole = v // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        tl.store(out_ptr + (start + lanes).to(tl.int64) * stride_ov, zeros)
    if whole < v:
        cols = (whole + lanes).to(tl.int64)
        tl.store(out_ptr + cols * stride_ov, zeros, mask=cols < v)
