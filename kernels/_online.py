"""Device functions shared by the kernels: logits from head outputs, and sums over exponentials that arrive in blocks.

The running quantities of a row, for the columns seen so far (`fastalign.ops.rows` has the layout they are stored in):

    m = max z,  s = Σ exp(z − m),  ent = Σ exp(z − m)·(z − m),  sq = Σ exp(2(z − m)),  sz = Σ z,  arg = first argmax

A block is reduced relative to its own maximum and then merged into the running state (`reduce_block`, `merge`), or
folded into a state per lane that is reduced once, at the end of the row (`fold_lanes`, `reduce_lanes`). One of the
factors of a merge is exactly 1, and so is the exponential of the maximum: s ≥ 1 holds in float32, hence log-probs are
never above 0. A fused multiply-add of scale·u − m would break that (the maximum's own term would no longer be exp(0)),
so all kernels are compiled with floating-point contraction off, and exp stays exp: 2^(z·log₂e − m·log₂e) would save a
multiplication and give the maximum a term other than 1.
"""

import triton
import triton.language as tl

NEG_INF = tl.constexpr(float("-inf"))
INT32_MAX = tl.constexpr(2147483647)


@triton.jit
def tanh_and_slope(x):
    """tanh(x) and 1 − tanh²(x), both to a few units in the last place (no cancellation at either end)."""
    a = tl.abs(x)
    w = 2.0 / (tl.exp2(a * 2.8853900817779268) + 1.0)  # 1 − tanh a; e^(2a) may overflow to inf, then w = 0
    q = a * a
    # the minimax polynomial of Cephes' tanhf for |x| < 0.625, where 1 − w would cancel
    p = tl.fma(tl.fma(q, -5.70498872745e-3, 2.06390887954e-2), q, -5.37397155531e-2)
    p = tl.fma(tl.fma(p, q, 1.33314422036e-1), q, -3.33332819422e-1)
    near = tl.fma(a * q, p, a)
    t = tl.where(a < 0.625, near, 1.0 - w)
    slope = tl.where(a < 0.625, tl.fma(near, -near, 1.0), w * (2.0 - w))
    return tl.where(x < 0, -t, t), slope


@triton.jit
def logits(u, bias, in_scale, out_scale, SOFTCAP: tl.constexpr, SCALED: tl.constexpr = True):
    """z from head outputs u, float32; bias broadcasts against u, or is None. SCALED False: in_scale is 1."""
    if bias is not None:
        u = u + bias
    z = u
    if SCALED:
        z = u * in_scale
    if SOFTCAP:
        z, _ = tanh_and_slope(z)
        z = z * out_scale
    return z


@triton.jit
def reduce_block(
    z, cols, end, ENTROPY: tl.constexpr, TOP1: tl.constexpr, SUM_SQ: tl.constexpr, SUM_Z: tl.constexpr
):  # fmt: skip
    """State of a block of logits z (R, C), each (R,). cols (1, C) int32 numbers the columns; there are `end`."""
    z = tl.where(cols < end, z, NEG_INF)
    m = tl.max(z, axis=1)
    ref = tl.where(m == NEG_INF, 0.0, m)  # a row of -inf: exp(-inf − 0) = 0 instead of NaN
    d = z - ref[:, None]
    e = tl.exp(d)
    s = tl.sum(e, axis=1)
    ent, sq, sz = s, s, s  # placeholders, dropped by the compiler where their flag is off
    arg = tl.zeros_like(m).to(tl.int32)
    if ENTROPY:
        ent = tl.sum(e * tl.maximum(d, -3.0e38), axis=1)  # 0·log 0 = 0, where 0·(−inf) would be NaN
    if SUM_SQ:
        sq = tl.sum(e * e, axis=1)
    if SUM_Z:
        sz = tl.sum(tl.where(cols < end, z, 0.0), axis=1)
    if TOP1:
        arg = tl.min(tl.where(z == m[:, None], cols, INT32_MAX), axis=1)
    return m, s, ent, sq, sz, arg


