"""Per-token log-probs of a linear head, differentiable, without the [tokens, vocabulary] logits.

    z = softcap·tanh(logit_scale·u / softcap) / temperature,   u = hidden @ weight.T + bias      (no softcap: logit_scale·u / temperature)
    logps = z_y − logsumexp_v z_v

Two `torch.library` custom ops, forward and backward, each a loop of fastalign.ops.engine over tiles. What the backward needs
(row statistics, kept exponentials, D of the frozen schedule) leaves the forward as further outputs; absent ones are empty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastalign.ops import backends, engine
from fastalign.ops import rows as R
from fastalign.ops.schedule import DEFAULT_WORKSPACE_MB, Plan, align, choose, plan
from fastalign.ops.tiles import Sinks, Tiles
from fastalign.types import IGNORE_INDEX, LinearLogps

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def linear_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, temperature: float = 1.0,
    logit_scale: float = 1.0, softcap: float | None = None, ignore_index: int = IGNORE_INDEX, entropy: bool = False,
    top1: bool = False, log_sum_sq_probs: bool = False, mean_logits: bool = False, rows: Tensor | None = None,
    backend: str = "auto", schedule: str = "auto", workspace_mb: float | None = None,
) -> LinearLogps:  # fmt: skip
    """Log-probs of the targets under a linear head, and what else one pass over the vocabulary can give.

    Args:
        hidden: (..., H) float32, bfloat16 or float16 (float64 on backend="torch", for gradient checks).
        weight: (V, H), hidden's dtype. Under autocast both are taken in autocast's dtype, the weight slab by slab, and a
            float32 weight gets a float32 gradient that was never rounded to 16 bits.
        targets: (...) int64, hidden's leading shape. `ignore_index` marks tokens that are not scored: they cost no FLOP.
        bias: (V,) or None.
        temperature, logit_scale, softcap: see the formula above; softcap=None is none.
        entropy: also −Σ p log p, nats, differentiable. top1: whether the target is the first argmax.
        log_sum_sq_probs: log Σ p², no gradient. mean_logits: mean_v z_v, no gradient.
        rows: (n,) int64, flat indices of the tokens that count, known on the host (a collator has them). Without it the op
            finds them, which costs one device synchronisation where hidden is on a GPU.
        backend: "auto", "torch", "cpu" or "triton".
        schedule: "auto", or "deferred", "cached", "frozen", "forward": fastalign.ops.schedule.
        workspace_mb: MiB of working memory beside inputs and gradients; default {"cpu": 128, "cuda": 1024}.
    Returns:
        LinearLogps(logps, lse, entropy, is_top1, log_sum_sq_probs, mean_logits) of targets' shape, float32 (is_top1 bool),
        0 where ignored. Gradients flow from logps, lse and entropy to hidden, weight and bias.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a target out of range (CPU tensors), an option that cannot run.

    Source: the recomputing backward is that of Cut Cross-Entropy (arXiv 2411.09009), without atomics or filtering.
    """
    hidden, weight, bias = check_head(hidden, weight, targets, bias, rows)
    spec = row_spec(temperature, logit_scale, softcap, entropy, top1, log_sum_sq_probs, mean_logits)
    shape = targets.shape
    flat_hidden, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    needs = needed_gradients(flat_hidden, weight, bias)
    workspace = workspace_bytes(workspace_mb, hidden.device.type)
    name, kept_rows = _schedule(flat_hidden, weight, rows, needs, schedule, workspace, spec)
    out = torch.ops.fastalign.linear_logps(
        flat_hidden, weight, bias, flat_targets, rows, spec.in_scale, spec.out_scale, spec.softcap, ignore_index,
        [entropy, top1, log_sum_sq_probs, mean_logits], list(needs), backend, name, kept_rows, workspace,
    )  # fmt: skip
    logps, lse, ent, is_top1, log_sum_sq, mean = (
        t.view(shape) if t.numel() or not shape.numel() else None for t in out[:6]
    )
    if not shape.numel():
        ent, is_top1, log_sum_sq, mean = (
            t if wanted else None
            for t, wanted in zip(
                (ent, is_top1, log_sum_sq, mean), (entropy, top1, log_sum_sq_probs, mean_logits), strict=True
            )
        )
    assert logps is not None
    assert lse is not None
    return LinearLogps(logps, lse, ent, is_top1, log_sum_sq, mean)


def linear_logps_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, temperature: float = 1.0,
    logit_scale: float = 1.0, softcap: float | None = None, ignore_index: int = IGNORE_INDEX,
) -> LinearLogps:  # fmt: skip
    """The formula, differentiable, with the logits in memory: for tests, in whatever dtype it is given."""
    u = hidden @ weight.T + (0 if bias is None else bias)
    z = (logit_scale * u if softcap is None else softcap * torch.tanh(logit_scale * u / softcap)) / temperature
    counts = targets != ignore_index
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    logps = log_p.gather(-1, torch.where(counts, targets, 0)[..., None])[..., 0]
    outputs = (
        logps,
        z.logsumexp(-1),
        -(p * log_p).sum(-1),
        z.argmax(-1) == targets,
        p.square().sum(-1).log(),
        z.mean(-1),
    )
    return LinearLogps(*(torch.where(counts, out, torch.zeros_like(out)) for out in outputs))


# ---- arguments


def workspace_bytes(workspace_mb: float | None, device_type: str) -> int:
    if workspace_mb is None:
        workspace_mb = DEFAULT_WORKSPACE_MB.get(device_type, DEFAULT_WORKSPACE_MB["cuda"])
    if not workspace_mb > 0 or not math.isfinite(workspace_mb):
        raise ValueError(f"workspace_mb must be a positive number of MiB, got {workspace_mb!r}")
    return int(workspace_mb * 2**20)


def needed_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[bool, bool, bool]:
    if not torch.is_grad_enabled():
        return False, False, False
    return hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad


def check_head(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Validate what a caller can get wrong; returns the tensors in autocast's dtype where it is on."""
    if weight.dim() != 2:
        raise ValueError(f"weight must be (V, H), got shape {tuple(weight.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be (..., {weight.shape[1]}) to fit weight {tuple(weight.shape)}, got {tuple(hidden.shape)}"
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets must have hidden's leading shape {tuple(hidden.shape[:-1])}, got {tuple(targets.shape)}"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must be ({weight.shape[0]},) to fit weight {tuple(weight.shape)}, got {tuple(bias.shape)}"
        )
    if rows is not None and (rows.dim() != 1 or rows.dtype != torch.int64):
        raise ValueError(f"rows must be (n,) int64, got shape {tuple(rows.shape)} {rows.dtype}")
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}; they must share a device")
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden = hidden.to(dtype)
        if weight.dtype not in (dtype, torch.float32):
            weight = weight.to(dtype)
    elif weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}: give both in one dtype, or use torch.autocast"
        )
    if hidden.dtype not in DTYPES:
        raise ValueError(f"hidden must be float32, bfloat16 or float16, got {hidden.dtype}")
    return hidden, weight, bias


