"""The head's forward in one kernel: hidden @ weightᵀ in GEMM tiles, reduced as they come. No logits reach memory.

For each scored row the kernel produces the running state of `fastalign.ops.rows` over the whole vocabulary: max z, Σ
exp(z − max), z_y and, where asked for, the sums behind the entropy, Σ p², the mean logit, and the first argmax.
Scores without gradients (reference log-probs, rollouts, evaluation) need nothing else.

Work for N rows, hidden size H, vocabulary V, 16-bit inputs; in brackets N, H, V = 8192, 4096, 131072 on an H200:

    FLOP      2·N·H·V on tensor cores (8.8e12: 11.1 ms at 790 TFLOP/s); about 12 FLOP + 1 exp a logit between the tiles
              (1.1e9 exp, by instruction count 6 to 9 % of a tile's matrix work at H = 4096, and not overlapped with it)
    bytes     weight once for every group_n·block_n = 2048 rows (4 × 1.07 GB), hidden once (0.07 GB): 1 ms at 4.3 TB/s,
              under the matrix work; a logits tile in memory would add 2 × 4 B a logit (8.6 GB)
    memory    12 B · N · ⌈V/split_v⌉ of partial results (6.3 MB); 24 B with entropy, Σ p² or mean z, + 4 B with top-1

So the floor is the GEMM. With up to block_n rows it is the reading of the weight (0.25 ms), which ⌈V/split_v⌉
programs, 64 here, are too few to reach: tiles that looked at N would give a row different bits in different company.

A program owns block_n rows and one split of the vocabulary and walks the split tile by tile. A second kernel merges
the splits in ascending order. Tile sizes depend on architecture, dtype and alignment alone, so a row's result depends
neither on how many rows there are nor on which: the kernel is deterministic and batch-invariant. Rows and columns
past the end read the last one instead of being masked in the main loop; such rows are not stored, such columns become
−inf before anything is reduced. Loads are plain pointer loads (no TMA descriptors), hence any strides and any
architecture; H not a multiple of block_h costs a mask, and rows that are not 16-byte aligned cost the asynchronous
copies. Both dot operands come from memory, never from a transposed or converted accumulator.

Triton's interpreter would multiply the bit patterns of bfloat16: there, and only there, WIDEN makes them float32 first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._online import NEG_INF, logits, merge, reduce_block
from ._tiles import FusedTiles, fused_tiles

MERGE_BLOCK = 128  # rows a program of the second kernel merges


@triton.jit
def _fold_tile(
    m, s, z_y, ent, sq, sz, arg, acc, first, target, vocab, bias_ptr, stride_b, in_scale, out_scale,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, TOP1: tl.constexpr, SUM_SQ: tl.constexpr, SUM_Z: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Fold head outputs acc (R, C) (columns from `first` on) into the rows' state; PARTS pieces, left to right."""
    if PARTS > 1:
        # One piece at a time keeps the temporaries of the others out of the registers that the accumulator leaves.
        HALF: tl.constexpr = acc.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, [acc.shape[0], 2, HALF]), [0, 2, 1]))
        m, s, z_y, ent, sq, sz, arg = _fold_tile(
            m, s, z_y, ent, sq, sz, arg, left, first, target, vocab, bias_ptr, stride_b, in_scale, out_scale,
            SOFTCAP, ENTROPY, TOP1, SUM_SQ, SUM_Z, PARTS // 2,
        )  # fmt: skip
        m, s, z_y, ent, sq, sz, arg = _fold_tile(
            m, s, z_y, ent, sq, sz, arg, right, first + HALF, target, vocab, bias_ptr, stride_b, in_scale, out_scale,
            SOFTCAP, ENTROPY, TOP1, SUM_SQ, SUM_Z, PARTS // 2,
        )  # fmt: skip
    else:
        cols = first + tl.arange(0, acc.shape[1])
        bias = None
        if bias_ptr is not None:
            safe_v = tl.minimum(cols, vocab - 1).to(tl.int64)
            bias = tl.load(bias_ptr + safe_v * stride_b).to(tl.float32)[None, :]
        z = logits(acc, bias, in_scale, out_scale, SOFTCAP)
        is_target = (cols[None, :] == target[:, None]) & (cols < vocab)[None, :]
        z_y += tl.sum(tl.where(is_target, z, 0.0), axis=1)
        m2, s2, ent2, sq2, sz2, arg2 = reduce_block(z, cols[None, :], vocab, ENTROPY, TOP1, SUM_SQ, SUM_Z)
        m, s, ent, sq, sz, arg = merge(
            m, s, ent, sq, sz, arg, m2, s2, ent2, sq2, sz2, arg2, ENTROPY, TOP1, SUM_SQ, SUM_Z
        )
    return m, s, z_y, ent, sq, sz, arg