@triton.jit
def merge(
    m, s, ent, sq, sz, arg, m_new, s_new, ent_new, sq_new, sz_new, arg_new,
    ENTROPY: tl.constexpr, TOP1: tl.constexpr, SUM_SQ: tl.constexpr, SUM_Z: tl.constexpr,
):  # fmt: skip
    """The state of earlier columns merged with that of later ones; the earlier argmax wins a tie."""
    top = tl.maximum(m, m_new)
    ref = tl.where(top == NEG_INF, 0.0, top)
    a = tl.exp(m - ref)
    b = tl.exp(m_new - ref)
    if ENTROPY:
        # Σ e^(z−top)(z−top) = e^(m−top)·(Σ e^(z−m)(z−m) + (m−top)·Σ e^(z−m)); without columns yet m = −inf and s = 0
        shift = tl.where(m == NEG_INF, 0.0, m - ref)
        shift_new = tl.where(m_new == NEG_INF, 0.0, m_new - ref)
        ent = (ent + shift * s) * a + (ent_new + shift_new * s_new) * b
    s = s * a + s_new * b
    if SUM_SQ:
        sq = sq * a * a + sq_new * b * b
    if SUM_Z:
        sz = sz + sz_new
    if TOP1:
        arg = tl.where(m_new > m, arg_new, arg)
    return top, s, ent, sq, sz, arg


@triton.jit
def start_lanes(LANES: tl.constexpr):
    """State of lanes that have seen no column."""
    m = tl.full([LANES], NEG_INF, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    return m, s, s, s, s, tl.zeros([LANES], tl.int32)


@triton.jit
def fold_lanes(
    m, s, ent, sq, sz, arg, z, cols, end,
    MASKED: tl.constexpr, ENTROPY: tl.constexpr, TOP1: tl.constexpr, SUM_SQ: tl.constexpr, SUM_Z: tl.constexpr,
):  # fmt: skip
    """States of lanes (L,) with the logits z (K, L, C) of each folded in; cols (K, L, C) numbers the columns.

    Where a thread owns lanes whole nothing is exchanged between threads, so a warp waits for no other. Folded blocks
    of a lane ascend in columns, hence the first of equal maxima stays. MASKED: columns from `end` on are not there.
    """
    if MASKED:
        z = tl.where(cols < end, z, NEG_INF)
    block_max = tl.max(tl.max(z, axis=2), axis=0)
    top = tl.maximum(m, block_max)
    ref = tl.where(top == NEG_INF, 0.0, top)  # nothing but -inf so far: exp(-inf − 0) = 0 instead of NaN
    d = z - ref[None, :, None]
    e = tl.exp(d)
    a = tl.exp(m - ref)
    if ENTROPY:
        shift = tl.where(m == NEG_INF, 0.0, m - ref)
        ent = (ent + shift * s) * a + _lane_sum(e * tl.maximum(d, -3.0e38))  # 0·log 0 = 0, where 0·(−inf) is NaN
    s = s * a + _lane_sum(e)
    if SUM_SQ:
        sq = sq * a * a + _lane_sum(e * e)
    if SUM_Z:
        seen = z
        if MASKED:
            seen = tl.where(cols < end, z, 0.0)
        sz += _lane_sum(seen)
    if TOP1:
        first = tl.min(tl.min(tl.where(z == block_max[None, :, None], cols, INT32_MAX), axis=2), axis=0)
        arg = tl.where(block_max > m, first, arg)
    return top, s, ent, sq, sz, arg


@triton.jit
def _lane_sum(x):
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def reduce_lanes(
    m, s, ent, sq, sz, arg, ENTROPY: tl.constexpr, TOP1: tl.constexpr, SUM_SQ: tl.constexpr, SUM_Z: tl.constexpr
):  # fmt: skip
    """The state (scalars) of all columns that the lanes (L,) have seen."""
    top = tl.max(m, axis=0)
    ref = tl.where(top == NEG_INF, 0.0, top)
    a = tl.exp(m - ref)
    ent_all, sq_all, sz_all, arg_all = 0.0, 0.0, 0.0, 0
    if ENTROPY:
        shift = tl.where(m == NEG_INF, 0.0, m - ref)
        ent_all = tl.sum((ent + shift * s) * a, axis=0)
    if SUM_SQ:
        sq_all = tl.sum(sq * a * a, axis=0)
    if SUM_Z:
        sz_all = tl.sum(sz, axis=0)
    if TOP1:
        arg_all = tl.min(tl.where(m == top, arg, INT32_MAX), axis=0)
    return top, tl.sum(s * a, axis=0), ent_all, sq_all, sz_all, arg_all