def row_spec(
    temperature: float, logit_scale: float, softcap: float | None, entropy: bool, top1: bool, sum_sq: bool, mean: bool
) -> R.RowSpec:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    return R.RowSpec.make(
        temperature=float(temperature), logit_scale=float(logit_scale), softcap=None if softcap is None else float(softcap),
        entropy=entropy, top1=top1, sum_sq=sum_sq, sum_z=mean and softcap is not None,
    )  # fmt: skip


def _schedule(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    needs: tuple[bool, bool, bool],
    schedule: str,
    workspace: int,
    spec: R.RowSpec,
) -> tuple[str, int]:
    """(schedule, rows kept for the backward), decided where sizes are plain integers."""
    if schedule == "streamed":
        choose(needs, None, schedule)
    if torch.compiler.is_compiling() and schedule != "cached":
        # how much is kept depends on the row count, which must stay symbolic: compiled graphs keep nothing unless asked to
        return choose(needs, None, schedule)[0], 0
    chosen = _plan_for(
        hidden, weight, hidden.shape[0] if rows is None else rows.shape[0], needs, schedule, workspace, spec
    )
    return chosen.schedule, chosen.kept_rows


def _plan_for(
    hidden: Tensor, weight: Tensor, n: int, needs: Sequence[bool], schedule: str, workspace: int, spec: R.RowSpec
) -> Plan:
    device_type = hidden.device.type if hidden.device.type in DEFAULT_WORKSPACE_MB else "cuda"
    return plan(
        n, weight.shape[1], weight.shape[0], dtype=hidden.dtype, weight_dtype=weight.dtype, device_type=device_type,
        needs=(needs[0], needs[1], needs[2]), workspace_bytes=workspace, schedule=schedule, num_tokens=hidden.shape[0],
        cacheable=not (spec.softcap or spec.entropy),
    )  # fmt: skip


