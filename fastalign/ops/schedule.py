"""The planner: shapes and a workspace budget in, a schedule and its predicted bytes out. Integers only, pure.

    schedule    when ∂L/∂logps is known               GEMMs (1 GEMM = 2·N·H·V FLOP)
    forward     never: no gradient is needed          1
    deferred    in backward, after any loss           2 + one per gradient (hidden, weight): the logits are computed
    twice
    overlaid    as deferred, but the float32 logits of `overlaid_rows` rows wait for the backward in the memory that
                      the weight's gradient is about to take: no more bytes at the peak, as few GEMMs as streamed
                      where N ≤ H     between (1 + gradients) and (2 + gradients)
    cached      as deferred, but the logits (float32 inputs) or exp(z − max) (16-bit inputs) of `kept_rows` rows stay
                                                      between (1 + gradients) and (2 + gradients)
    frozen      in backward; only hidden needs one    2: the forward keeps D = Σ_v (onehot − p)_v ∂z_v/∂u_v W_v per row
    streamed    as soon as a group of rows is done    1 + one per gradient; groups over the budget run deferred inside.
                      "auto" overlays instead where all rows fit: as many GEMMs, in larger tiles, without a workspace

A call works on tiles of `rows` rows. The vocabulary is walked in slabs of `slab` columns, one GEMM and one row kernel
each; a tile that must outlive its slab (`keep`) spans the vocabulary. Everything a call allocates beside its inputs and
results is in `workspace_bytes`, which stays within the budget as long as the budget holds one minimal tile.

The default budget is `DEFAULT_WORKSPACE_MB` per device type. It is a constant: never derived from free memory, so that
the same call does the same work everywhere. Accelerators have rules of their own, in fastalign.ops.gpu_schedule.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastalign.ops.devices import device_of
from fastalign.ops.gpu_call import Call, Kernels
from fastalign.ops.gpu_schedule import gpu_plan
from fastalign.ops.plans import DEFAULT_WORKSPACE_MB, SCHEDULES, Plan, accumulators, choose, default_budget
from fastalign.ops.tile_sizes import ROW_ALIGN, Costs, align, head_costs, slab_tiles, whole_tiles

__all__ = ["DEFAULT_WORKSPACE_MB", "SCHEDULES", "Kernels", "Plan", "choose", "default_budget", "plan"]


def plan(
    n: int, H: int, V: int, *, dtype: torch.dtype = torch.float32, device_type: str = "cpu",
    needs: tuple[bool, bool, bool] = (True, True, False), group_rows: int | None = None,
    workspace_bytes: int | None = None, schedule: str = "auto", weight_dtype: torch.dtype | None = None,
    num_tokens: int | None = None, cacheable: bool = True, arch: str = "sm_90", kernels: Kernels | None = None,
    gathered: bool = True, sums: int = 2,
) -> Plan:  # fmt: skip
    """Choose the schedule for n scored rows.

    Args:
        n: rows that count (ignored ones are dropped before). `num_tokens`: all rows of hidden, for the gradient's
            bytes.
        H, V: hidden size, vocabulary size.
        dtype: the compute dtype (hidden's); weight_dtype: the weight's own, if another (autocast).
        device_type: "cpu" or "cuda".
        needs: whether hidden, weight and bias need a gradient.
        group_rows: rows of the largest group of a streamable loss; None when the loss is not known during the forward.
        workspace_bytes: the budget; None takes DEFAULT_WORKSPACE_MB[device_type], of which "auto" keeps rows only up to
            a quarter of what the logits would take (half, on an accelerator).
        schedule: "auto", or one of SCHEDULES to force it.
        cacheable: False where kept exponentials cannot serve (16-bit with softcap or entropy).
        arch, kernels, gathered, sums: of an accelerator: its architecture (`devices.DEVICES`), what its GEMM kernels
            can do for these tensors (None: nothing), whether the rows that count have to be copied together, and the
            numbers that the fused forward sums up for a row.
    Raises:
        ValueError: an unknown schedule, or one that cannot serve these needs.
    """
    if device_type not in DEFAULT_WORKSPACE_MB:
        raise ValueError(f"device_type must be one of {sorted(DEFAULT_WORKSPACE_MB)}, got {device_type!r}")
    budget = default_budget(device_type) if workspace_bytes is None else workspace_bytes
    if budget <= 0:
        raise ValueError(f"the workspace must be positive, got {budget} bytes")
    weight_dtype = dtype if weight_dtype is None else weight_dtype
    size, weight_size = (torch.empty((), dtype=d).element_size() for d in (dtype, weight_dtype))
    if device_type != "cpu":
        call = Call(
            n, H, V, size, weight_size, rounds=weight_dtype != dtype, bf16=dtype == torch.bfloat16,
            cacheable=cacheable, gathered=gathered, needs=needs, tokens=n if num_tokens is None else num_tokens,
            device=device_of(arch), kernels=Kernels() if kernels is None else kernels, sums=sums,
        )  # fmt: skip
        polite = workspace_bytes is None and schedule == "auto"
        return gpu_plan(call, budget, schedule=schedule, group_rows=group_rows, polite=polite)
    name, reason = choose(needs, group_rows, schedule)
    costs = head_costs(H, V, dtype, weight_dtype, needs[0])
    if name == "streamed" and schedule == "auto" and needs[1] and 0 < n <= costs.overlay(weight_size):
        whole = plan(
            n, H, V, dtype=dtype, device_type=device_type, needs=needs, workspace_bytes=workspace_bytes,
            schedule="overlaid", weight_dtype=weight_dtype, num_tokens=num_tokens,
        )  # fmt: skip
        if whole.overlaid_rows == n:
            return replace(whole, reason="the logits of all rows fit the memory of the weight's gradient")
    gradients = (1 if name in ("frozen", "streamed") else 2) + needs[0] + needs[1] if any(needs) else 1
    reuse = _Reuse()
    if name in ("frozen", "streamed"):
        sink = max(4, weight_size) if needs[1] else 0
        rows, slab, overlaid, workspace = whole_tiles(costs, n, budget, group_rows, sink)
        reuse = _Reuse(overlaid=overlaid)
    else:
        rows, slab, workspace = slab_tiles(costs, n, budget)
    if name in ("deferred", "cached", "overlaid"):
        most = budget
        if workspace_bytes is None and schedule == "auto":
            most = max(1, min(budget, n * V * costs.tile // 4))
        reuse = _kept(n, V, most - workspace, costs, dtype, schedule, cacheable)
        if schedule == "overlaid" or (schedule == "auto" and needs[1]):
            sink = weight_size if n <= rows else max(4, weight_size)
            reuse = _overlaid(n, rows, sink, costs, schedule, reuse)
        workspace += reuse.transit * V * costs.tile
        if schedule == "auto" and reuse.overlaid:
            name, where = "overlaid", "in the memory of the weight's gradient"
            reason = f"{reason}; {reuse.overlaid} of {n} rows wait for it {where}"
        elif schedule == "auto" and reuse.kept:
            name, reason = "cached", f"{reason}; the budget keeps {reuse.kept} of {n} rows for the backward"
            budget = most
    share = max(reuse.kept, reuse.overlaid) / n if n and name != "streamed" else 0.0
    several = n > rows or 0 < reuse.kept < n
    tokens = n if num_tokens is None else num_tokens
    return Plan(
        schedule=name,
        reason=reason,
        n=n,
        rows=int(rows),
        slab=int(slab),
        overlaid_rows=int(reuse.overlaid),
        kept_rows=int(reuse.kept),
        transit_rows=int(reuse.transit),
        gemms=float(gradients) - share,
        budget_bytes=int(budget),
        workspace_bytes=int(workspace),
        gradient_bytes=needs[0] * tokens * H * size + (needs[1] * H + needs[2]) * V * weight_size,
        accumulator_bytes=accumulators(name, needs, H, V, tokens, size, weight_size, several),
        saved_bytes=n * H * 4 if name == "frozen" else reuse.kept_bytes,
        exponentials=reuse.transit > 0,
    )


@dataclass(frozen=True, slots=True)
class _Reuse:
    """Rows whose logits the backward finds: overlaid, or kept (in so many bytes, by way of a transit tile)."""

    overlaid: int = 0
    kept: int = 0
    kept_bytes: int = 0
    transit: int = 0


def _overlaid(n: int, rows: int, sink: int, costs: Costs, schedule: str, kept: _Reuse) -> _Reuse:
    """Rows of the first tile whose logits fit the weight gradient's memory, or `kept` where that saves more."""
    capacity = costs.overlay(sink)
    if schedule == "overlaid" and not capacity:
        raise ValueError(f"schedule='overlaid' needs H ≥ {ROW_ALIGN * costs.tile // sink}, got H = {costs.H}")
    overlaid = min(n, rows, capacity)
    if schedule == "auto" and (overlaid < kept.kept or overlaid * 20 < n):
        return kept
    return _Reuse(overlaid=overlaid)


def _kept(n: int, V: int, room: int, costs: Costs, dtype: torch.dtype, schedule: str, cacheable: bool) -> _Reuse:
    """Rows that the budget keeps for the backward; none where it buys nothing."""
    if schedule not in ("auto", "cached") or n == 0:
        return _Reuse()
    half = dtype in (torch.bfloat16, torch.float16)
    if half and (not cacheable or dtype == torch.float16):
        if schedule == "cached":
            raise ValueError(
                "schedule='cached' cannot keep exponentials for float16 inputs, nor for 16-bit inputs with a "
                "softcap or an "
                "entropy output; take 'deferred'"
            )
        return _Reuse()
    element = 2 if half else costs.tile
    # 16-bit rows pass through a float32 tile over the whole vocabulary before their exponentials are stored
    transit = max(ROW_ALIGN, min(256, room // 4 // (V * costs.tile)) // ROW_ALIGN * ROW_ALIGN) if half else 0
    kept = min((room - transit * V * costs.tile) // (V * element) // ROW_ALIGN * ROW_ALIGN, align(n))
    if kept < ROW_ALIGN or (schedule == "auto" and kept * 20 < n):
        if schedule == "cached":
            raise ValueError(
                f"schedule='cached' has {room} bytes left for kept rows, but {ROW_ALIGN} rows of V = {V} take "
                f"{transit * V * costs.tile + ROW_ALIGN * V * element}; raise workspace_mb"
            )
        return _Reuse()
    return _Reuse(kept=min(kept, n), kept_bytes=kept * V * element, transit=min(transit, align(n)))
