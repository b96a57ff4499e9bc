"""Streamed losses: head and any group-separable loss in one pass of three GEMMs.

A loss L = Σ_g ℓ_g / D whose denominator D does not depend on the log-probs gives the gradient of a group's log-probs as
soon as that group is scored. So whole groups are taken in chunks that fit the workspace: logits tile → log-probs → the
loss function → its gradient by autograd on the chunk's log-probs → gradient over the tile in place → the two gradient
GEMMs, from which rows that contribute nothing are left out (`rows.live_rows`). A group too large for the workspace runs
deferred inside itself: its logits are computed twice, but for its last tile and, in the first chunk, what the memory of
the weight's gradient holds. On an accelerator a tile may hold exponentials instead, which need no gradient pass
(`whole_tiles`), and one chunk of all rows leaves its gradients in their tensors' own dtypes, written once.

A Python function cannot enter a custom op, so this is a `torch.autograd.Function` behind one graph break under
torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastalign.ops import backends, engine, whole_tiles
from fastalign.ops import rows as R
from fastalign.ops.arguments import check_accumulator, check_head, needed_gradients, row_spec, workspace_bytes
from fastalign.ops.groups import Chunk, Layout
from fastalign.ops.linear_logps import linear_logps
from fastalign.ops.live import check_skip_rows
from fastalign.ops.logps_op import plan_for
from fastalign.ops.schedule import Plan
from fastalign.ops.sinks import Sinks, make_sinks
from fastalign.ops.tiles import Block, Tiles
from fastalign.ops.uploads import on_device
from fastalign.types import IGNORE_INDEX, LinearLogps, LossOutput, Metric

LossFn = Callable[..., Tensor]
Function = TypeVar("Function", bound=Callable[..., Any])
MetricsFn = Callable[..., dict[str, Metric]]


def _outside_graphs(function: Function) -> Function:
    """torch.compiler.disable, which is untyped."""
    return torch.compiler.disable(function)


@_outside_graphs
def linear_loss(
    loss_fn: LossFn, hidden: Tensor, weight: Tensor, targets: Tensor, *, cu_seqlens: Tensor | None = None,
    groups: Tensor | Sequence[int] | str | None = None, inputs: Mapping[str, Tensor] | None = None,
    denominator: float | Tensor | None = 1.0, reduce: bool = True, entropy: bool = False, top1: bool = False,
    log_sum_sq_probs: bool = False, mean_logits: bool = False, rows: Tensor | None = None, bias: Tensor | None = None,
    temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None, ignore_index: int = IGNORE_INDEX,
    metrics_fn: MetricsFn | None = None, backend: str = "auto", schedule: str = "auto",
    workspace_mb: float | None = None, accumulate_into: Tensor | None = None, skip_rows: str = "auto",
    entropy_grad: bool = True,
) -> LossOutput:  # fmt: skip
    """Any loss that is a sum over groups of sequences, through the fused head.

        loss = Σ_g ℓ_g / denominator,     ℓ = loss_fn(LinearLogps, cu_seqlens, **inputs)

    Args:
        loss_fn: pure function of a chunk of whole groups. It gets the log-probs of the chunk's *scored* tokens (n,),
            packed sequence after sequence in ascending sequence order (`entropy` and `log_sum_sq_probs` only if asked
            for), `cu_seqlens` (S' + 1,) int32 on the host over them, so that its differences are the completion lengths
            |y|, and the chunk's part of `inputs`. It returns one loss per group (G',), in the order of the groups'
            first sequences.
        hidden: padded (B, T, H), each row of the batch a sequence; or packed (N, H) with cu_seqlens.
        weight, bias, targets, temperature, logit_scale, softcap, ignore_index, rows, backend, workspace_mb, skip_rows,
            entropy_grad: as in linear_logps; rows must ascend.
        cu_seqlens: (S + 1,) int32 on the host, over all N tokens.
        groups: (S,) integers on the host, which sequences belong together; None: every sequence is its own group;
            "tokens": every token is (loss_fn then gets cu_seqlens=None and returns (n,)).
        inputs: tensors the loss needs, none requiring grad: per sequence (S, ...) or per token (targets' shape);
            one that could be either, because every sequence is one token, is taken per sequence.
        denominator: D, a number or a 0-dim tensor; None: the number of scored tokens.
        reduce: False returns the losses of all groups (G,), undivided; they are then scored before the loss.
        metrics_fn: called once, without grad, with the log-probs of all scored tokens, their cu_seqlens, and all
            inputs.
        entropy, log_sum_sq_probs: further outputs for loss_fn and metrics_fn; the second carries no gradient.
        top1, mean_logits: further outputs for metrics_fn.
        schedule: "auto" streams, or scores all rows first where they fit (fastalign.ops.schedule); "streamed";
            "deferred", "overlaid", "cached" and "frozen" score all rows first and let autograd apply loss_fn to all
            groups at once. Where a streamed call of one chunk has 16-bit gradients, a grad_output that is no power of
            two rounds them a second time.
        accumulate_into: as in linear_logps; the loss is then not streamed.
    Returns:
        LossOutput(loss, metrics): 0-dim float32. An empty batch gives 0, attached to the graph.
    Raises:
        ValueError: as linear_logps, and for inputs that require grad or fit neither shape, or a loss_fn of the wrong
            shape.
        RuntimeError: a second backward through the streamed loss (its gradients were handed out by the first).
    """
    hidden, weight, bias = check_head(hidden, weight, targets, bias, rows)
    spec = row_spec(temperature, logit_scale, softcap, entropy, top1, log_sum_sq_probs, mean_logits)
    layout = Layout.make(hidden, targets, cu_seqlens, groups, rows, ignore_index, weight.shape[0], inputs or {})
    flat = hidden.reshape(-1, hidden.shape[-1])
    needs = needed_gradients(flat, weight, bias)
    check_skip_rows(skip_rows, backend, hidden)
    if denominator is None:
        denominator = max(layout.n, 1)
    if not reduce and schedule == "streamed":
        raise ValueError(
            "schedule='streamed' needs a reduction, because it gives out one gradient; take schedule='auto'"
        )
    bound, workspace = None, workspace_bytes(workspace_mb)
    if accumulate_into is not None:
        check_accumulator(accumulate_into, weight, needs[1], schedule)
    elif any(needs) and reduce and schedule in ("auto", "streamed"):
        largest = int(layout.group_rows().max(initial=1))
        bound = plan_for(
            flat, weight, layout.n, needs, schedule, workspace, spec, backend, skip_rows=skip_rows,
            group_rows=largest, gathered=not layout.every, entropy_grad=entropy_grad,
        )  # fmt: skip
        schedule, workspace = bound.schedule, bound.budget_bytes
    if bound is not None and schedule == "streamed":
        job = _Job(loss_fn, layout, spec, denominator, needs, backend, bound, mean_logits, skip_rows, entropy_grad)
        loss = _Streamed.apply(flat, weight, bias, targets.reshape(-1), job)
        assert job.scored is not None
        scored = job.scored
    else:
        index = layout.rows_on(flat.device)
        out = linear_logps(
            flat, weight, targets.reshape(-1), bias=bias, temperature=temperature, logit_scale=logit_scale,
            softcap=softcap, ignore_index=ignore_index, entropy=entropy, top1=top1, log_sum_sq_probs=log_sum_sq_probs,
            mean_logits=mean_logits, rows=layout.rows if index is None else index, backend=backend, schedule=schedule,
            workspace_mb=None if workspace is None else workspace / 2**20, accumulate_into=accumulate_into,
            skip_rows=skip_rows, entropy_grad=entropy_grad,
        )  # fmt: skip
        everything = layout.everything()
        scored = out if index is None else _map(out, lambda t: t.index_select(0, index))
        losses = everything.losses(loss_fn, layout, scored)
        loss = losses.sum() / denominator if reduce else losses
        scored = _map(scored, Tensor.detach)
    metrics: dict[str, Metric] = {}
    if metrics_fn is not None:
        with torch.no_grad():
            everything = layout.everything()
            metrics = metrics_fn(scored, everything.cu_seqlens, **everything.pick(layout))
    return LossOutput(loss, metrics)


def _map(scored: LinearLogps, fn: Callable[[Tensor], Tensor]) -> LinearLogps:
    return LinearLogps(*(None if t is None else fn(t) for t in scored))  # type: ignore[arg-type]


# ---- the pass


@dataclass(slots=True)
class _Job:
    """One streamed call: what the autograd Function needs beside its tensors, and what it leaves for the caller."""

    loss_fn: LossFn
    layout: Layout
    spec: R.RowSpec
    denominator: float | Tensor
    needs: tuple[bool, bool, bool]
    backend: str
    plan: Plan
    mean_logits: bool
    skip_rows: str
    entropy_grad: bool
    scored: LinearLogps | None = None

    def run(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tiles, Sinks]:
        """Loss (0-dim float32), and the sinks that hold its unscaled gradients."""
        layout = self.layout
        all_rows = layout.rows_on(hidden.device)
        backend = backends.resolve(self.backend, hidden)
        tiles = Tiles(hidden, weight, bias, targets, all_rows, self.spec, self.plan, backend, self.skip_rows)
        sinks = make_sinks(tiles, self.needs, accumulate=True)
        states: list[R.RowState] = []
        total = torch.zeros((), dtype=tiles.wide, device=hidden.device)
        chunks = layout.chunks(self.plan.rows)
        layout.upload(chunks, hidden.device)
        for chunk in chunks:
            if self.plan.exponentials:
                total += self._exponentials(chunk, tiles, sinks, states)
            else:
                total += self._chunk(chunk, tiles, sinks, states)
        sinks.close()
        tiles.workspace.release()
        self.scored = self._assemble(tiles, states, [chunk.positions for chunk in chunks])
        return total, tiles, sinks

    def _exponentials(self, chunk: Chunk, tiles: Tiles, sinks: Sinks, states: list[R.RowState]) -> Tensor:
        """`_chunk` without logits: one tile of exp(z − reference)."""
        first, last, index = chunk.rows(self.layout, tiles.device)
        tile = tiles.new_tile(last - first, tiles.V, "tile", tiles.hidden.dtype)
        state, reference = whole_tiles.score_exponentials(tiles, first, last, index, tile)
        states.append(state)
        stats = R.finish(state, self.spec)
        loss, coef = self._coefficients(chunk, stats, R.log_sum_sq_probs(state, stats, self.spec))
        block = tiles.block(first, last, index, copy=True)
        held = whole_tiles.Exponentials(tile, reference)
        whole_tiles.exponentials_backward(tiles, block, held, stats, coef, sinks)
        return loss

    def _chunk(self, chunk: Chunk, tiles: Tiles, sinks: Sinks, states: list[R.RowState]) -> Tensor:
        """One chunk of whole groups: its loss over the denominator; its gradients go to the sinks."""
        begin, _, index = chunk.rows(self.layout, tiles.device)
        n, step = len(chunk.positions), tiles.plan.rows
        starts = range(0, max(n, 1), step)

        def block_of(start: int, stop: int) -> Block:
            if index is None:
                return tiles.block(begin + start, begin + stop)
            return tiles.block(start, stop, index[start:stop])

        # Blocks are scored in scratch and computed again, but for the last one, whose tile is still there, and rows of
        # the very first, which wait in the memory of the weight's gradient.
        parts, overlaid = [], None
        if len(starts) > 1 and sinks.first and sinks.weight is not None and tiles.plan.overlaid_rows:
            rows = tiles.plan.overlaid_rows
            overlaid = tiles.overlay(sinks.weight, rows)
            parts.append(tiles.forward(block_of(0, rows), overlaid))
            if rows < step:
                parts.append(tiles.forward(block_of(rows, step)))
        for start in starts[1 if overlaid else 0 :]:
            block = block_of(start, min(start + step, n))
            tile = tiles.new_tile(block.n, tiles.V, "tile") if start == starts[-1] else None
            parts.append(tiles.forward(block, tile))
        state = parts[0] if len(parts) == 1 else R.join(parts)
        states.append(state)
        stats = R.finish(state, self.spec)
        loss, coef = self._coefficients(chunk, stats, R.log_sum_sq_probs(state, stats, self.spec))
        last = starts[-1]
        if overlaid is not None:
            first = block_of(0, step)
            tiles.backward(first, *R.cut(stats, coef, 0, step), sinks, overlaid=overlaid, scratch="scratch")
            block = block_of(last, n)
        tiles.backward(block, *R.cut(stats, coef, last, n), sinks, tile)
        if len(starts) > 1:
            numbers = tiles.indices(begin, begin + n) if index is None else index
            engine.recompute(tiles, stats, coef, sinks, numbers, step if overlaid is not None else 0, last)
        return loss

    def _coefficients(
        self, chunk: Chunk, stats: R.RowStats, log_sum_sq_probs: Tensor | None
    ) -> tuple[Tensor, R.RowCoef]:
        """Loss of a chunk and, by autograd on its log-probs alone, the gradient coefficients of its rows."""
        entropy = stats.entropy if self.entropy_grad else None
        leaves = [t.detach().requires_grad_() for t in (stats.logps, stats.lse, entropy) if t is not None]
        scored = LinearLogps(*leaves)._replace(log_sum_sq_probs=log_sum_sq_probs)
        if entropy is None:
            scored = scored._replace(entropy=stats.entropy)
        with torch.enable_grad():
            loss = chunk.losses(self.loss_fn, self.layout, scored).sum() / self.denominator
        if not loss.requires_grad:
            return loss, R.coefficients(stats, None, None, None)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        return loss.detach(), R.coefficients(stats, grads[0], grads[1], grads[2] if len(grads) > 2 else None)

    def _assemble(self, tiles: Tiles, states: list[R.RowState], positions: list[np.ndarray]) -> LinearLogps:
        """Outputs of all scored rows, detached, in the order of the rows."""
        state = R.join(states) if states else R.RowState.start(0, self.spec, tiles.device, tiles.wide)
        order = np.argsort(np.concatenate(positions)) if positions else np.arange(0)
        if (order[1:] < order[:-1]).any():
            index = on_device(order, tiles.device)
            state = R.RowState(state.values[:, index], state.argmax[index] if self.spec.top1 else state.argmax)
        stats = R.finish(state, self.spec)
        targets = tiles.targets.index_select(0, tiles.rows) if tiles.rows is not None else tiles.targets
        return LinearLogps(
            stats.logps, stats.lse, stats.entropy, state.argmax == targets if self.spec.top1 else None,
            R.log_sum_sq_probs(state, stats, self.spec), engine.mean_logits(tiles, state) if self.mean_logits else None,
        )  # fmt: skip


class _Streamed(torch.autograd.Function):
    """The loss with its gradients already computed for grad_output = 1; backward scales and casts them once."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, job):
        loss, tiles, sinks = job.run(hidden, weight, bias, targets)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.sinks = sinks
        return loss.to(torch.float64 if tiles.wide == torch.float64 else torch.float32)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        sinks, ctx.sinks = ctx.sinks, None
        if sinks is None:
            raise RuntimeError(
                "a second backward through a streamed loss: its gradients were handed out by the first. "
                "Call the loss again, or use schedule='deferred'"
            )
        # a loss scale of 1 is known for free on the CPU; on a GPU asking would cost a synchronisation
        unscaled = grad_output.device.type == "cpu" and grad_output.item() == 1.0
        grads: list[Tensor | None] = []
        for grad, dtype in zip((sinks.hidden, sinks.weight, sinks.bias), ctx.dtypes, strict=True):
            if grad is None:
                grads.append(None)
                continue
            if unscaled or grad.dtype == dtype or grad.device.type == "cpu":
                grads.append((grad if unscaled else grad.mul_(grad_output)).to(dtype))
            else:  # scaled and rounded in one pass
                grads.append(torch.mul(grad, grad_output, out=torch.empty_like(grad, dtype=dtype)))
        return (*grads, None, None)