# ---- the custom ops


def scored_rows(targets: Tensor, rows: Tensor | None, ignore_index: int, V: int) -> tuple[Tensor | None, int]:
    """(indices of the rows that count or None for all of them, their count). Synchronises when `rows` is None."""
    if rows is not None:
        if rows.device != targets.device:
            rows = rows.to(targets.device, non_blocking=True)
        n = rows.shape[0]
    else:
        counts = targets != ignore_index
        if bool(counts.all()):
            n = targets.shape[0]
        else:
            rows = counts.nonzero()[:, 0]
            n = rows.shape[0]
    if targets.device.type == "cpu" and n:
        if rows is not None and not (int(rows.min()) >= 0 and int(rows.max()) < targets.shape[0]):
            raise ValueError(f"rows must lie in [0, {targets.shape[0]}), got {int(rows.min())} to {int(rows.max())}")
        picked = targets if rows is None else targets[rows]
        bad = (picked < 0) | (picked >= V)
        if bool(bad.any()):
            at = int(bad.nonzero()[0, 0])
            row = at if rows is None else int(rows[at])
            raise ValueError(
                f"targets[{row}] = {int(targets[row])} is out of range: the vocabulary has {V} entries "
                f"(ignored tokens are {ignore_index}, and must not be listed in rows)"
            )
    return rows, n