@triton.jit
def _fused_forward_kernel(
    hidden_ptr, weight_ptr, bias_ptr, targets_ptr, rows_ptr, values_ptr, argmax_ptr,
    n, hidden_size, vocab, stride_hn, stride_hh, stride_wv, stride_wh, stride_b,
    in_scale: tl.float32, out_scale: tl.float32,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, TOP1: tl.constexpr, SUM_SQ: tl.constexpr, SUM_Z: tl.constexpr,
    EVEN_H: tl.constexpr, WIDEN: tl.constexpr, STATE_ROWS: tl.constexpr, SPLIT_V: tl.constexpr, GROUP_N: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # Programs in flight form a patch of GROUP_N row blocks and as many splits as fit beside them.
    pid = tl.program_id(0)
    num_splits = tl.cdiv(vocab, SPLIT_V)
    group = pid // (GROUP_N * num_splits)
    blocks_in_group = tl.minimum(tl.cdiv(n, BLOCK_N) - group * GROUP_N, GROUP_N)
    within = pid % (GROUP_N * num_splits)
    pid_n = group * GROUP_N + within % blocks_in_group
    split = within // blocks_in_group

    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_h = tl.arange(0, BLOCK_H)
    safe_n = tl.minimum(offs_n, n - 1).to(tl.int64)
    target = tl.load(targets_ptr + safe_n).to(tl.int32)
    if rows_ptr is not None:
        safe_n = tl.load(rows_ptr + safe_n)
    hidden_rows = hidden_ptr + safe_n[:, None] * stride_hn

    m = tl.full([BLOCK_N], NEG_INF, tl.float32)
    s = tl.zeros([BLOCK_N], tl.float32)
    z_y, ent, sq, sz = s, s, s, s
    arg = tl.zeros([BLOCK_N], tl.int32)

    end = tl.minimum((split + 1) * SPLIT_V, vocab)
    for start in range(split * SPLIT_V, end, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        safe_v = tl.minimum(cols, vocab - 1).to(tl.int64)
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

        m, s, z_y, ent, sq, sz, arg = _fold_tile(
            m, s, z_y, ent, sq, sz, arg, acc, start, target, vocab, bias_ptr, stride_b, in_scale, out_scale,
            SOFTCAP, ENTROPY, TOP1, SUM_SQ, SUM_Z, PARTS,
        )  # fmt: skip

    stored = offs_n < n
    values_ptrs = values_ptr + split.to(tl.int64) * STATE_ROWS * n + offs_n
    tl.store(values_ptrs, m, mask=stored)
    tl.store(values_ptrs + n, s, mask=stored)
    tl.store(values_ptrs + 2 * n, z_y, mask=stored)
    if ENTROPY:
        tl.store(values_ptrs + 3 * n, ent, mask=stored)
    if SUM_SQ:
        tl.store(values_ptrs + 4 * n, sq, mask=stored)
    if SUM_Z:
        tl.store(values_ptrs + 5 * n, sz, mask=stored)
    if TOP1:
        tl.store(argmax_ptr + split.to(tl.int64) * n + offs_n, arg, mask=stored)


@triton.jit
def _merge_splits_kernel(
    partial_values_ptr, partial_argmax_ptr, values_ptr, argmax_ptr, n, num_splits,
    ENTROPY: tl.constexpr, TOP1: tl.constexpr, SUM_SQ: tl.constexpr, SUM_Z: tl.constexpr,
    STATE_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    stored = rows < n
    m = tl.full([BLOCK], NEG_INF, tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    z_y, ent, sq, sz = s, s, s, s
    arg = tl.zeros([BLOCK], tl.int32)
    for split in range(0, num_splits):
        ptrs = partial_values_ptr + tl.cast(split, tl.int64) * STATE_ROWS * n + rows
        m2 = tl.load(ptrs, mask=stored, other=NEG_INF)
        s2 = tl.load(ptrs + n, mask=stored, other=0.0)
        z_y += tl.load(ptrs + 2 * n, mask=stored, other=0.0)  # 0 in every split but the target's
        ent2, sq2, sz2, arg2 = s2, s2, s2, arg
        if ENTROPY:
            ent2 = tl.load(ptrs + 3 * n, mask=stored, other=0.0)
        if SUM_SQ:
            sq2 = tl.load(ptrs + 4 * n, mask=stored, other=0.0)
        if SUM_Z:
            sz2 = tl.load(ptrs + 5 * n, mask=stored, other=0.0)
        if TOP1:
            arg2 = tl.load(partial_argmax_ptr + tl.cast(split, tl.int64) * n + rows, mask=stored, other=0)
        m, s, ent, sq, sz, arg = merge(
            m, s, ent, sq, sz, arg, m2, s2, ent2, sq2, sz2, arg2, ENTROPY, TOP1, SUM_SQ, SUM_Z
        )
    values_ptrs = values_ptr + rows
    tl.store(values_ptrs, m, mask=stored)
    tl.store(values_ptrs + n, s, mask=stored)
    tl.store(values_ptrs + 2 * n, z_y, mask=stored)
    if ENTROPY:
        tl.store(values_ptrs + 3 * n, ent, mask=stored)
    if SUM_SQ:
        tl.store(values_ptrs + 4 * n, sq, mask=stored)
    if SUM_Z:
        tl.store(values_ptrs + 5 * n, sz, mask=stored)
    if TOP1:
        tl.store(argmax_ptr + rows, arg.to(tl.int64), mask=stored)


def launch_options(tiles: FusedTiles) -> tuple[dict[str, int], dict[str, int | bool]]:
    """The main kernel's tile sizes as its compile-time constants, and the compiler's options."""
    sizes = {
        "SPLIT_V": tiles.split_v,
        "GROUP_N": tiles.group_n,
        "BLOCK_N": tiles.block_n,
        "BLOCK_V": tiles.block_v,
        "BLOCK_H": tiles.block_h,
        "PARTS": tiles.parts,
    }
    return sizes, {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "enable_fp_fusion": False}


def fused_logps_fwd(
    hidden: Tensor,  # (N, H) float32, bfloat16 or float16, any strides
    weight: Tensor,  # (V, H) of hidden's dtype, any strides
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (n,) int64, valid column indices
    rows: Tensor | None,  # (n,) int64, the rows of hidden that are scored, in targets' order; None: all N, then n = N
    in_scale: float = 1.0,
    out_scale: float = 1.0,
    softcap: bool = False,
    entropy: bool = False,
    top1: bool = False,
    sum_sq: bool = False,
    sum_z: bool = False,
    *,
    arch: str,  # "sm_90", "gfx942", …: which tiles to take
    tiles: FusedTiles | None = None,  # overrides the choice for `arch`
) -> tuple[Tensor, Tensor]:
    """State of each scored row over the whole vocabulary.

    Returns:
        values (6, n) float32: MAX, SUM, TARGET, ENT, SUM_SQ, SUM_Z, the last three 0 unless asked for;
        argmax (n,) int64, or (0,) without top1.
    """
    n, (vocab, hidden_size) = targets.shape[0], weight.shape
    values = torch.zeros(6, n, dtype=torch.float32, device=hidden.device)
    argmax = torch.zeros(n if top1 else 0, dtype=torch.int64, device=hidden.device)
    if n == 0:
        return values, argmax
    if tiles is None:
        tiles = fused_tiles(arch, hidden.dtype, aligned=_aligned(hidden) and _aligned(weight))
    sizes, options = launch_options(tiles)
    state_rows = 6 if entropy or sum_sq or sum_z else 3
    flags = {"ENTROPY": entropy, "TOP1": top1, "SUM_SQ": sum_sq, "SUM_Z": sum_z, "STATE_ROWS": state_rows}
    num_splits = triton.cdiv(vocab, tiles.split_v)
    partial_values = torch.empty(num_splits, state_rows, n, dtype=torch.float32, device=hidden.device)
    partial_argmax = torch.empty(num_splits, n, dtype=torch.int32, device=hidden.device) if top1 else None
    interpreted = not isinstance(_fused_forward_kernel, triton.JITFunction)
    with torch.cuda.device_of(hidden):
        _fused_forward_kernel[(triton.cdiv(n, tiles.block_n) * num_splits,)](
            hidden, weight, bias, targets.contiguous(), None if rows is None else rows.contiguous(),
            partial_values, partial_argmax,
            n, hidden_size, vocab, hidden.stride(0), hidden.stride(1), weight.stride(0), weight.stride(1),
            0 if bias is None else bias.stride(0), float(in_scale), float(out_scale),
            SOFTCAP=softcap, EVEN_H=hidden_size % tiles.block_h == 0, WIDEN=interpreted, **flags, **sizes, **options,
        )  # fmt: skip
        _merge_splits_kernel[(triton.cdiv(n, MERGE_BLOCK),)](
            partial_values, partial_argmax, values, argmax if top1 else None, n, num_splits,
            **flags, BLOCK=MERGE_BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return values, argmax


def _aligned(matrix: Tensor) -> bool:
    """Whether Triton can prove that rows start on 16 bytes and are contiguous, which asynchronous copies need."""
    return (
        matrix.stride(1) == 1
        and matrix.stride(0) % 16 == 0
        and matrix.shape[1] % 16 == 0
        and matrix.data_ptr() % 16 == 0
    )
