"""The fused forward that leaves exp(z − reference) behind, in 16 bits: what the backward needs of the logits.

A row's reference is its maximum over the first SAMPLE columns, one tile's worth of work ahead of the kernel proper, for
which the maximum over the vocabulary is not known before it is too late. bfloat16 has the range of float32, so any
reference serves that lies not too far below the maximum: KEPT_REACH, 60 nats. The maximum of 256 logits is nearly
always nearer than that; a row where it is not is done again by `_redo_exponentials_kernel`, relative to its maximum,
and costs one reading of the weight. Nobody waits to learn whether there is one.

The rest is `fused_forward`: its two kernels, its tiles, its result. Beside them this moves

    2 B a logit written              2.1 GB for 8192 × 131072, 0.5 ms at 4.3 TB/s, under the matrix work
    8 B a row read by every program  of `_redo_exponentials_kernel`, to find nothing
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._fold import KEPT_REACH, LOG2_E
from ._online import logits
from .fused_forward import fused_logps_fwd

SAMPLE = 256
REDO = {"ROWS": 1024, "COLUMNS": 32, "BLOCK_H": 64}


@triton.jit(do_not_specialize=["n"])
def _redo_exponentials_kernel(
    hidden_ptr, weight_ptr, bias_ptr, rows_ptr, max_ptr, reference_ptr, keep_ptr, n, hidden_size, vocab,
    stride_hn, stride_hh, stride_wv, stride_wh, stride_b, stride_k, in_scale: tl.float32, out_scale: tl.float32,
    SOFTCAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """exp(z − max) of the rows whose maximum is out of reach, a share of the columns for each program."""
    offs_h = tl.arange(0, BLOCK_H)
    for first in range(0, n, ROWS):
        numbers = first + tl.arange(0, ROWS)
        best = tl.load(max_ptr + numbers, mask=numbers < n, other=0.0)
        reference = tl.load(reference_ptr + numbers, mask=numbers < n, other=0.0)
        far = (best - reference > KEPT_REACH).to(tl.int32)
        while tl.max(far, axis=0) > 0:
            row = tl.argmax(far, axis=0)  # the first of them
            far = tl.where(tl.arange(0, ROWS) == row, 0, far)
            row += first
            row_max = tl.load(max_ptr + row)
            place = row.to(tl.int64)
            if rows_ptr is not None:
                place = tl.load(rows_ptr + row)
            for start in range(tl.program_id(0) * COLUMNS, vocab, tl.num_programs(0) * COLUMNS):
                cols = start + tl.arange(0, COLUMNS)
                here = cols < vocab
                weight_rows = weight_ptr + cols.to(tl.int64)[:, None] * stride_wv
                acc = tl.zeros([COLUMNS], tl.float32)
                for h in range(0, hidden_size, BLOCK_H):
                    inside = offs_h < hidden_size - h
                    at = (h + offs_h).to(tl.int64)
                    a = tl.load(hidden_ptr + place * stride_hn + at * stride_hh, mask=inside, other=0.0)
                    b = tl.load(weight_rows + at[None, :] * stride_wh, mask=here[:, None] & inside[None, :],
                                other=0.0)  # fmt: skip
                    acc += tl.sum(a.to(tl.float32)[None, :] * b.to(tl.float32), axis=1)
                bias = None
                if bias_ptr is not None:
                    bias = tl.load(bias_ptr + cols.to(tl.int64) * stride_b, mask=here, other=0.0).to(tl.float32)
                z = logits(acc, bias, in_scale, out_scale, SOFTCAP)
                kept = tl.exp2((z - row_max) * LOG2_E).to(tl.bfloat16)
                tl.store(keep_ptr + row.to(tl.int64) * stride_k + cols, kept, mask=here)


def fused_exponentials_fwd(
    hidden: Tensor,  # (N, H) bfloat16, any strides
    weight: Tensor,  # (V, H) bfloat16, any strides
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (n,) int64
    rows: Tensor | None,  # (n,) int64, the rows of hidden that are scored; None: all N, then n = N
    out: Tensor,  # (n, V) bfloat16, column stride 1; exp(z − reference)
    in_scale: float = 1.0,
    out_scale: float = 1.0,
    softcap: bool = False,
    entropy: bool = False,
    top1: bool = False,
    sum_sq: bool = False,
    sum_z: bool = False,
    *,
    arch: str,
    programs: int = 132,
) -> tuple[Tensor, Tensor, Tensor]:
    """State of each scored row over the whole vocabulary as `fused_logps_fwd` gives it, and the reference of its
    exponentials.

    Returns:
        values (6, n) float32; argmax (n,) int64, or (0,) without top1; reference (n,) float32, at most KEPT_REACH
        below the row's maximum.
    """
    scales = float(in_scale), float(out_scale)
    first = slice(0, SAMPLE)
    sample = hidden, weight[first], None if bias is None else bias[first], targets, rows
    sampled, _ = fused_logps_fwd(*sample, *scales, softcap, arch=arch, programs=programs)
    reference = sampled[0].clamp_(min=-1e38)  # a sample of −inf is out of every logit's reach
    values, argmax = fused_logps_fwd(
        hidden, weight, bias, targets, rows, *scales, softcap, entropy, top1, sum_sq, sum_z, arch=arch,
        programs=programs, keep=out, reference=reference,
    )  # fmt: skip
    best, n = values[0], targets.shape[0]
    if n:
        with torch.cuda.device_of(hidden):
            _redo_exponentials_kernel[(programs,)](
                hidden, weight, bias, None if rows is None else rows.contiguous(), best, reference, out, n,
                weight.shape[1], weight.shape[0], *hidden.stride(), *weight.stride(),
                0 if bias is None else bias.stride(0), out.stride(0), *scales,
                SOFTCAP=softcap, **REDO, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return values, argmax, torch.where(best - reference > KEPT_REACH.value, best, reference)
