"""The head's forward in one kernel: hidden @ weightᵀ in GEMM tiles, reduced as they come. No logits reach memory.

For each scored row the kernel produces the running state of `fastalign.ops.rows` over the whole vocabulary: max z, Σ
exp(z − max), z_y and, where asked for, the sums behind the entropy, Σ p², the mean logit, and the first argmax.
Scores without gradients (reference log-probs, rollouts, evaluation) need nothing else.

Work for N rows, hidden size H, vocabulary V, 16-bit inputs; in brackets N, H, V = 8192, 4096, 131072 on an H200:

    FLOP      2·N·H·V on tensor cores (8.8e12: 11.1 ms at 790 TFLOP/s)
    epilogue  one exponential a logit: 2048 clocks of a 128 × 256 tile at 16 a clock, and 1300 clocks for its 5
              instructions a logit, side by side; the tile's product takes 16·H clocks (65536). Plus about 1500 clocks
              until a tile's first operands have arrived. So 0.95 of the product's own speed at H = 4096, 0.90 at 2048
    bytes     weight once for every group_n·block_n = 2048 rows (4 × 1.07 GB), hidden once (0.07 GB): 1 ms at 4.3 TB/s,
              under the matrix work; a logits tile in memory would add 2 × 4 B a logit (8.6 GB)
    memory    8 B · N · ⌈V/split_v⌉ of partial results (8.4 MB), 4 B more for each of entropy, Σ p², mean z and top-1;
              2·H B for each of 16 MB worth of picked rows where tensor descriptors need them side by side

So the floor is the GEMM. With up to block_n rows it is the reading of the weight (0.25 ms): ⌈V/split_v⌉ = 128 units of
work on as many multiprocessors.

A unit of work is block_n rows and one split of the vocabulary, walked tile by tile. A second kernel merges the splits
in ascending order. Tile sizes depend on architecture, dtype and alignment alone, so a row's result depends neither on
how many rows there are nor on which, nor on who computes it: the kernel is deterministic and batch-invariant. Both dot
operands come from memory, never from a transposed or converted accumulator.

`_fused_persistent` serves 16-bit inputs on sm_90 and sm_10x whose rows a tensor descriptor can describe (contiguous,
aligned to 16 bytes); `_fused_pointers` everything else.

Triton's interpreter would multiply the bit patterns of bfloat16: there, and only there, WIDEN makes them float32 first.
"""

from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._fold import _merge_splits_kernel
from ._fused_persistent import _fused_persistent_kernel
from ._fused_pointers import _fused_forward_kernel
from ._tiles import FusedTiles, fused_tiles

MERGE = {"BLOCK": 32, "SPLITS": 32}  # rows a program of the merging kernel takes, splits it loads at once
GATHER_BYTES = 2**24


