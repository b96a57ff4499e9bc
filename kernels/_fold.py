"""Device functions of the fused forward: a tile of head outputs folded into the running sums of its rows.

The tile is the accumulator of a matrix product and stays where it is, in registers. Between two products the tensor
cores wait, so what counts is instructions per logit. Without flags a logit costs five:

    maximum, subtraction, multiplication, exponential, addition

Neither the scale nor the target costs one. The sums are those of raw values r, with z = unit·r and unit > 0:

    r = u + b, unit = in_scale       r = tanh(in_scale·(u + b)), unit = out_scale, with a softcap
    r = in_scale·(u + b), unit = 1   where in_scale is not positive

    m = max r,  s = Σ exp(z − unit·m),  ent = Σ exp(z − unit·m)·(r − m),  sq = Σ exp(2(z − unit·m)),  sz = Σ r

with exp(unit·x) taken as 2^(x·unit·log₂e), which the hardware has; `store_state` turns them into the state of
`fastalign.ops.rows` at the end. The maximum's own term is 2^0 = 1 and later tiles scale it by no less than what the new
maximum adds, so s ≥ 1 holds in float32 and log-probs are never above 0. (A fused multiply-add r·unit − m·unit would
break that: contraction is off.) Columns past the vocabulary, and targets, are looked for in the few tiles that have
any: both branches are the same for all threads.

The first argmax is that of r: unlike z, r is not rounded by a multiplication that could make two of them equal.

A tile can be kept: exp(z − reference) of each logit in 16 bits, for a reference that is known before. It is the
exponential that the sums are made of times 2^(unit·m − reference), one factor a row: a multiplication, a conversion and
half a store a logit, and no second exponential. Where m exceeds the reference by more than KEPT_REACH the factor stays
at that, so that nothing overflows; such rows are wrong and have to be done again.
"""

import triton
import triton.language as tl

from ._online import INT32_MAX, NEG_INF, tanh_and_slope

LOG2_E = tl.constexpr(1.4426950408889634)
KEPT_REACH = tl.constexpr(60.0)  # nats


@triton.jit
def start_state(BLOCK: tl.constexpr):
    """(m, s, ent, sq, sz, arg) of BLOCK rows before their first column."""
    s = tl.zeros([BLOCK], tl.float32)
    return tl.full([BLOCK], NEG_INF, tl.float32), s, s, s, s, tl.zeros([BLOCK], tl.int32)