@torch.library.custom_op("fastalign::linear_logps", mutates_args=())
def _linear_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None, in_scale: float,
    out_scale: float, softcap: bool, ignore_index: int, flags: list[bool], needs: list[bool], backend: str, schedule: str,
    kept_rows: int, workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(logps, lse, entropy, is_top1, log_sum_sq_probs, mean_logits; stats, found rows, count, kept, frozen)"""
    tiles, found = _bind(
        hidden,
        weight,
        bias,
        targets,
        rows,
        in_scale,
        out_scale,
        softcap,
        ignore_index,
        flags,
        needs,
        backend,
        schedule,
        workspace,
    )
    n, N = tiles.plan.n, targets.shape[0]
    scored = engine.forward(tiles)
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
    mean = mean_logits_of(tiles, state) if flags[3] else None
    top1_out = hidden.new_empty(0, dtype=torch.bool) if is_top1 is None else spread(is_top1)
    upper = N if rows is None else n
    saved = hidden.new_zeros(5, upper, dtype=tiles.wide)
    if any(needs):
        for row, values in zip(saved, stats, strict=True):
            if values is not None:
                row[:n].copy_(values)
    found_out = targets.new_empty(0)
    if found is not None and any(needs):
        found_out = targets.new_zeros(N)
        found_out[:n].copy_(found)
    kept = hidden.new_empty(0) if scored.kept is None else (scored.kept.t() if tiles.vocab_major else scored.kept)
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
    )  # fmt: skip


def _bind(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None, in_scale: float,
    out_scale: float, softcap: bool, ignore_index: int, flags: list[bool], needs: list[bool], backend: str, schedule: str,
    workspace: int, known: tuple[Tensor | None, int] | None = None,
) -> tuple[Tiles, Tensor | None]:  # fmt: skip
    """The call as Tiles, and the row indices if they had to be found."""
    spec = R.RowSpec(
        in_scale=in_scale, out_scale=out_scale, softcap=softcap, entropy=flags[0], top1=flags[1], sum_sq=flags[2],
        sum_z=flags[3] and softcap,
    )  # fmt: skip
    indices, n = known if known is not None else scored_rows(targets, rows, ignore_index, weight.shape[0])
    upper = targets.shape[0] if rows is None else n
    bound = _plan_for(hidden, weight, upper, needs, schedule, workspace, spec)
    bound = replace(bound, n=n, kept_rows=min(bound.kept_rows, n))
    tiles = Tiles(hidden, weight, bias, targets, indices, spec, bound, backends.resolve(backend, hidden))
    return tiles, indices if rows is None else None


def mean_logits_of(tiles: Tiles, state: R.RowState) -> Tensor:
    """mean_v z_v; without a softcap it is linear in hidden and needs the vocabulary's mean row only."""
    spec = tiles.spec
    if spec.softcap:
        return state.values[R.SUM_Z] / tiles.V
    mean_row = tiles.weight.mean(0, dtype=tiles.wide)
    shift = 0.0 if tiles.bias is None else tiles.bias.mean(dtype=tiles.wide)
    parts = [block.h[: block.n].to(tiles.wide) @ mean_row for block in tiles.blocks()]
    means = torch.cat(parts) if parts else mean_row.new_empty(0)
    return (means + shift) * spec.in_scale


@_linear_logps.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None, in_scale: float,
    out_scale: float, softcap: bool, ignore_index: int, flags: list[bool], needs: list[bool], backend: str, schedule: str,
    kept_rows: int, workspace: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    N = targets.shape[0]
    upper = N if rows is None else rows.shape[0]

    def per_token(wanted: bool, dtype: torch.dtype = wide) -> Tensor:
        return hidden.new_empty(N if wanted else 0, dtype=dtype)

    kept_shape: tuple[int, ...] = (0,)
    if kept_rows:
        rows_kept = align(kept_rows)
        kept_shape = (weight.shape[0], rows_kept) if hidden.device.type == "cpu" else (rows_kept, weight.shape[0])
    frozen_shape = (upper, hidden.shape[1]) if schedule == "frozen" else (0,)
    return (
        per_token(True), per_token(True), per_token(flags[0]), per_token(flags[1], torch.bool), per_token(flags[2]),
        per_token(flags[3]), hidden.new_empty(5, upper, dtype=wide), targets.new_empty(N if rows is None and any(needs) else 0),
        torch.empty((), dtype=torch.int64, device="cpu"), hidden.new_empty(kept_shape), hidden.new_empty(frozen_shape, dtype=wide),
    )  # fmt: skip


@torch.library.custom_op("fastalign::linear_logps_backward", mutates_args=())
def _linear_logps_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None, stats: Tensor, found: Tensor,
    count: Tensor, kept: Tensor, frozen: Tensor, grad_logps: Tensor | None, grad_lse: Tensor | None,
    grad_entropy: Tensor | None, in_scale: float, out_scale: float, softcap: bool, flags: list[bool], planned: list[bool],
    needs: list[bool], backend: str, schedule: str, workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    n = int(count)
    indices = found[:n] if rows is None and n < targets.shape[0] else rows
    if indices is not None:
        indices = indices.to(targets.device, non_blocking=True)
    tiles, _ = _bind(
        hidden, weight, bias, targets, rows, in_scale, out_scale, softcap, 0, flags, planned, backend, schedule, workspace,
        known=(indices, n),
    )  # fmt: skip
    row_stats = R.RowStats(*stats[:, :n])

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
        tiles.plan = _plan_for(hidden, weight, n, needs, "deferred", workspace, tiles.spec)
    coef = R.coefficients(row_stats, a, c, e)
    sinks = make_sinks(tiles, needs)
    kept_tile = (kept.t() if tiles.vocab_major else kept) if kept.numel() else None
    engine.backward(tiles, row_stats, coef, sinks, kept_tile)
    grads = finish_sinks(tiles, sinks)
    return tuple(empty if grad is None else grad for grad, empty in zip(grads, absent, strict=True))  # type: ignore[return-value]