def launch_options(tiles: FusedTiles) -> tuple[dict[str, int], dict[str, int | bool]]:
    """A main kernel's tile sizes as its compile-time constants, and the compiler's options."""
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
    programs: int = 132,  # how many multiprocessors there are; no result depends on it
    tiles: FusedTiles | None = None,  # overrides the choice for `arch`
    keep: Tensor | None = None,  # (n, V) bfloat16, column stride 1, gets exp(z − reference): `fused_exponentials`
    reference: Tensor | None = None,  # (n,) float32, with keep
) -> tuple[Tensor, Tensor]:
    """State of each scored row over the whole vocabulary.

    Returns:
        values (6, n) float32: MAX, SUM, TARGET, ENT, SUM_SQ, SUM_Z, the last three 0 unless asked for;
        argmax (n,) int64, or (0,) without top1.

    Raises:
        ValueError: tiles.persistent for operands that no tensor descriptor can describe; columns so far apart that a
            step along H overflows 32 bits.
    """
    n = targets.shape[0]
    values = torch.zeros(6, n, dtype=torch.float32, device=hidden.device)
    argmax = torch.zeros(n if top1 else 0, dtype=torch.int64, device=hidden.device)
    if n == 0:
        return values, argmax
    if tiles is None:
        tiles = fused_tiles(arch, hidden.dtype, aligned=describable(hidden) and describable(weight))
        if not tiles.persistent and not (_provable(hidden) and _provable(weight)):
            tiles = fused_tiles(arch, hidden.dtype, aligned=False)
    if keep is not None:
        tiles = keeping(tiles)
    for name, matrix in (("hidden", hidden), ("weight", weight)):
        if 2**31 <= matrix.stride(1) * tiles.block_h < 2**31 * tiles.block_h:  # from 2^31 on a stride is 64 bits itself
            raise ValueError(f"{name} has its columns {matrix.stride(1)} elements apart: give {name}.contiguous()")
    flags = {"SOFTCAP": softcap, "ENTROPY": entropy, "TOP1": top1, "SUM_SQ": sum_sq, "SUM_Z": sum_z}
    scales = float(in_scale), float(out_scale)
    step = n
    if tiles.persistent and rows is not None:
        wave = tiles.group_n * tiles.block_n
        step = max(1, GATHER_BYTES // (wave * hidden.shape[1] * hidden.element_size())) * wave
    for first in range(0, n, step):
        part = slice(first, first + step)
        picked = None if rows is None else rows[part].contiguous()
        if tiles.persistent and picked is not None:
            given, picked = _side_by_side(hidden, picked), None
        else:
            given = hidden
        outputs = values[:, part], argmax[part] if top1 else None
        kept = None if keep is None or reference is None else (keep[part], reference[part])
        _fuse(given, weight, bias, targets[part].contiguous(), picked, *outputs, scales, flags, tiles, programs, kept)
    return values, argmax


def _side_by_side(hidden: Tensor, rows: Tensor) -> Tensor:
    """Picked rows, each on 16 bytes."""
    hidden_size, width = hidden.shape[1], 16 // hidden.element_size()
    given = hidden.new_empty(len(rows), -(-hidden_size // width) * width)[:, :hidden_size]
    return torch.index_select(hidden.detach(), 0, rows, out=given)


def keeping(tiles: FusedTiles) -> FusedTiles:
    """Tiles of a launch that keeps exponentials: where pointers to them take registers, smaller pieces, whose sums are
    added in another order. Through a descriptor, results are those of a launch that keeps nothing."""
    return tiles if tiles.persistent or tiles.parts == 1 else replace(tiles, parts=2 * tiles.parts)


def _provable(matrix: Tensor) -> bool:
    """Whether Triton can see that pointer loads may be copied to shared memory 16 bytes at a time."""
    return describable(matrix) and matrix.stride(0) % 16 == 0 and matrix.shape[1] % 16 == 0


def describable(matrix: Tensor) -> bool:
    """Whether rows are contiguous and start on 16 bytes, which tensor descriptors and asynchronous copies need."""
    bytes_a_row = matrix.stride(0) * matrix.element_size()
    return matrix.stride(1) == 1 and bytes_a_row % 16 == 0 and matrix.data_ptr() % 16 == 0 and matrix.numel() > 0


def _fuse(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None, values: Tensor,
    argmax: Tensor | None, scales: tuple[float, float], flags: dict[str, bool], tiles: FusedTiles, programs: int,
    keep: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """One launch for each of the two kernels; values (6, n) has any row stride.

    keep: exp(z − reference) goes to the first, (n, V) bfloat16 with a column stride of 1; the reference is the second.
    """
    n, (vocab, hidden_size) = targets.shape[0], weight.shape
    in_scale, out_scale = scales
    scale_first = not flags["SOFTCAP"] and in_scale <= 0
    unit = out_scale if flags["SOFTCAP"] else 1.0 if scale_first else in_scale
    num_splits = triton.cdiv(vocab, tiles.split_v)
    work = triton.cdiv(n, tiles.block_n) * num_splits
    state_rows = 2 + flags["ENTROPY"] + flags["SUM_SQ"] + flags["SUM_Z"]
    outputs = {name: on for name, on in flags.items() if name != "SOFTCAP"} | {"STATE_ROWS": state_rows}
    partial_values = torch.empty(num_splits, state_rows, n, dtype=torch.float32, device=hidden.device)
    partial_argmax = None
    if argmax is not None:
        partial_argmax = torch.empty(num_splits, n, dtype=torch.int32, device=hidden.device)
    sizes, options = launch_options(tiles)
    common: dict[str, Any] = {
        "SOFTCAP": flags["SOFTCAP"], "SCALE_FIRST": scale_first,
        "WIDEN": not isinstance(_fused_forward_kernel, triton.JITFunction), **outputs, **sizes, **options,
    }  # fmt: skip
    stride_b = 0 if bias is None else bias.stride(0)
    kept, reference = (None, None) if keep is None else keep
    stride_k = 0 if kept is None else kept.stride(0)
    with torch.cuda.device_of(hidden):
        if tiles.persistent:
            _fused_persistent_kernel[(min(work, programs),)](
                _descriptor(hidden, tiles.block_n, tiles.block_h), _descriptor(weight, tiles.block_v, tiles.block_h),
                bias, targets, partial_values, partial_argmax, values,
                None if kept is None else _descriptor(kept, tiles.block_n, tiles.block_v // tiles.parts), reference,
                n, values.stride(0), hidden_size, vocab, num_splits, stride_b, in_scale, unit, **common,
            )  # fmt: skip
        else:
            _fused_forward_kernel[(work,)](
                hidden, weight, bias, targets, rows, partial_values, partial_argmax, values, kept, reference,
                n, values.stride(0), hidden_size, vocab, num_splits, *hidden.stride(), *weight.stride(), stride_b,
                stride_k, in_scale, unit, EVEN_H=hidden_size % tiles.block_h == 0, **common,
            )  # fmt: skip
        _merge_splits_kernel[(triton.cdiv(n, MERGE["BLOCK"]),)](
            partial_values, partial_argmax, values, argmax, n, values.stride(0), num_splits, unit,
            **outputs, **MERGE, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def _descriptor(matrix: Tensor, *block: int) -> TensorDescriptor:
    if not describable(matrix):
        raise ValueError(
            f"persistent tiles need contiguous rows that start on 16 bytes, got {matrix.dtype} {tuple(matrix.shape)} "
            f"with strides {matrix.stride()} at address {matrix.data_ptr():#x}"
        )
    return TensorDescriptor.from_tensor(matrix, list(block))
