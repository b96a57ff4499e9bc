"""The fused forward on tensor descriptors (TMA): a program for each multiprocessor walks the units of work.

On sm_90 the product of a tile runs as asynchronous wgmma over a ring of num_stages buffers that one thread fills by
bulk copies; no other thread spends a register or an instruction on an address. Rows and columns past the end, and a
hidden size that is no multiple of BLOCK_H, are filled with zeros by the copy itself.

The loops are nested, not flattened into one (`tl.range(..., flatten=True)`), though flattened the next tile's copies
would start before the epilogue and hide the 1500 clocks or so that they take to arrive. What ptxas makes of it, under
Triton 3.6 and 3.9: with a branch in the epilogue it waits for every single wgmma; without (every logit compared with
the target, every column with the vocabulary) the epilogue has 12 to 14 instructions a logit instead of 6, which takes
those 1500 clocks again. `warp_specialize=True` is not to be had for such a loop on sm_90: 3.6 and 3.9 ignore it, fail,
or compile to an empty kernel, depending on tile and number of warps.
"""

import triton
import triton.language as tl

from ._fold import LOG2_E, fold_tile, start_state, store_partial
from ._fused_pointers import block_and_split


@triton.jit(do_not_specialize=["n", "stride_v", "num_splits"])
def _fused_persistent_kernel(
    hidden_desc, weight_desc, bias_ptr, targets_ptr, partial_values_ptr, partial_argmax_ptr, values_ptr, keep_desc,
    reference_ptr,
    n, stride_v, hidden_size, vocab, num_splits, stride_b, in_scale: tl.float32, unit: tl.float32,
    SOFTCAP: tl.constexpr, SCALE_FIRST: tl.constexpr, ENTROPY: tl.constexpr, TOP1: tl.constexpr, SUM_SQ: tl.constexpr,
    SUM_Z: tl.constexpr, STATE_ROWS: tl.constexpr, WIDEN: tl.constexpr,
    SPLIT_V: tl.constexpr, GROUP_N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    pitch = tl.cast(n, tl.int64)
    for work in range(tl.program_id(0), tl.cdiv(n, BLOCK_N) * num_splits, tl.num_programs(0)):
        block, split = block_and_split(work, n, num_splits, BLOCK_N, GROUP_N)
        offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        stored = offs_n < n
        target = tl.load(targets_ptr + tl.minimum(offs_n, n - 1)).to(tl.int32)
        target_ptrs = values_ptr + 2 * tl.cast(stride_v, tl.int64) + offs_n
        reference2 = None
        if keep_desc is not None:
            reference2 = tl.load(reference_ptr + tl.minimum(offs_n, n - 1)) * LOG2_E

        m, s, ent, sq, sz, arg = start_state(BLOCK_N)
        for start in range(split * SPLIT_V, tl.minimum((split + 1) * SPLIT_V, vocab), BLOCK_V):
            acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
            for h in range(0, hidden_size, BLOCK_H):
                a = hidden_desc.load([block * BLOCK_N, h])
                b = weight_desc.load([start, h])
                if WIDEN:
                    a, b = a.to(tl.float32), b.to(tl.float32)
                acc = tl.dot(a, b.T, acc, input_precision="ieee")
            m, s, ent, sq, sz, arg = fold_tile(
                m, s, ent, sq, sz, arg, acc, start, vocab, target, target_ptrs, stored, bias_ptr, stride_b, in_scale,
                unit, keep_desc, block * BLOCK_N, reference2, SOFTCAP, SCALE_FIRST, ENTROPY, TOP1, SUM_SQ, SUM_Z, PARTS,
            )  # fmt: skip

        partials = partial_values_ptr + split.to(tl.int64) * (STATE_ROWS * pitch) + offs_n
        argmaxes = partial_argmax_ptr
        if TOP1:
            argmaxes = partial_argmax_ptr + split.to(tl.int64) * pitch + offs_n
        store_partial(m, s, ent, sq, sz, arg, partials, argmaxes, pitch, stored, ENTROPY, TOP1, SUM_SQ, SUM_Z)
