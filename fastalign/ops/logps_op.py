"""The custom ops behind `linear_logps`: forward and backward, with fakes and autograd.

Each is a loop of fastalign.ops.engine over tiles. What the backward needs (row statistics, kept tiles, D of the frozen
schedule) leaves the forward as further outputs, because a custom op has no other way to save; absent ones are empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastalign.ops import backends, devices, engine, live
from fastalign.ops import rows as R
from fastalign.ops.arguments import scored_rows
from fastalign.ops.gpu_call import Kernels, pitch
from fastalign.ops.schedule import Plan, plan
from fastalign.ops.sinks import finish_sinks, make_sinks
from fastalign.ops.tile_sizes import align
from fastalign.ops.tiles import Tiles
from fastalign.ops.uploads import on_device


def plan_for(
    hidden: Tensor, weight: Tensor, n: int, needs: Sequence[bool], schedule: str, workspace: int | None,
    spec: R.RowSpec, backend: str, *, skip_rows: str = "auto", group_rows: int | None = None,
    gathered: bool = True, entropy_grad: bool = True,
) -> Plan:  # fmt: skip
    """The plan of a call on these tensors. entropy_grad: whether the entropy, if asked for, may get a gradient."""
    style = devices.gemm_style(hidden.device)
    kernels = None if style == "cpu" else _kernels(hidden, weight, backend)
    if kernels is not None and skip_rows != "never" and live.served(backends.resolve(backend, hidden), hidden.device):
        gathered = True  # live rows are
    return plan(
        n, weight.shape[1], weight.shape[0], dtype=hidden.dtype, weight_dtype=weight.dtype, device_type=style,
        needs=(needs[0], needs[1], needs[2]), workspace_bytes=workspace, schedule=schedule, num_tokens=hidden.shape[0],
        cacheable=not (spec.softcap or (spec.entropy and entropy_grad)), group_rows=group_rows, gathered=gathered,
        sums=2 + spec.entropy + spec.top1 + spec.sum_sq + spec.sum_z,
        arch=backends.architecture(hidden.device), kernels=kernels,
    )  # fmt: skip


def _kernels(hidden: Tensor, weight: Tensor, backend: str) -> Kernels:
    """What the backend's GEMM kernels can do for these tensors; float32 products are the library's."""
    if hidden.dtype != weight.dtype or hidden.dtype.itemsize != 2:
        return Kernels()
    found = backends.resolve(backend, hidden)
    return Kernels(forward=found.fused_forward is not None, exponentials=found.fused_exponentials is not None)


SAVED_ROWS = 6  # those of RowStats, and the reference of kept exponentials


@torch.library.custom_op("fastalign::linear_logps", mutates_args=())
def _linear_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None, every: bool,
    in_scale: float, out_scale: float, softcap: bool, ignore_index: int, flags: list[bool], needs: list[bool],
    backend: str, schedule: str, kept_rows: int, workspace: int, skip_rows: str, overlay_dtype: torch.dtype | None,
    into: Tensor | None,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """(logps, lse, entropy, is_top1, log_sum_sq_probs, mean_logits; stats, rows, count, kept, frozen, overlaid)

    every: all rows count, which the caller knows; then `rows` is None. flags: entropy, top1, log_sum_sq_probs,
    mean_logits, and whether the entropy may get a gradient. skip_rows, into: for the backward.
    """
    known = (None, targets.shape[0]) if every else scored_rows(targets, rows, ignore_index, weight.shape[0])
    found = None if rows is not None else known[0]
    tiles = _bind(
        hidden, weight, bias, targets, rows, every, in_scale, out_scale, softcap, flags, needs, backend, schedule,
        workspace, skip_rows, known,
    )  # fmt: skip
    n, N = tiles.plan.n, targets.shape[0]
    scored = engine.forward(tiles, overlay_dtype)
    tiles.workspace.release()
    stats, spec = scored.stats, tiles.spec

    def spread(values: Tensor | None, wanted: bool = True) -> Tensor:
        if values is None or not wanted:
            return hidden.new_empty(0, dtype=tiles.wide)
        if tiles.rows is None:
            return values.contiguous().clone()
        return values.new_zeros(N).index_copy_(0, tiles.rows, values)

    state = scored.state
    is_top1 = state.argmax == (targets if tiles.rows is None else targets[tiles.rows]) if spec.top1 else None
    log_sum_sq = state.values[R.SUM_SQ].log() - 2 * stats.log_sum if spec.sum_sq else None
    mean = engine.mean_logits(tiles, state) if flags[3] else None
    top1_out = hidden.new_empty(0, dtype=torch.bool) if is_top1 is None else spread(is_top1)
    upper = N if rows is None else n
    saved = hidden.new_zeros(SAVED_ROWS, upper, dtype=tiles.wide)
    if any(needs):
        for row, values in zip(saved, (*stats, scored.reference), strict=True):
            if values is not None:
                row[: len(values)].copy_(values)
    found_out = targets.new_empty(0)
    if found is not None and any(needs):
        found_out = targets.new_zeros(N)
        found_out[:n].copy_(found)
    kept = hidden.new_empty(0)
    if scored.kept is not None:  # whole rows of memory: an output is no view of one
        kept = scored.kept.t() if tiles.vocab_major else tiles.whole_rows(scored.kept)
    frozen = hidden.new_empty(0, dtype=tiles.wide)
    if scored.frozen is not None:
        frozen = (
            scored.frozen
            if rows is not None or n == N
            else torch.cat([scored.frozen, scored.frozen.new_zeros(N - n, hidden.shape[1])])
        )
    return (
        spread(stats.logps), spread(stats.lse), spread(stats.entropy), top1_out, spread(log_sum_sq), spread(mean),
        saved, found_out, torch.tensor(n), kept, frozen,
        weight.new_empty(0) if scored.overlaid is None else scored.overlaid,
    )  # fmt: skip


def _bind(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None, every: bool,
    in_scale: float, out_scale: float, softcap: bool, flags: list[bool], needs: list[bool], backend: str,
    schedule: str, workspace: int, skip_rows: str, known: tuple[Tensor | None, int],
) -> Tiles:  # fmt: skip
    """The call as Tiles. known: the indices of the rows that count (None: all), and their number."""
    spec = R.RowSpec(
        in_scale=in_scale, out_scale=out_scale, softcap=softcap, entropy=flags[0], top1=flags[1], sum_sq=flags[2],
        sum_z=flags[3] and softcap,
    )  # fmt: skip
    indices, n = known
    upper = targets.shape[0] if rows is None else n
    bound = plan_for(
        hidden, weight, upper, needs, schedule, workspace, spec, backend, skip_rows=skip_rows, gathered=not every,
        entropy_grad=flags[4],
    )  # fmt: skip
    bound = replace(bound, n=n, kept_rows=min(bound.kept_rows, n), overlaid_rows=min(bound.overlaid_rows, n))
    return Tiles(hidden, weight, bias, targets, indices, spec, bound, backends.resolve(backend, hidden), skip_rows)


@_linear_logps.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None, every: bool,
    in_scale: float, out_scale: float, softcap: bool, ignore_index: int, flags: list[bool], needs: list[bool],
    backend: str, schedule: str, kept_rows: int, workspace: int, skip_rows: str, overlay_dtype: torch.dtype | None,
    into: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    N = targets.shape[0]
    upper = N if rows is None else rows.shape[0]

    def per_token(wanted: bool, dtype: torch.dtype = wide) -> Tensor:
        return hidden.new_empty(N if wanted else 0, dtype=dtype)

    kept_shape: tuple[int, ...] = (0,)
    if kept_rows:
        rows_kept = align(kept_rows)
        on_cpu = devices.gemm_style(hidden.device) == "cpu"
        kept_shape = (weight.shape[0], rows_kept) if on_cpu else (rows_kept, pitch(weight.shape[0]))
    frozen_shape = (upper, hidden.shape[1]) if schedule == "frozen" else (0,)
    searched = rows is None and not every and any(needs)
    return (
        per_token(True), per_token(True), per_token(flags[0]), per_token(flags[1], torch.bool), per_token(flags[2]),
        per_token(flags[3]), hidden.new_empty(SAVED_ROWS, upper, dtype=wide), targets.new_empty(N if searched else 0),
        torch.empty((), dtype=torch.int64, device="cpu"), hidden.new_empty(kept_shape),
        hidden.new_empty(frozen_shape, dtype=wide),
        weight.new_empty(0) if overlay_dtype is None else weight.new_empty(weight.shape, dtype=overlay_dtype),
    )  # fmt: skip


@torch.library.custom_op("fastalign::linear_logps_backward", mutates_args=("kept", "overlaid", "into"))
def _linear_logps_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None, stats: Tensor,
    found: Tensor, count: Tensor, kept: Tensor, frozen: Tensor, overlaid: Tensor, into: Tensor | None,
    grad_logps: Tensor | None, grad_lse: Tensor | None, grad_entropy: Tensor | None, every: bool, in_scale: float,
    out_scale: float, softcap: bool, flags: list[bool], planned: list[bool], needs: list[bool], backend: str,
    schedule: str, workspace: int, skip_rows: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(hidden, weight, bias) gradients, empty where not needed; with `overlaid` weight's is left in there instead, with
    `into` it is added there."""
    n = int(count)
    indices = found[:n] if rows is None and n < targets.shape[0] else rows
    if indices is not None:
        indices = on_device(indices, targets.device)
    tiles = _bind(
        hidden, weight, bias, targets, rows, every, in_scale, out_scale, softcap, flags, planned, backend, schedule,
        workspace, skip_rows, (indices, n),
    )  # fmt: skip
    row_stats = R.RowStats(*stats[:5, :n])

    def pick(grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        grad = grad.to(tiles.wide)
        return grad if indices is None else grad.index_select(0, indices)

    a, c, e = pick(grad_logps), pick(grad_lse), pick(grad_entropy)
    absent = hidden.new_empty(0), weight.new_empty(0), weight.new_empty(0) if bias is None else bias.new_empty(0)
    if schedule == "frozen" and e is None:
        grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        engine.frozen_backward(tiles, row_stats, frozen, a, c, grad_hidden)
        return grad_hidden, *absent[1:]
    if schedule == "frozen":  # D does not carry the entropy's gradient: compute the logits again
        tiles.plan = plan_for(hidden, weight, n, needs, "deferred", workspace, tiles.spec, backend, skip_rows=skip_rows)
    coef = R.coefficients(row_stats, a, c, e)
    reuse = overlaid if overlaid.numel() else None
    sinks = make_sinks(tiles, needs, weight=reuse, into=into)
    kept_tile = (kept.t() if tiles.vocab_major else kept[:, : weight.shape[0]]) if kept.numel() else None
    direct = tiles.plan.exponentials and not tiles.plan.transit_rows
    engine.backward(tiles, row_stats, coef, sinks, kept_tile, reuse, stats[5] if direct else None)
    tiles.workspace.release()
    if reuse is not None or into is not None:
        sinks.weight = None
    grads = finish_sinks(tiles, sinks)
    return tuple(empty if grad is None else grad for grad, empty in zip(grads, absent, strict=True))  # type: ignore[return-value]


@_linear_logps_backward.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None, stats: Tensor,
    found: Tensor, count: Tensor, kept: Tensor, frozen: Tensor, overlaid: Tensor, into: Tensor | None,
    grad_logps: Tensor | None, grad_lse: Tensor | None, grad_entropy: Tensor | None, every: bool, in_scale: float,
    out_scale: float, softcap: bool, flags: list[bool], planned: list[bool], needs: list[bool], backend: str,
    schedule: str, workspace: int, skip_rows: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] and overlaid.dim() == 1 and into is None else (0,)),
        weight.new_empty(0) if bias is None else bias.new_empty(bias.shape if needs[2] else (0,)),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, bias, targets, rows, every, in_scale, out_scale, softcap, _, flags, needs, *how, into = inputs
    backend, schedule, _, workspace, skip_rows, _ = how
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*([] if flags[4] else [output[2]]), *output[3:])
    ctx.save_for_backward(hidden, weight, bias, targets, rows, *output[6:])
    ctx.settings = (every, in_scale, out_scale, softcap, flags, needs)
    ctx.how = (backend, schedule, workspace, skip_rows)
    ctx.overwritten = False
    ctx.into = into  # not a saved tensor: other calls may add to it before this one's backward


