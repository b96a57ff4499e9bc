"""Tiles over the whole vocabulary, on an accelerator: each gradient is one product there, and none is a sum of slabs.

Two kinds. Logits (float32) become their gradient in place. *Exponentials* E = exp(z − reference), 16-bit, are left as
they lie, but for the target's: the gradient of a row is a multiple of its E,

    G_v = base·p_v·in_scale = r·E_v,      r = base·in_scale·exp(reference − lse),      E_y := target·in_scale / r

so hidden's gradient is r_i·(E_i W), scaled in float32, and the weight's Eᵀ(r h). No row kernel reads them, and a second
backward finds them as the first did. E and r·h are rounded once each, where E·r would be: the error is that of two
operands in 16 bits instead of one. A row whose base is 0 but not its target's coefficient gets a base of 2⁻³⁰ of that,
which no rounding to 16 bits shows. The reference may lie up to REACH below the maximum: then E, E_y and r stay within
bfloat16's range and float32's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastalign.ops import live
from fastalign.ops import rows as R
from fastalign.ops.known_grads import KnownGrads
from fastalign.ops.sinks import Sinks, add_scaled
from fastalign.ops.tile_sizes import align

if TYPE_CHECKING:
    from fastalign.ops.live import LiveRows
    from fastalign.ops.tiles import Block, Tiles


REACH = 60.0  # nats: e^60 · 2^30 < 2^127, and e^−60 · 1e−11 is a normal float32


class Exponentials(NamedTuple):
    """tile: (≥ n, V) bfloat16, exp(z − reference); reference: (n,) float32, from the row's maximum to REACH below."""

    tile: Tensor
    reference: Tensor


def gradients(
    tiles: Tiles, block: Block, index: Tensor | None, grad: Tensor, sinks: Sinks, scale: Tensor | None = None,
    h: Tensor | None = None, factors: Tensor | None = None, alive: LiveRows | None = None,
) -> None:  # fmt: skip
    """The products of a tile's gradient (≥ n, V): one for the weight, and pieces of one for hidden.

    index: where rows go in the sink of hidden; None: to their own place. scale: 0-dim, of everything. factors (n,): of
    hidden's rows; h: what the weight's gradient is taken with, if not the block's own rows. alive: rows that take part,
    if not all do.
    """
    if sinks.bias is not None:
        add_scaled(sinks.bias, grad[: block.n].sum(0, dtype=tiles.wide), scale)
    if sinks.weight is not None:
        tiles.add_weight(sinks, 0, tiles.V, grad, block.h if h is None else h, scale, alive)
        sinks.first = False
    if sinks.hidden is None:
        return
    weight, out = tiles.weight_slab(0, tiles.V), sinks.hidden
    if alive is not None:
        if index is None:
            out[block.start : block.stop].zero_()
        alive.store_rows(out, grad, weight, factors=factors, scale=scale)
        return
    if index is None and out.dtype == tiles.wide and factors is None and scale is None:
        tiles.product(out[block.start : block.stop], grad[: block.n], weight, first=True)
        return
    step = max(tiles.plan.piece_rows, 1)
    for first in range(0, block.n, step):
        part = slice(first, min(first + step, block.n))
        piece = tiles.workspace.buffer("piece", (part.stop - first, out.shape[1]), tiles.wide)
        tiles.product(piece, grad[part], weight, first=True)
        for multiple in (None if factors is None else factors[part, None], scale):
            if multiple is not None:
                piece.mul_(multiple)
        if index is None:
            out[block.start + first : block.start + part.stop].copy_(piece)
        else:  # rounded where the rows' inputs were, which nobody needs any more
            there = block.copied and block.h.dtype == out.dtype != piece.dtype
            out.index_copy_(0, index[part], block.h[part].copy_(piece) if there else piece.to(out.dtype))


def score_known(tiles: Tiles, block: Block, known: KnownGrads, sinks: Sinks, tile: Tensor) -> R.RowState:
    """Forward and backward of a block whose upstream gradients are known before its log-probs: the logits are read
    once. Every row takes part; `sinks.compact` is set."""
    state = R.RowState.start(block.n, tiles.spec, tiles.device, tiles.wide)
    tiles.logits(block.h, tiles.weight_slab(0, tiles.V), tile)
    scale = None
    if tiles.operand == torch.float16:
        known, scale = known.rescale()
    grad, bias = tiles.grad_tile(tile, block.n, tiles.V), tiles.bias_slab(0, tiles.V)
    tiles.backend.row_loss_grad(tile[: block.n], bias, block.targets, state, known, tiles.spec, grad[: block.n])
    if align(block.n) != block.n:
        grad[block.n :].zero_()
    gradients(tiles, block, None, grad, sinks, scale)
    return state


def score_exponentials(
    tiles: Tiles, start: int, stop: int, index: Tensor | None, out: Tensor
) -> tuple[R.RowState, Tensor]:
    """State of scored rows start:stop (or those of `index`) and their reference; exp(z − reference) goes to `out`."""
    assert tiles.backend.fused_exponentials is not None
    hidden, weight, bias, targets, rows = tiles.fused_inputs(start, stop)
    if index is not None:
        hidden, targets, rows = tiles.hidden, tiles.targets, index
    return tiles.backend.fused_exponentials(hidden, weight, bias, targets, rows, tiles.spec, out[: stop - start])


def exponentials_backward(
    tiles: Tiles, block: Block, held: Exponentials, stats: R.RowStats, coef: R.RowCoef, sinks: Sinks
) -> None:
    """Gradients of a block from its exponentials. Its `h`, which the weight's alone needs, is scaled: it is a copy."""
    assert coef.entropy is None
    n, scale = block.n, tiles.spec.in_scale
    least = coef.target.abs() * 2.0**-30
    base = torch.where(coef.base.abs() < least, least, coef.base)
    ratio = torch.exp(held.reference - stats.max - stats.log_sum)
    entry = torch.where(base == 0, 0.0, coef.target / base) / ratio
    factors = base * ratio * scale
    tile = held.tile[:n]
    tile.scatter_(1, block.targets[:, None], entry[:, None].to(tile.dtype))
    alive = None if sinks.compact else live.find(tiles, block, coef)
    scaled = None
    if alive is not None:
        alive.scale(factors)
    elif sinks.weight is not None:
        scaled = block.h[:n].mul_(factors[:, None])
    gradients(tiles, block, None if sinks.compact else block.index, tile, sinks, None, scaled, factors, alive)
