"""The schedules of `linear_logps`: loops over tiles. Called by the custom op with validated tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.ops import rows as R
from fastalign.ops import whole_tiles
from fastalign.ops.known_grads import KnownGrads
from fastalign.ops.sinks import Sinks
from fastalign.ops.tiles import Tiles
from fastalign.ops.whole_tiles import Exponentials


class Scored(NamedTuple):
    """Result of a forward over n rows: finished statistics, the raw state, and what the backward may reuse."""

    stats: R.RowStats
    state: R.RowState
    kept: Tensor | None = None  # (≥ kept_rows, V): u in float32, or exponentials in 16 bits
    reference: Tensor | None = None  # (kept_rows,) of the exponentials, where it is not the maximum
    frozen: Tensor | None = None  # (n, H) float32: D
    overlaid: Tensor | None = None  # (V, H): memory of the weight's gradient, with u of overlaid_rows rows in it


def forward(tiles: Tiles, overlay_dtype: torch.dtype | None = None) -> Scored:
    """Score all rows of the plan; keep what its schedule keeps.

    overlay_dtype: that of the weight's gradient while it is summed, for the overlaid schedule.
    """
    plan, spec = tiles.plan, tiles.spec
    parts: list[R.RowState] = []
    kept = reference = frozen = overlaid = None
    if plan.schedule == "overlaid":
        overlaid = tiles.weight.new_empty(tiles.weight.shape, dtype=overlay_dtype)
        if plan.overlaid_rows:
            first = tiles.block(0, plan.overlaid_rows)
            parts.append(tiles.forward(first, tiles.overlay(overlaid, plan.overlaid_rows)))
    if plan.kept_rows:
        kept, reference = _forward_kept(tiles, parts)
    if plan.schedule == "frozen":
        frozen = torch.empty(plan.n, tiles.hidden.shape[1], dtype=tiles.wide, device=tiles.device)
        parts += _forward_frozen(tiles, frozen)
    else:
        done = max(plan.kept_rows, plan.overlaid_rows)
        fused = tiles.backend.fused_forward if tiles.weight.dtype == tiles.hidden.dtype else None
        if fused and (plan.fused or plan.schedule == "forward"):
            if done < plan.n or not plan.n:
                parts.append(fused(*tiles.fused_inputs(done, plan.n), spec))
        else:
            parts += [tiles.forward(block) for block in tiles.blocks(done)]
    state = _join(parts, tiles)
    return Scored(R.finish(state, spec), state, kept, reference, frozen, overlaid)


def _forward_frozen(tiles: Tiles, out: Tensor) -> list[R.RowState]:
    """States of all rows; `out` (n, H) gets D, the gradient of hidden for a coefficient of 1."""
    parts, sinks, plan = [], Sinks(hidden=out, compact=True), tiles.plan
    for start in range(0, plan.n, plan.rows):
        stop = min(start + plan.rows, plan.n)
        if plan.exponentials:
            tile = tiles.new_tile(stop - start, tiles.V, "tile", tiles.hidden.dtype)
            state, reference = whole_tiles.score_exponentials(tiles, start, stop, None, tile)
            stats = R.finish(state, tiles.spec)
            unit = R.coefficients(stats, torch.ones_like(stats.logps), None, None)
            block = tiles.bare_block(start, stop)
            whole_tiles.exponentials_backward(tiles, block, Exponentials(tile, reference), stats, unit, sinks)
        else:
            block = tiles.block(start, stop)
            tile = tiles.new_tile(block.n, tiles.V, "tile")
            if tiles.in_one:
                known = KnownGrads(torch.ones(block.n, dtype=tiles.wide, device=tiles.device))
                state = whole_tiles.score_known(tiles, block, known, sinks, tile)
            else:
                state = tiles.forward(block, tile)
                stats = R.finish(state, tiles.spec)
                unit = R.coefficients(stats, torch.ones_like(stats.logps), None, None)
                tiles.backward(block, stats, unit, sinks, tile)
        parts.append(state)
    return parts


def _forward_kept(tiles: Tiles, parts: list[R.RowState]) -> tuple[Tensor, Tensor | None]:
    """Forward of rows [0, kept_rows), keeping u (float32) or exp(z − max) or exp(z − reference) (16 bits) of each."""
    plan = tiles.plan
    if plan.exponentials and not plan.transit_rows:
        kept = tiles.new_tile(plan.kept_rows, tiles.V, dtype=tiles.hidden.dtype)
        state, reference = whole_tiles.score_exponentials(tiles, 0, plan.kept_rows, None, kept)
        parts.append(state)
        return kept, reference
    if not plan.transit_rows:
        block = tiles.block(0, plan.kept_rows)
        kept = tiles.new_tile(plan.kept_rows, tiles.V)
        parts.append(tiles.forward(block, kept))
        return kept, None
    kept = tiles.new_tile(plan.kept_rows, tiles.V, dtype=tiles.hidden.dtype)
    for start in range(0, plan.kept_rows, plan.transit_rows):
        block = tiles.block(start, min(start + plan.transit_rows, plan.kept_rows))
        tile = tiles.new_tile(block.n, tiles.V, "tile")
        state = tiles.forward(block, tile)
        parts.append(state)
        tiles.keep_exponentials(tile[: block.n], R.finish(state, tiles.spec), kept[start : block.stop])
    return kept, None


def _join(parts: list[R.RowState], tiles: Tiles) -> R.RowState:
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return R.RowState.start(0, tiles.spec, tiles.device, tiles.wide)
    return R.join(parts)


def backward(
    tiles: Tiles, stats: R.RowStats, coef: R.RowCoef, sinks: Sinks, kept: Tensor | None = None,
    overlaid: Tensor | None = None, reference: Tensor | None = None,
) -> None:  # fmt: skip
    """Gradients of all rows of the plan into the sinks. Logits of rows below plan.kept_rows come from `kept`, whose
    exponentials are relative to `reference` (None: to the maximum), those of rows below plan.overlaid_rows from
    `overlaid`, which may be sinks.weight itself."""
    plan = tiles.plan
    first = 0
    if overlaid is not None and plan.overlaid_rows:
        block = tiles.block(0, min(plan.rows, plan.n))
        slabs = tiles.overlay(overlaid, plan.overlaid_rows)
        tiles.backward(block, *R.cut(stats, coef, 0, block.stop), sinks, overlaid=slabs)
        first = block.stop
    if kept is not None and plan.kept_rows:
        first = plan.kept_rows
        scalable = plan.exponentials and tiles.in_one and sinks.bias is None and coef.entropy is None
        # blocks of the transit's size, but one of all rows for a weight gradient in 16 bits: it is written once
        narrow = sinks.weight is not None and sinks.weight.dtype != tiles.wide
        step = plan.transit_rows if plan.transit_rows and not (narrow or scalable) else first
        for start in range(0, first, step):
            part = R.cut(stats, coef, start, min(start + step, first))
            if scalable:
                block = tiles.block(start, min(start + step, first), copy=True)
                whole_tiles.exponentials_backward(
                    tiles, block, Exponentials(kept[start : block.stop], part[0].max if reference is None else
                    reference[start : block.stop]), *part, sinks,
                )  # fmt: skip
                continue
            block = tiles.block(start, min(start + step, first))
            tile = kept[start : block.stop]
            tiles.backward(block, *part, sinks, tile, overwrite=False, exponentials=plan.exponentials)
    recompute(tiles, stats, coef, sinks, tiles.rows, first, plan.n)
    sinks.close()


def recompute(
    tiles: Tiles, stats: R.RowStats, coef: R.RowCoef, sinks: Sinks, index: Tensor | None, start: int, stop: int
) -> None:
    """Backward of rows start:stop, whose logits are computed again, but for rows that contribute nothing (`live_rows`).

    index: the rows' numbers in hidden, as many as stats has; None: they are their own.
    """
    stats, coef = R.cut(stats, coef, start, stop)
    if index is not None:
        index = index[start:stop]
    live = tiles.live_rows(coef)
    if live is not None:
        stats, coef = R.take(stats, coef, live)
        index = start + live if index is None else index.index_select(0, live)
        start, stop = 0, len(live)
    for first in range(start, stop, tiles.plan.rows):
        last = min(first + tiles.plan.rows, stop)
        part = None if index is None else index[first - start : last - start]
        tiles.backward(tiles.block(first, last, part), *R.cut(stats, coef, first - start, last - start), sinks)


def frozen_backward(
    tiles: Tiles, stats: R.RowStats, d: Tensor, grad_logps: Tensor | None, grad_lse: Tensor | None, out: Tensor
) -> None:
    """grad_hidden from D = Σ_v (onehot − p)_v f_v W_v with f = dz/du:  a·D + c·(f_y W_y − D).

    d (n, H) float32; out (N, H), zero where no row counts. Needs no GEMM.
    """
    spec, rows = tiles.spec, tiles.plan.rows
    a = torch.zeros_like(stats.logps) if grad_logps is None else grad_logps
    c = torch.zeros_like(stats.logps) if grad_lse is None else grad_lse
    slope = torch.full_like(stats.target, spec.in_scale)
    if spec.softcap:
        slope = (1 - (stats.target / spec.out_scale).square()) * (spec.in_scale * spec.out_scale)
    for start in range(0, tiles.plan.n, rows):
        block = tiles.bare_block(start, min(start + rows, tiles.plan.n))
        part = slice(block.start, block.stop)
        grad = d[part] * (a - c)[part, None]
        if grad_lse is not None:
            held = block.targets.clamp(0, tiles.V - 1)  # one outside is no address, and its log-prob is nan already
            picked = tiles.weight.index_select(0, held).to(tiles.hidden.dtype).to(d.dtype)
            grad.addcmul_(picked, (c * slope)[part, None])
        if block.index is None:
            out[part].copy_(grad)
        else:
            out.index_copy_(0, block.index, grad.to(out.dtype))


def mean_logits(tiles: Tiles, state: R.RowState) -> Tensor:
    """mean_v z_v; without a softcap it is linear in hidden and needs the vocabulary's mean row only."""
    spec = tiles.spec
    if spec.softcap:
        return state.values[R.SUM_Z] / tiles.V
    mean_row = tiles.weight.mean(0, dtype=tiles.wide)
    shift = 0.0 if tiles.bias is None else tiles.bias.mean(dtype=tiles.wide)
    step = tiles.plan.rows if tiles.vocab_major else max(tiles.plan.piece_rows, 1)  # widened so many rows at a time
    blocks = (tiles.block(first, min(first + step, tiles.plan.n)) for first in range(0, tiles.plan.n, step))
    parts = [block.h[: block.n].to(tiles.wide) @ mean_row for block in blocks]
    means = torch.cat(parts) if parts else mean_row.new_empty(0)
    return (means + shift) * spec.in_scale