def make_sinks(tiles: Tiles, needs: Sequence[bool], *, accumulate: bool = False) -> Sinks:
    """Gradient buffers: in the result's dtype where it is written once (or is wide), else a wide accumulator."""
    N, V = tiles.hidden.shape[0], tiles.V
    whole = tiles.rows is None and not accumulate
    hidden = weight = bias = None
    if needs[0]:
        dtype = tiles.wide if accumulate else tiles.hidden.dtype
        new = tiles.hidden.new_empty if whole else tiles.hidden.new_zeros
        hidden = new((N, tiles.hidden.shape[1]), dtype=dtype)
    if needs[1]:
        one_tile = not accumulate and tiles.plan.n <= tiles.plan.rows and not 0 < tiles.plan.kept_rows < tiles.plan.n
        dtype = tiles.weight.dtype if one_tile else torch.promote_types(tiles.weight.dtype, torch.float32)
        weight = (tiles.weight.new_empty if tiles.plan.n else tiles.weight.new_zeros)(tiles.weight.shape, dtype=dtype)
    if needs[2]:
        bias = tiles.weight.new_zeros(V, dtype=tiles.wide)
    return Sinks(hidden, weight, bias)


def finish_sinks(tiles: Tiles, sinks: Sinks) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    hidden = None if sinks.hidden is None else sinks.hidden.to(tiles.hidden.dtype)
    weight = None if sinks.weight is None else sinks.weight.to(tiles.weight.dtype)
    bias = None if sinks.bias is None or tiles.bias is None else sinks.bias.to(tiles.bias.dtype)
    return hidden, weight, bias


@_linear_logps_backward.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None, stats: Tensor, found: Tensor,
    count: Tensor, kept: Tensor, frozen: Tensor, grad_logps: Tensor | None, grad_lse: Tensor | None,
    grad_entropy: Tensor | None, in_scale: float, out_scale: float, softcap: bool, flags: list[bool], planned: list[bool],
    needs: list[bool], backend: str, schedule: str, workspace: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        weight.new_empty(0) if bias is None else bias.new_empty(bias.shape if needs[2] else (0,)),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    (
        hidden,
        weight,
        bias,
        targets,
        rows,
        in_scale,
        out_scale,
        softcap,
        _,
        flags,
        needs,
        backend,
        schedule,
        _,
        workspace,
    ) = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[3], output[4], output[5], *output[6:])
    ctx.save_for_backward(hidden, weight, bias, targets, rows, *output[6:])
    ctx.settings = (in_scale, out_scale, softcap, flags, needs)
    ctx.how = (backend, schedule, workspace)


def _backward(ctx, grad_logps, grad_lse, grad_entropy, *_) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
    nothing = (None,) * 12
    if not ctx.settings[3][0]:  # the absent entropy is an empty tensor, and so would be its gradient
        grad_entropy = None
    if not any(needs) or (grad_logps is None and grad_lse is None and grad_entropy is None):
        return (None, None, None, *nothing)
    hidden, weight, bias, targets, rows, *saved = ctx.saved_tensors
    in_scale, out_scale, softcap, flags, planned = ctx.settings
    grads = torch.ops.fastalign.linear_logps_backward(
        hidden, weight, bias, targets, rows, *saved, grad_logps, grad_lse, grad_entropy, in_scale, out_scale, softcap, flags,
        planned, needs, *ctx.how,
    )  # fmt: skip
    return (*(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *nothing)


_linear_logps.register_autograd(_backward, setup_context=_setup_context)
