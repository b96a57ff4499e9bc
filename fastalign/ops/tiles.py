"""One tile of the head: GEMM → row kernel → GEMMs, slab by slab. All schedules are loops over this.

`Tiles` binds the inputs of one call (hidden, weight, bias, targets, the rows that count) to a backend and a plan, and
owns the workspace. A tile's rows are gathered into a padded buffer (GEMMs like row counts that are multiples of 16;
padding rows are zero and take no part in the row kernels). On the CPU tiles are vocabulary-major, (slab, rows) in
memory, which is the orientation its GEMMs are fastest in; elsewhere they are token-major.

16-bit inputs: logits are float32 always. On the CPU slabs of the weight are widened inside the workspace; on CUDA the
GEMM writes float32 (`out_dtype`) and the gradient is written in 16 bits over the tile. Where a slab is the whole
vocabulary, each gradient is one product there: the weight's is written in 16 bits by the GEMM, hidden's in pieces of
float32 that are rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.ops import devices, whole_tiles
from fastalign.ops import live as device_rows
from fastalign.ops import rows as R
from fastalign.ops.backends import Backend
from fastalign.ops.gpu_call import pitch
from fastalign.ops.plans import Plan
from fastalign.ops.sinks import Sinks, add_scaled
from fastalign.ops.tile_sizes import align
from fastalign.ops.workspace import Workspace


@dataclass(slots=True)
class Block:
    """Rows of one tile: their indices in hidden (None: a range), inputs, targets. `h` is padded to `align(n)` rows.

    copied: `h` is in the workspace, so that it may be overwritten.
    """

    start: int
    stop: int
    index: Tensor | None
    h: Tensor
    targets: Tensor
    copied: bool = True

    @property
    def n(self) -> int:
        return self.stop - self.start


class Tiles:
    """Inputs of one call, bound to a backend and a plan.

    hidden (N, H) in the compute dtype; weight (V, H) in the compute dtype or a wider one (rounded to it slab by slab);
    bias (V,) or None; targets (N,) int64; rows (n,) int64, the rows that count in the order they are worked on, or None
    for all. skip_rows: fastalign.ops.live.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None, spec:
        R.RowSpec,
        plan: Plan, backend: Backend, skip_rows: str = "auto",
    ) -> None:  # fmt: skip
        self.hidden, self.weight, self.bias, self.targets, self.rows = hidden, weight, bias, targets, rows
        self.spec, self.plan, self.backend, self.skip_rows = spec, plan, backend, skip_rows
        self.V = weight.shape[0]
        self.device = hidden.device
        self.vocab_major = devices.gemm_style(self.device) == "cpu"
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.wide = wide
        self.operand = wide if self.vocab_major else hidden.dtype
        self.workspace = Workspace(self.device)

    @property
    def in_one(self) -> bool:
        """Whether the vocabulary is one slab, of which each gradient is one product."""
        return not self.vocab_major and self.plan.slab >= self.V

    # ---- workspace

    def new_tile(self, n: int, v: int, name: str | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """An (align(n), v) tile in the device's orientation, from the workspace if it has a name."""
        shape = (v, align(n)) if self.vocab_major else (align(n), pitch(v))
        dtype = self.wide if dtype is None else dtype
        if name is None:
            tile = torch.empty(shape, dtype=dtype, device=self.device)
        else:
            tile = self.workspace.buffer(name, shape, dtype)
        return tile.t() if self.vocab_major else tile[:, :v]

    def whole_rows(self, tile: Tensor) -> Tensor:
        """A tile of its own (`new_tile` without a name) with the columns that pad its rows: contiguous."""
        return tile.as_strided((tile.shape[0], tile.stride(0)), (tile.stride(0), 1))

    def overlay(self, sink: Tensor, rows: int) -> list[Tensor]:
        """Tiles (align(rows), slab) of `wide`, one per slab, each in the memory of its own columns of `sink` (V, H)."""
        slabs, padded = [], align(rows)
        for v0, v1 in self._slabs():
            memory = sink[v0:v1].view(-1)[: padded * (v1 - v0) * self.wide.itemsize // sink.itemsize].view(self.wide)
            slabs.append(memory.view(v1 - v0, padded).t() if self.vocab_major else memory.view(padded, v1 - v0))
        return slabs

    def block(self, start: int, stop: int, index: Tensor | None = None, *, copy: bool = False) -> Block:
        """Gather rows start:stop of the scored rows (or those of `index`) into the workspace; a range of rows that fits
        the GEMM as it lies is not copied, unless `copy`."""
        block = self.bare_block(start, stop, index)
        index, n, hidden = block.index, block.n, self.hidden
        fits = n == align(n) and hidden.dtype == self.operand and hidden.stride(1) == 1
        if index is None and fits and not copy:
            block.h, block.copied = hidden[start:stop], False
            return block
        h = block.h = self.workspace.buffer("rows", (align(n), hidden.shape[1]), self.operand)
        if index is not None and hidden.dtype == self.operand:
            torch.index_select(hidden, 0, index, out=h[:n])
        else:
            h[:n].copy_(hidden[start:stop] if index is None else hidden.index_select(0, index))
        h[n:].zero_()
        return block

    def bare_block(self, start: int, stop: int, index: Tensor | None = None) -> Block:
        """A block without its inputs: `h` is empty."""
        if index is None and self.rows is not None:
            index = self.rows[start:stop]
        targets = self.targets[start:stop] if index is None else self.targets.index_select(0, index)
        return Block(start, stop, index, self.hidden[:0], targets)

    def indices(self, start: int, stop: int) -> Tensor:
        """Rows of hidden that the scored rows start:stop are."""
        return torch.arange(start, stop, device=self.device) if self.rows is None else self.rows[start:stop]

    def fused_inputs(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
        """(hidden, weight, bias, targets, rows) of scored rows start:stop, as the fused kernels take them."""
        if self.rows is not None:
            return self.hidden, self.weight, self.bias, self.targets, self.rows[start:stop]
        return self.hidden[start:stop], self.weight, self.bias, self.targets[start:stop], None

    def live_rows(self, coef: R.RowCoef) -> Tensor | None:
        """Rows that the gradient GEMMs are confined to, where the host knows them; None: all, or `device_rows`."""
        return R.live_rows(coef) if self.vocab_major and self.skip_rows != "never" else None

    def _take(self, block: Block, rows: Tensor) -> Block:
        """Some rows of a block, in the memory of its `h`."""
        index = block.start + rows if block.index is None else block.index.index_select(0, rows)
        return self.block(0, len(rows), index)

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[Block]:
        stop = self.plan.n if stop is None else stop
        for first in range(start, stop, self.plan.rows):
            yield self.block(first, min(first + self.plan.rows, stop))

    def _slabs(self) -> Iterator[tuple[int, int]]:
        for v0 in range(0, self.V, self.plan.slab):
            yield v0, min(v0 + self.plan.slab, self.V)

    def weight_slab(self, v0: int, v1: int) -> Tensor:
        slab = self.weight[v0:v1]
        if slab.dtype != self.hidden.dtype:  # rounded as autocast rounds it
            slab = self.workspace.buffer("rounded", (v1 - v0, slab.shape[1]), self.hidden.dtype).copy_(slab)
        if slab.dtype != self.operand:
            slab = self.workspace.buffer("widened", (v1 - v0, slab.shape[1]), self.operand).copy_(slab)
        return slab

    def bias_slab(self, v0: int, v1: int) -> Tensor | None:
        return None if self.bias is None else self.bias[v0:v1].to(self.wide)

    # ---- the two halves of a tile

    def logits(self, h: Tensor, weight: Tensor, out: Tensor) -> None:
        if self.vocab_major:
            torch.mm(weight, h.t(), out=out.t())
        elif self.hidden.dtype == self.wide:
            torch.mm(h, weight.t(), out=out)
        else:
            torch.mm(h, weight.t(), out_dtype=self.wide, out=out)

    def forward(self, block: Block, keep: Tensor | list[Tensor] | None = None) -> R.RowState:
        """Fold the whole vocabulary into the block's state.

        keep: (align(n), V), or such a tile in pieces, one per slab, receives u; None: every slab is scratch.
        """
        state = R.RowState.start(block.n, self.spec, self.device, self.wide)
        for i, (v0, v1) in enumerate(self._slabs()):
            if keep is None:
                tile = self.new_tile(block.n, v1 - v0, "tile")
            else:
                tile = keep[i] if isinstance(keep, list) else keep[:, v0:v1]
            self.logits(block.h, self.weight_slab(v0, v1), tile)
            self.backend.row_stats(tile[: block.n], self.bias_slab(v0, v1), block.targets, v0, state, self.spec)
        return state

    def keep_exponentials(self, tile: Tensor, stats: R.RowStats, out: Tensor) -> None:
        """Write exp(z − max) of a finished float32 tile (n, V) to 16-bit `out`."""
        for v0, v1 in self._slabs():
            self.backend.row_exp(tile[:, v0:v1], self.bias_slab(v0, v1), stats, self.spec, out[:, v0:v1])

    def backward(
        self, block: Block, stats: R.RowStats, coef: R.RowCoef, sinks: Sinks, tile: Tensor | None = None, *,
        overwrite: bool = True, exponentials: bool = False, overlaid: list[Tensor] | None = None, scratch: str = "tile",
    ) -> None:  # fmt: skip
        """Turn a tile into its gradient, slab by slab, and add it to the sinks.

        Only live rows take part. Where the host knows them they are gathered to the front of the tile (or of the
        scratch); on a device as fastalign.ops.live says. The block's `h` may be overwritten by theirs.

        tile: u of the block (align(n), V), or its exponentials (n, V); None computes the logits again. Unless
            `overwrite`, the tile is left as it is, for another backward.
        overlaid: u of the block's first rows, slab by slab, in memory that the weight's gradient may take as soon as a
            slab has been read; with it and without `tile` only the other rows' logits are computed again.
        """
        live = None if sinks.compact else self.live_rows(coef)
        nothing = sinks.hidden is None and sinks.weight is None and sinks.bias is None
        if nothing or (live is not None and not len(live)):
            return
        alive = None if sinks.compact else device_rows.find(self, block, coef)
        again = block.n if tile is not None else 0  # first row whose logits are computed again
        if overlaid is not None and tile is None:
            again = min(overlaid[0].shape[0], align(block.n))
        if live is not None:
            block, (stats, coef) = self._take(block, live), R.take(stats, coef, live)
            again = int(torch.searchsorted(live, again))
        spec = R.with_exponentials(self.spec) if exponentials else self.spec
        scale = None
        if self.operand == torch.float16:
            coef, scale = R.rescale(coef)
        index = None if sinks.compact else block.index
        in_one = self.in_one
        grad_rows = None if sinks.hidden is None or in_one else self._grad_rows(block, index, sinks.hidden)
        pieces = [
            (part, block.targets[part], *R.cut(stats, coef, part.start, part.stop))
            for part in (slice(0, min(again, block.n)), slice(again, block.n))
            if part.start < part.stop
        ]
        for i, (v0, v1) in enumerate(self._slabs()):
            recompute = again < block.n
            weight = self.weight_slab(v0, v1) if recompute or grad_rows is not None else None
            held = tile[:, v0:v1] if tile is not None else None if overlaid is None else overlaid[i]
            u = self.new_tile(block.n, v1 - v0, scratch) if tile is None else tile[: align(block.n), v0:v1]
            if recompute:
                assert weight is not None
                if alive is None:
                    self.logits(block.h[again:], weight, u[again:])
                else:
                    alive.logits(weight, u)
            grad = self.grad_tile(u if overwrite or tile is None else None, block.n, v1 - v0)
            for part, targets, part_stats, part_coef in pieces:
                bias, rows = self.bias_slab(v0, v1), None
                source = u[part]
                if held is not None and part.start < again:
                    source, rows = (held[part], None) if live is None else (held, live[part])
                self.backend.row_grad(source, bias, targets, v0, part_stats, part_coef, spec, grad[part], rows)
            if align(block.n) != block.n:
                grad[block.n :].zero_()
            if in_one:
                whole_tiles.gradients(self, block, index, grad, sinks, scale, alive=alive)
                continue
            if sinks.bias is not None:
                add_scaled(sinks.bias[v0:v1], grad[: block.n].sum(0, dtype=self.wide), scale)
            if sinks.weight is not None:
                self.add_weight(sinks, v0, v1, grad, block.h, scale, alive)
            if grad_rows is not None:
                assert weight is not None
                (self.product if alive is None else alive.add_rows)(grad_rows, grad, weight, first=v0 == 0)
        sinks.first = False
        if grad_rows is not None:
            assert sinks.hidden is not None
            self._store_rows(sinks.hidden, block, index, grad_rows if scale is None else grad_rows.mul_(scale))

    def grad_tile(self, u: Tensor | None, n: int, v: int) -> Tensor:
        """Where a slab's gradient goes: over the tile (in 16 bits where the GEMMs want that), or to scratch."""
        if u is None:
            return self.new_tile(n, v, "tile", self.operand)
        return u if self.operand == u.dtype else u.view(self.operand)[:, :v]  # the first half of each row's memory

    def _grad_rows(self, block: Block, index: Tensor | None, sink: Tensor) -> Tensor:
        if index is None and sink.dtype == self.wide and block.n == align(block.n):
            return sink[block.start : block.stop]
        return self.workspace.buffer("grad_rows", (align(block.n), sink.shape[1]), self.wide)

    def _store_rows(self, sink: Tensor, block: Block, index: Tensor | None, grad_rows: Tensor) -> None:
        if index is not None:
            rows = grad_rows[: block.n]
            if rows.dtype != sink.dtype == block.h.dtype and block.copied:  # rounded where the rows' inputs were
                rows = block.h[: block.n].copy_(rows)
            sink.index_copy_(0, index, rows.to(sink.dtype))
            return
        out = sink[block.start : block.stop]
        if out.data_ptr() != grad_rows.data_ptr():
            out.copy_(grad_rows[: block.n])

    def product(self, out: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
        """out (float32) = or += a @ b, accumulated in float32."""
        beta = 0 if first else 1
        if a.dtype == out.dtype:
            torch.addmm(out, a, b, beta=beta, out=out)
        else:
            torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)

    def add_weight(
        self, sinks: Sinks, v0: int, v1: int, grad: Tensor, h: Tensor, scale: Tensor | None,
        alive: device_rows.LiveRows | None = None,
    ) -> None:  # fmt: skip
        assert sinks.weight is not None
        out = sinks.weight[v0:v1]
        if alive is not None:
            alive.add_depth(out, grad, first=sinks.first, scale=scale)
        elif scale is None and out.dtype == self.wide:
            self.product(out, grad.t(), h, first=sinks.first)
        elif (
            scale is None and out.dtype == self.operand
        ):  # one tile covers all rows: the GEMM rounds its float32 sum once
            assert sinks.first
            torch.mm(grad.t(), h, out=out)
        else:
            part = self.workspace.buffer("weight_part", (v1 - v0, h.shape[1]), self.wide)
            self.product(part, grad.t(), h, first=True)
            if sinks.first:
                out.copy_(part if scale is None else part.mul_(scale))
            else:
                add_scaled(out, part, scale)
