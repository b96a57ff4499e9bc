"""Statistics and gradient of rows whose upstream gradients are known beforehand, in one Triton kernel.

Where ∂L/∂logps does not depend on the log-prob (cross-entropy: −1/D) nothing has to happen between `row_stats_fwd` and
`row_grad_bwd`: a program takes the statistics of its row, makes the row's coefficients of them, and walks it again.
Formulas are those of `fastalign.ops.rows`, with a = ∂L/∂logps and e = ∂L/∂entropy:

    base = −a − e·H,    target_coef = −a·expm1(logps) − e·p_y·(logps + H)

The second walk reads L2 if all rows in flight fit there. So programs are as large as they get, one a multiprocessor for
rows of more than 32768 columns: 132 · 4 B · V on an H200, 34 MB of its 50 at V = 65536, 69 MB at 131072. For 8192 rows
at 4.3 TB/s:

    V = 65536     6 B a logit of HBM traffic (4 read, 2 written)        0.75 ms    in two kernels, 10 B: 1.25 ms
    V = 131072    6 to 10 B, by what L2 keeps                           1.5 to 2.5 ms            10 B: 2.5 ms

and 15 to 20 instructions a logit, 0.6 ms and 1.2 ms of issue slots. `csrc/cuda` holds a row in the shared memory of a
cluster instead: 6 B for any V. Either way a dozen launches on vectors of n numbers fall away.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._alias import narrow_alias
from ._online import logits, tanh_and_slope
from ._rows import output_at, row_state, write_gradient, write_zeros
from ._tiles import RowTiles
from .row_kernels import THREADS_PER_WARP, lanes


@triton.jit
def _expm1(x):
    """exp(x) − 1 for x ≤ 0, without cancellation: 2t/(1 − t) with t = tanh(x/2)."""
    t, _ = tanh_and_slope(0.5 * x)
    return 2.0 * t / (1.0 - t)


@triton.jit
def _row_loss_grad_kernel(
    tile_ptr, bias_ptr, targets_ptr, grad_logps_ptr, grad_entropy_ptr, values_ptr, argmax_ptr, out_ptr,
    n, v, stride_tn, stride_tv, stride_on, stride_ov, stride_b, in_scale: tl.float32, out_scale: tl.float32,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, TOP1: tl.constexpr, SUM_SQ: tl.constexpr,
    SUM_Z: tl.constexpr, NARROW_ALIAS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tile_ptr += row * stride_tn
    out_ptr += row * stride_on
    values_ptr += row
    m, s, ent, sq, sz, arg = row_state(
        tile_ptr, bias_ptr, v, stride_tv, stride_b, in_scale, out_scale, SCALED, SOFTCAP, ENTROPY, TOP1, SUM_SQ, SUM_Z,
        BLOCK, LANES,
    )  # fmt: skip
    y = tl.load(targets_ptr + row)
    u_y = output_at(tile_ptr, bias_ptr, y, v, stride_tv, stride_b)
    z_y = logits(u_y, None, in_scale, out_scale, SOFTCAP, SCALED)
    tl.store(values_ptr, m)
    tl.store(values_ptr + n, s)
    tl.store(values_ptr + 2 * n, z_y)
    if ENTROPY:
        tl.store(values_ptr + 3 * n, ent)
    if SUM_SQ:
        tl.store(values_ptr + 4 * n, sq)
    if SUM_Z:
        tl.store(values_ptr + 5 * n, sz)
    if TOP1:
        tl.store(argmax_ptr + row, arg.to(tl.int64))

    log_sum = tl.log(s)
    logp = (z_y - m) - log_sum
    grad_logps = tl.load(grad_logps_ptr + row)
    base = -grad_logps
    target_coef = base * _expm1(logp)
    live = grad_logps != 0
    grad_entropy = None
    if grad_entropy_ptr is not None:
        grad_entropy = tl.load(grad_entropy_ptr + row)
        live = live | (grad_entropy != 0)
        entropy = log_sum - ent / s
        base -= grad_entropy * entropy
        target_coef -= grad_entropy * tl.exp(logp) * (logp + entropy)
    if live:
        write_gradient(
            tile_ptr, bias_ptr, out_ptr, y, u_y, m, log_sum, base, target_coef, grad_entropy, v, stride_tv, stride_ov,
            stride_b, in_scale, out_scale, SCALED, SOFTCAP, False, NARROW_ALIAS, BLOCK,
        )  # fmt: skip
    else:
        tl.debug_barrier()  # over the tile itself: every warp has read it
        write_zeros(out_ptr, v, stride_ov, BLOCK)


def loss_grad_tiles(v: int, threads_per_warp: int = THREADS_PER_WARP) -> RowTiles:
    """16 columns a thread; 1024 threads where fewer would let so many rows in flight that L2 could not hold them."""
    block = min(16384 if v > 32768 else 8192, max(128, triton.next_power_of_2(v)))
    return RowTiles(block, num_warps=max(1, block // 16 // threads_per_warp))


def row_loss_grad(
    tile: Tensor,  # (n, V) float32, any strides: the whole vocabulary
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (n,) int64
    values: Tensor,  # (6, n) float32, contiguous: MAX, SUM, TARGET, ENT, SUM_SQ, SUM_Z; written where asked for
    argmax: Tensor,  # (n,) int64 with top1, else anything; written
    grad_logps: Tensor,  # (n,) float32
    grad_entropy: Tensor | None,  # (n,) float32; needs `entropy`
    out: Tensor,  # (n, V) float32, bfloat16 or float16, any strides; may overlap the tile as in row_grad_bwd
    *,
    in_scale: float = 1.0,
    out_scale: float = 1.0,
    softcap: bool = False,
    entropy: bool = False,
    top1: bool = False,
    sum_sq: bool = False,
    sum_z: bool = False,
) -> None:
    """Fill the state of each row and write ∂L/∂u, rounded once, to `out`. MAX, SUM and TARGET are always written.

    A row whose upstream gradients are zero gets a gradient of zero, whatever its logits hold.

    Raises:
        ValueError: `out` overlaps `tile` in another way, or grad_entropy without entropy.
    """
    if grad_entropy is not None and not entropy:
        raise ValueError("grad_entropy was given without entropy=True: the gradient needs each row's entropy")
    n, v = tile.shape
    if n == 0 or v == 0:
        return
    tiles = loss_grad_tiles(v)
    with torch.cuda.device_of(tile):
        _row_loss_grad_kernel[(n,)](
            tile, bias, targets.contiguous(), grad_logps.contiguous(),
            None if grad_entropy is None else grad_entropy.contiguous(), values, argmax if top1 else None, out,
            n, v, tile.stride(0), tile.stride(1), out.stride(0), out.stride(1), 0 if bias is None else bias.stride(0),
            float(in_scale), float(out_scale),
            SCALED=softcap or in_scale != 1, SOFTCAP=softcap, ENTROPY=entropy, TOP1=top1, SUM_SQ=sum_sq, SUM_Z=sum_z,
            NARROW_ALIAS=narrow_alias(tile, out), BLOCK=tiles.block, LANES=lanes(tiles), num_warps=tiles.num_warps,
            enable_fp_fusion=False,
        )  # fmt: skip