@triton.jit
def fold_tile(
    m, s, ent, sq, sz, arg, acc, first, vocab, target, target_ptrs, stored, bias_ptr, stride_b, in_scale, unit,
    keep, row, reference2,
    SOFTCAP: tl.constexpr, SCALE_FIRST: tl.constexpr, ENTROPY: tl.constexpr, TOP1: tl.constexpr, SUM_SQ: tl.constexpr,
    SUM_Z: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Fold head outputs acc (R, C), columns from `first` on, in PARTS pieces from left to right.

    Rows whose target is among the columns get z_y stored at target_ptrs, where `stored` allows it.
    keep: where the tile is kept, if not None: pointers (R,) to column 0 of its rows; or, where `row` is the number
    of the first of them, a descriptor of all. reference2 (R,): their references times log₂e.
    """
    end = first + acc.shape[1]
    hit = tl.max(((target >= first) & (target < end)).to(tl.int32), axis=0) > 0
    rare = hit | (end > vocab)
    return _fold_parts(
        m, s, ent, sq, sz, arg, acc, rare, first, vocab, target, target_ptrs, stored, bias_ptr, stride_b, in_scale,
        unit, keep, row, reference2, SOFTCAP, SCALE_FIRST, ENTROPY, TOP1, SUM_SQ, SUM_Z, PARTS,
    )  # fmt: skip


@triton.jit
def _fold_parts(
    m, s, ent, sq, sz, arg, acc, rare, first, vocab, target, target_ptrs, stored, bias_ptr, stride_b, in_scale, unit,
    keep, row, reference2,
    SOFTCAP: tl.constexpr, SCALE_FIRST: tl.constexpr, ENTROPY: tl.constexpr, TOP1: tl.constexpr, SUM_SQ: tl.constexpr,
    SUM_Z: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    if PARTS > 1:
        # One piece at a time keeps the temporaries of the others out of the registers that the accumulator leaves.
        HALF: tl.constexpr = acc.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, [acc.shape[0], 2, HALF]), [0, 2, 1]))
        m, s, ent, sq, sz, arg = _fold_parts(
            m, s, ent, sq, sz, arg, left, rare, first, vocab, target, target_ptrs, stored, bias_ptr, stride_b, in_scale,
            unit, keep, row, reference2, SOFTCAP, SCALE_FIRST, ENTROPY, TOP1, SUM_SQ, SUM_Z, PARTS // 2,
        )  # fmt: skip
        m, s, ent, sq, sz, arg = _fold_parts(
            m, s, ent, sq, sz, arg, right, rare, first + HALF, vocab, target, target_ptrs, stored, bias_ptr, stride_b,
            in_scale, unit, keep, row, reference2, SOFTCAP, SCALE_FIRST, ENTROPY, TOP1, SUM_SQ, SUM_Z, PARTS // 2,
        )  # fmt: skip
    else:
        cols = first + tl.arange(0, acc.shape[1])
        r = _raw(acc, cols, vocab, bias_ptr, stride_b, in_scale, SOFTCAP, SCALE_FIRST)
        if SUM_Z:
            sz += tl.sum(tl.where((cols < vocab)[None, :], r, 0.0), axis=1)
        if rare:
            r = tl.where((cols < vocab)[None, :], r, NEG_INF)
            here = (target >= first) & (target < tl.minimum(first + acc.shape[1], vocab))
            picked = tl.sum(tl.where(cols[None, :] == target[:, None], r, 0.0), axis=1)
            tl.store(target_ptrs, picked * unit, mask=here & stored)
        m, s, ent, sq, arg, e, ref = _fold(m, s, ent, sq, arg, r, cols, unit * LOG2_E, ENTROPY, TOP1, SUM_SQ)
        if keep is not None:
            factor = tl.exp2(tl.minimum(ref * (unit * LOG2_E) - reference2, KEPT_REACH * LOG2_E))
            kept = (e * factor[:, None]).to(tl.bfloat16)
            if row is not None:
                keep.store([row, first], kept)  # what lies outside is not written
            else:
                tl.store(keep[:, None] + cols[None, :], kept, mask=stored[:, None] & (cols < vocab)[None, :])
    return m, s, ent, sq, sz, arg


@triton.jit
def _raw(acc, cols, vocab, bias_ptr, stride_b, in_scale, SOFTCAP: tl.constexpr, SCALE_FIRST: tl.constexpr):
    r = acc
    if bias_ptr is not None:
        safe = tl.minimum(cols, vocab - 1).to(tl.int64)
        r = r + tl.load(bias_ptr + safe * stride_b).to(tl.float32)[None, :]
    if SOFTCAP:
        r, _ = tanh_and_slope(r * in_scale)
    elif SCALE_FIRST:
        r = r * in_scale
    return r


@triton.jit
def _fold(m, s, ent, sq, arg, r, cols, unit2, ENTROPY: tl.constexpr, TOP1: tl.constexpr, SUM_SQ: tl.constexpr):
    best = tl.max(r, axis=1)
    if TOP1:
        where = tl.min(tl.where(r == best[:, None], cols[None, :], INT32_MAX), axis=1)
        arg = tl.where(best > m, where, arg)  # the earlier one wins a tie
    top = tl.maximum(m, best)
    ref = tl.where(top == NEG_INF, 0.0, top)  # a row of -inf: exp(-inf − 0) = 0 instead of NaN
    d = r - ref[:, None]
    e = tl.exp2(d * unit2)
    a = tl.exp2((m - ref) * unit2)
    if ENTROPY:
        # Σ e^(z−top)(r−top) = e^(m−top)·(Σ e^(z−m)(r−m) + (m−top)·Σ e^(z−m)); without columns yet m = −inf and s = 0
        shift = tl.where(m == NEG_INF, 0.0, m - ref)
        ent = (ent + shift * s) * a + tl.sum(e * tl.maximum(d, -3.0e38), axis=1)  # 0·log 0 = 0, 0·(−inf) is NaN
    if SUM_SQ:
        sq = sq * a * a + tl.sum(e * e, axis=1)
    s = s * a + tl.sum(e, axis=1)
    return top, s, ent, sq, arg, e, ref


@triton.jit
def store_partial(
    m, s, ent, sq, sz, arg, values_ptrs, argmax_ptrs, n, stored,
    ENTROPY: tl.constexpr, TOP1: tl.constexpr, SUM_SQ: tl.constexpr, SUM_Z: tl.constexpr,
):  # fmt: skip
    """A split's sums, one row of n after the other: m, s, and those of ent, sq, sz that are asked for."""
    tl.store(values_ptrs, m, mask=stored)
    values_ptrs += n
    tl.store(values_ptrs, s, mask=stored)
    if ENTROPY:
        values_ptrs += n
        tl.store(values_ptrs, ent, mask=stored)
    if SUM_SQ:
        values_ptrs += n
        tl.store(values_ptrs, sq, mask=stored)
    if SUM_Z:
        values_ptrs += n
        tl.store(values_ptrs, sz, mask=stored)
    if TOP1:
        tl.store(argmax_ptrs, arg, mask=stored)


@triton.jit(do_not_specialize=["n", "stride_v", "num_splits"])
def _merge_splits_kernel(
    partial_values_ptr, partial_argmax_ptr, values_ptr, argmax_ptr, n, stride_v, num_splits, unit: tl.float32,
    ENTROPY: tl.constexpr, TOP1: tl.constexpr, SUM_SQ: tl.constexpr, SUM_Z: tl.constexpr, STATE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The splits of BLOCK rows, SPLITS at a time in ascending order, into the rows' state; z_y is there already."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    stored = rows < n
    unit2 = unit * LOG2_E
    pitch = tl.cast(n, tl.int64)
    m, s, ent, sq, sz, arg = start_state(BLOCK)
    for first in range(0, num_splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        given = (split < num_splits)[:, None] & stored[None, :]
        ptrs = partial_values_ptr + split.to(tl.int64)[:, None] * (STATE_ROWS * pitch) + rows[None, :]
        m2 = tl.load(ptrs, mask=given, other=NEG_INF)
        ptrs += pitch
        s2 = tl.load(ptrs, mask=given, other=0.0)
        best = tl.max(m2, axis=0)
        if TOP1:
            argmax_ptrs = partial_argmax_ptr + split.to(tl.int64)[:, None] * pitch + rows[None, :]
            arg2 = tl.load(argmax_ptrs, mask=given, other=0)
            where = tl.min(tl.where(m2 == best[None, :], arg2, INT32_MAX), axis=0)
            arg = tl.where(best > m, where, arg)
        top = tl.maximum(m, best)
        ref = tl.where(top == NEG_INF, 0.0, top)
        d = m2 - ref[None, :]
        b = tl.exp2(d * unit2)
        a = tl.exp2((m - ref) * unit2)
        if ENTROPY:
            ptrs += pitch
            ent2 = tl.load(ptrs, mask=given, other=0.0) + tl.where(m2 == NEG_INF, 0.0, d) * s2
            shift = tl.where(m == NEG_INF, 0.0, m - ref)
            ent = (ent + shift * s) * a + tl.sum(ent2 * b, axis=0)
        if SUM_SQ:
            ptrs += pitch
            sq = sq * a * a + tl.sum(tl.load(ptrs, mask=given, other=0.0) * b * b, axis=0)
        if SUM_Z:
            ptrs += pitch
            sz += tl.sum(tl.load(ptrs, mask=given, other=0.0), axis=0)
        s = s * a + tl.sum(s2 * b, axis=0)
        m = top
    pitch = tl.cast(stride_v, tl.int64)
    tl.store(values_ptr + rows, m * unit, mask=stored)
    tl.store(values_ptr + pitch + rows, s, mask=stored)
    if ENTROPY:
        tl.store(values_ptr + 3 * pitch + rows, ent * unit, mask=stored)
    if SUM_SQ:
        tl.store(values_ptr + 4 * pitch + rows, sq, mask=stored)
    if SUM_Z:
        tl.store(values_ptr + 5 * pitch + rows, sz * unit, mask=stored)
    if TOP1:
        tl.store(argmax_ptr + rows, arg.to(tl.int64), mask=stored)
