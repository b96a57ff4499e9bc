"""The fused forward for any strides and any architecture: pointer loads, a program for each row block and split."""

import triton
import triton.language as tl

from ._fold import LOG2_E, fold_tile, start_state, store_partial


@triton.jit
def block_and_split(unit, n, num_splits, BLOCK_N: tl.constexpr, GROUP_N: tl.constexpr):
    """Unit of work -> (row block, split). Units in flight form a patch of GROUP_N row blocks and as many splits as fit
    beside them, which share hidden rows and weight tiles in L2.
    """
    group = unit // (GROUP_N * num_splits)
    blocks = tl.minimum(tl.cdiv(n, BLOCK_N) - group * GROUP_N, GROUP_N)
    within = unit % (GROUP_N * num_splits)
    return group * GROUP_N + within % blocks, within // blocks


@triton.jit(do_not_specialize=["n", "stride_v", "num_splits", "stride_k"])
def _fused_forward_kernel(
    hidden_ptr, weight_ptr, bias_ptr, targets_ptr, rows_ptr, partial_values_ptr, partial_argmax_ptr, values_ptr,
    keep_ptr, reference_ptr, n, stride_v, hidden_size, vocab, num_splits, stride_hn, stride_hh, stride_wv, stride_wh,
    stride_b, stride_k, in_scale: tl.float32, unit: tl.float32,
    SOFTCAP: tl.constexpr, SCALE_FIRST: tl.constexpr, ENTROPY: tl.constexpr, TOP1: tl.constexpr, SUM_SQ: tl.constexpr,
    SUM_Z: tl.constexpr, STATE_ROWS: tl.constexpr, EVEN_H: tl.constexpr, WIDEN: tl.constexpr,
    SPLIT_V: tl.constexpr, GROUP_N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    block, split = block_and_split(tl.program_id(0), n, num_splits, BLOCK_N, GROUP_N)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_h = tl.arange(0, BLOCK_H)
    stored = offs_n < n
    safe_n = tl.minimum(offs_n, n - 1).to(tl.int64)
    target = tl.load(targets_ptr + safe_n).to(tl.int32)
    if rows_ptr is not None:
        safe_n = tl.load(rows_ptr + safe_n)
    hidden_rows = hidden_ptr + safe_n[:, None] * stride_hn
    target_ptrs = values_ptr + 2 * tl.cast(stride_v, tl.int64) + offs_n
    keep_ptrs, reference2 = None, None
    if keep_ptr is not None:
        keep_ptrs = keep_ptr + offs_n.to(tl.int64) * stride_k
        reference2 = tl.load(reference_ptr + tl.minimum(offs_n, n - 1)) * LOG2_E

    m, s, ent, sq, sz, arg = start_state(BLOCK_N)
    for start in range(split * SPLIT_V, tl.minimum((split + 1) * SPLIT_V, vocab), BLOCK_V):
        safe_v = tl.minimum(start + tl.arange(0, BLOCK_V), vocab - 1).to(tl.int64)
        hidden_ptrs = hidden_rows + offs_h[None, :] * stride_hh
        weight_ptrs = weight_ptr + safe_v[None, :] * stride_wv + offs_h[:, None] * stride_wh
        acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for h in range(0, hidden_size, BLOCK_H):
            if EVEN_H:
                a = tl.load(hidden_ptrs)
                b = tl.load(weight_ptrs)
            else:
                a = tl.load(hidden_ptrs, mask=offs_h[None, :] < hidden_size - h, other=0.0)
                b = tl.load(weight_ptrs, mask=offs_h[:, None] < hidden_size - h, other=0.0)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision="ieee")
            hidden_ptrs += BLOCK_H * stride_hh
            weight_ptrs += BLOCK_H * stride_wh
        m, s, ent, sq, sz, arg = fold_tile(
            m, s, ent, sq, sz, arg, acc, start, vocab, target, target_ptrs, stored, bias_ptr, stride_b, in_scale, unit,
            keep_ptrs, None, reference2, SOFTCAP, SCALE_FIRST, ENTROPY, TOP1, SUM_SQ, SUM_Z, PARTS,
        )  # fmt: skip

    pitch = tl.cast(n, tl.int64)
    partials = partial_values_ptr + split.to(tl.int64) * (STATE_ROWS * pitch) + offs_n
    argmaxes = partial_argmax_ptr
    if TOP1:
        argmaxes = partial_argmax_ptr + split.to(tl.int64) * pitch + offs_n
    store_partial(m, s, ent, sq, sz, arg, partials, argmaxes, pitch, stored, ENTROPY, TOP1, SUM_SQ, SUM_Z)
