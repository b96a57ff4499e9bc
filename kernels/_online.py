"""Device functions shared by the kernels: logits from head outputs, and sums over exponentials that arrive in blocks.

The running quantities of a row, for the columns seen so far (`fastalign.ops.rows` has the layout they are stored in):

    m = max z,  s = Σ exp(z − m),  ent = Σ exp(z − m)·(z − m),  sq = Σ exp(2(z − m)),  sz = Σ z,  arg = first argmax

A block is reduced relative to its own maximum and then merged into the running state. One of the two factors of a
merge is exactly 1, and so is the exponential of the maximum: s ≥ 1 holds in float32, hence log-probs are never above
0. A fused multiply-add of scale·u − m would break that (the maximum's own term would no longer be exp(0)), so all
kernels are compiled with floating-point contraction off.
"""

import triton
import triton.language as tl

NEG_INF = tl.constexpr(float("-inf"))
INT32_MAX = tl.constexpr(2147483647)


@triton.jit
def tanh_and_slope(x):
    """tanh(x) and 1 − tanh²(x), both to a few units in the last place (no cancellation at either end)."""
    a = tl.abs(x)
    w = 2.0 / (tl.exp(2.0 * a) + 1.0)  # 1 − tanh a; exp may overflow to inf, then w = 0
    q = a * a
    # the minimax polynomial of Cephes' tanhf for |x| < 0.625, where 1 − w would cancel
    p = (
        (((-5.70498872745e-3 * q + 2.06390887954e-2) * q - 5.37397155531e-2) * q + 1.33314422036e-1) * q
    ) - 3.33332819422e-1
    near = a + a * q * p
    t = tl.where(a < 0.625, near, 1.0 - w)
    slope = tl.where(a < 0.625, 1.0 - near * near, w * (2.0 - w))
    return tl.where(x < 0, -t, t), slope


@triton.jit
def logits(u, bias, in_scale, out_scale, SOFTCAP: tl.constexpr):
    """z from head outputs u, float32; bias broadcasts against u, or is None."""
    if bias is not None:
        u = u + bias
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