def _backward(ctx, grad_logps, grad_lse, grad_entropy, *_) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
    nothing = (None,) * 16
    flags = ctx.settings[4]
    if not (flags[0] and flags[4]):  # the absent entropy is an empty tensor, and so would be its gradient
        grad_entropy = None
    if not any(needs) or (grad_logps is None and grad_lse is None and grad_entropy is None):
        return (None, None, None, *nothing)
    hidden, weight, bias, targets, rows, stats, found, count, kept, frozen, overlaid = ctx.saved_tensors
    # The overlaid memory leaves with the gradient, as a tensor of its own: so the saved one's version does not move and
    # nobody sees two owners and copies it. Once overwritten (retain_graph), all logits are computed again. What is kept
    # serves again as it is left, but its version would move too.
    overlaid = weight.new_empty(0) if overlaid.dim() == 1 or ctx.overwritten else overlaid.data
    kept = kept.data if kept.numel() else hidden.new_empty(0)
    ctx.overwritten = True  # before the work begins: it may fail half-way
    grads = torch.ops.fastalign.linear_logps_backward(
        hidden, weight, bias, targets, rows, stats, found, count, kept, frozen, overlaid, ctx.into, grad_logps,
        grad_lse, grad_entropy, *ctx.settings, needs, *ctx.how,
    )  # fmt: skip
    grads = [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]
    if ctx.into is not None:
        grads[1] = None
    elif overlaid.dim() == 2:
        grads[1] = overlaid.to(weight.dtype)
    return (*grads, *nothing)


_linear_logps.register_autograd(_backward, setup_context=_setup_context)
