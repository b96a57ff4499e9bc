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
the same call does the same work everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

DEFAULT_WORKSPACE_MB = {"cpu": 128, "cuda": 1024}

SCHEDULES = ("forward", "deferred", "overlaid", "cached", "frozen", "streamed")

MIN_SLAB = 64
ROW_ALIGN = 16  # GEMMs are markedly slower on row counts that are not a multiple of the vector width


@dataclass(frozen=True, slots=True)
class Plan:
    """What one call does and what it allocates; every `*_bytes` is exact up to per-row vectors of a few float32.

    gradient_bytes: the gradients returned; accumulator_bytes: one float32 accumulator per 16-bit gradient that is
    summed over tiles; saved_bytes: what lives from forward to backward (part of the budget for "cached", N × H for
    "frozen").
    """

    schedule: str
    reason: str
    n: int
    rows: int
    slab: int
    overlaid_rows: int  # of the first tile; streamed groups over the budget have them too
    kept_rows: int
    transit_rows: int  # rows per tile on the way to 16-bit exponentials; 0 where kept rows are the GEMM's own output
    gemms: float
    budget_bytes: int
    workspace_bytes: int
    gradient_bytes: int
    accumulator_bytes: int
    saved_bytes: int

    @property
    def predicted_bytes(self) -> int:
        """Peak bytes beside the inputs."""
        return self.workspace_bytes + self.gradient_bytes + self.accumulator_bytes + self.saved_bytes

    @property
    def keep(self) -> bool:
        """Whether a tile spans the whole vocabulary."""
        return self.schedule in ("frozen", "streamed")

    def __str__(self) -> str:
        mib = 2**20
        return (
            f"{self.schedule}: {self.reason}; {self.n} rows in tiles of {self.rows} × {self.slab}, "
            f"{self.gemms:.2f} GEMMs; "
            f"{self.predicted_bytes / mib:.1f} MiB beside the inputs (workspace {self.workspace_bytes / mib:.1f}, "
            f"gradients {self.gradient_bytes / mib:.1f}, accumulators {self.accumulator_bytes / mib:.1f}, "
            f"saved {self.saved_bytes / mib:.1f})"
        )


@dataclass(frozen=True, slots=True)
class _Costs:
    """Bytes per unit of the pieces of a tile, for one device type and dtype."""

    H: int
    V: int
    element: int  # bytes of one operand element as the GEMM reads it
    tile: int  # bytes of one tile element
    weight_copy: int  # bytes per slab column for a weight slab in another dtype than the GEMM's
    gather: bool  # whether rows are copied into the workspace
    grad_buffer: bool  # whether a float32 (rows, H) buffer is needed for grad_hidden

    def per_row(self) -> int:
        return (self.H * self.element if self.gather else 0) + (self.H * 4 if self.grad_buffer else 0)


def default_budget(device_type: str) -> int:
    """Bytes of working memory where the caller names none; every accelerator has CUDA's."""
    return DEFAULT_WORKSPACE_MB.get(device_type, DEFAULT_WORKSPACE_MB["cuda"]) * 2**20


def align(n: int) -> int:
    return -(-n // ROW_ALIGN) * ROW_ALIGN


def _costs(
    H: int, V: int, dtype: torch.dtype, weight_dtype: torch.dtype, device_type: str, needs_hidden: bool
) -> _Costs:
    size = torch.empty((), dtype=dtype).element_size()
    on_cpu = device_type == "cpu"
    gemm_size = max(size, 4) if on_cpu else size  # CPU GEMMs run on float32 operands
    converts = weight_dtype != dtype or gemm_size != size
    steps = gemm_size + (size if weight_dtype != dtype and gemm_size != size else 0)  # rounded to `dtype`, then widened
    weight_copy = H * steps if converts else 0
    return _Costs(H, V, gemm_size, max(4, gemm_size), weight_copy, gather=True, grad_buffer=needs_hidden)


def _slab(costs: _Costs, rows: int, budget: int, keep: bool) -> int:
    """Columns per GEMM: tiles of about 8 MiB stay in a CPU's last-level cache between the GEMM and the row kernel."""
    per_column = costs.weight_copy + (0 if keep else align(rows) * costs.tile)
    cap = max(512, (8 * 2**20) // max(1, align(rows) * costs.tile))
    if per_column:
        cap = min(cap, max(MIN_SLAB, budget // per_column))
    return min(costs.V, max(MIN_SLAB, cap // MIN_SLAB * MIN_SLAB))


def plan(
    n: int, H: int, V: int, *, dtype: torch.dtype = torch.float32, device_type: str = "cpu",
    needs: tuple[bool, bool, bool] = (True, True, False), group_rows: int | None = None,
    workspace_bytes: int | None = None, schedule: str = "auto", weight_dtype: torch.dtype | None = None,
    num_tokens: int | None = None, cacheable: bool = True, overlay: bool = True,
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
            a quarter of what the logits would take.
        schedule: "auto", or one of SCHEDULES to force it.
        cacheable: False where kept exponentials cannot serve (16-bit with softcap or entropy).
        overlay: False where "auto" must not overlay, because outputs of the forward cannot change in place.
    Raises:
        ValueError: an unknown schedule, or one that cannot serve these needs.
    """
    if device_type not in DEFAULT_WORKSPACE_MB:
        raise ValueError(f"device_type must be one of {sorted(DEFAULT_WORKSPACE_MB)}, got {device_type!r}")
    budget = default_budget(device_type) if workspace_bytes is None else workspace_bytes
    if budget <= 0:
        raise ValueError(f"the workspace must be positive, got {budget} bytes")
    weight_dtype = dtype if weight_dtype is None else weight_dtype
    name, reason = choose(needs, group_rows, schedule)
    if name == "streamed" and schedule == "auto" and needs[1] and overlay and H >= 2 * ROW_ALIGN and n:
        whole = plan(
            n, H, V, dtype=dtype, device_type=device_type, needs=needs, workspace_bytes=workspace_bytes,
            schedule="overlaid", weight_dtype=weight_dtype, num_tokens=num_tokens,
        )  # fmt: skip
        if whole.overlaid_rows == n:
            return replace(whole, reason="the logits of all rows fit the memory of the weight's gradient")
    costs = _costs(H, V, dtype, weight_dtype, device_type, needs[0])
    gradients = (1 if name in ("frozen", "streamed") else 2) + needs[0] + needs[1] if any(needs) else 1
    keep = name in ("frozen", "streamed")
    size, weight_size = (torch.empty((), dtype=d).element_size() for d in (dtype, weight_dtype))
    overlaid = 0

    if keep:
        per_row = costs.per_row() + V * costs.tile
        slab = min(V, 2048 if device_type == "cpu" else 8192)
        if costs.weight_copy:
            slab = min(slab, max(MIN_SLAB, budget // 4 // costs.weight_copy // MIN_SLAB * MIN_SLAB))
        room = max(budget - slab * costs.weight_copy, per_row * ROW_ALIGN)
        most = 512 if device_type == "cpu" else 8192
        rows = max(ROW_ALIGN, min(room // per_row, most) // ROW_ALIGN * ROW_ALIGN)
        beside = per_row + slab * costs.tile  # a slab of scratch beside the tile
        if needs[1] and group_rows is not None and group_rows > rows and room // beside >= ROW_ALIGN:
            per_row = beside
            rows = min(room // per_row, most) // ROW_ALIGN * ROW_ALIGN
            overlaid = _overlaid(n, rows, H * max(4, weight_size) // costs.tile)
        rows = min(rows, align(n)) if n else ROW_ALIGN
        workspace = rows * per_row + slab * costs.weight_copy
    else:
        room = max(budget // 4, 1)
        rows = max(ROW_ALIGN, room // max(1, costs.per_row()) // ROW_ALIGN * ROW_ALIGN)
        rows = min(rows, align(n)) if n else ROW_ALIGN
        slab = _slab(costs, rows, budget - rows * costs.per_row(), keep)
        workspace = rows * costs.per_row() + slab * (costs.weight_copy + rows * costs.tile)

    kept_rows, kept_bytes, transit = 0, 0, 0
    if name in ("deferred", "cached", "overlaid"):
        most = budget
        if workspace_bytes is None and schedule == "auto":
            most = max(1, min(budget, n * V * costs.tile // 4))
        kept_rows, kept_bytes, transit = _kept(n, V, most - workspace, costs, dtype, schedule, cacheable)
        if schedule == "overlaid" or (schedule == "auto" and overlay and needs[1]):
            sink = weight_size if n <= rows else max(4, weight_size)
            overlaid = _overlaid(n, rows, H * sink // costs.tile)
            if schedule == "overlaid" and not overlaid:
                raise ValueError(f"schedule='overlaid' needs H ≥ {ROW_ALIGN * costs.tile // sink}, got H = {H}")
        if overlaid and (schedule == "overlaid" or (overlaid >= kept_rows and overlaid * 20 >= n)):
            name, kept_rows, kept_bytes, transit = "overlaid", 0, 0, 0
            if schedule == "auto":
                reason = f"{reason}; {overlaid} of {n} rows wait for it in the memory of the weight's gradient"
        else:
            overlaid = 0
        workspace += transit * V * costs.tile
        if schedule == "auto" and kept_rows:
            name, reason = "cached", f"{reason}; the budget keeps {kept_rows} of {n} rows for the backward"
            budget = most
    gemms = float(gradients) - (max(kept_rows, overlaid) / n if n and name != "streamed" else 0.0)

    tiles = -(-n // rows) if n else 0
    total = n if num_tokens is None else num_tokens
    gradient_bytes = needs[0] * total * H * size + needs[1] * V * H * weight_size + needs[2] * V * weight_size
    accumulators = 0
    if name == "streamed" and size < 4:
        accumulators += needs[0] * total * H * 4
    if weight_size < 4 and (name == "streamed" or tiles > 1 or 0 < kept_rows < n):
        accumulators += needs[1] * V * H * 4
    if weight_size < 4:
        accumulators += needs[2] * V * 4
    saved = n * H * 4 if name == "frozen" else kept_bytes
    return Plan(
        name,
        reason,
        n,
        int(rows),
        int(slab),
        int(overlaid),
        int(kept_rows),
        int(transit),
        gemms,
        int(budget),
        int(workspace),
        gradient_bytes,
        accumulators,
        saved,
    )


def choose(needs: tuple[bool, bool, bool], group_rows: int | None, schedule: str) -> tuple[str, str]:
    if schedule not in ("auto", *SCHEDULES):
        raise ValueError(f"schedule must be one of {('auto', *SCHEDULES)}, got {schedule!r}")
    if not any(needs):
        return "forward", "no gradient is needed"
    if schedule != "auto":
        if schedule == "streamed" and group_rows is None:
            raise ValueError(
                "schedule='streamed' needs a loss over groups: call linear_loss or one of the linear_*_loss functions"
            )
        if schedule == "frozen" and (needs[1] or needs[2]):
            raise ValueError(
                "schedule='frozen' needs a weight and bias without gradient; detach them, or take 'deferred'"
            )
        if schedule == "overlaid" and not needs[1]:
            raise ValueError(
                "schedule='overlaid' keeps logits in the memory of weight's gradient, but weight needs none; take "
                "'deferred' or 'auto'"
            )
        if schedule == "frozen" and not needs[0]:
            raise ValueError(
                "schedule='frozen' prepares hidden's gradient, but hidden needs none; take 'forward' or 'auto'"
            )
        if schedule == "forward":
            raise ValueError(
                "schedule='forward' computes no gradient, but one is needed; detach the inputs or take 'auto'"
            )
        return schedule, "asked for"
    if group_rows is not None:
        return "streamed", "the loss of a group is known as soon as its log-probs are"
    if not needs[1] and not needs[2]:
        return "frozen", "weight and bias need no gradient"
    return "deferred", "the loss is known after the forward"


def _overlaid(n: int, rows: int, per_column: int) -> int:
    """Rows of the first tile whose logits fit the memory of the weight's gradient: `per_column` logits a column."""
    return min(n, rows, per_column // ROW_ALIGN * ROW_ALIGN)


def _kept(
    n: int, V: int, room: int, costs: _Costs, dtype: torch.dtype, schedule: str, cacheable: bool
) -> tuple[int, int, int]:
    """(rows kept, their bytes, rows of the transit tile) for the cached schedule; zeros when it buys nothing."""
    if schedule not in ("auto", "cached") or n == 0:
        return 0, 0, 0
    half = dtype in (torch.bfloat16, torch.float16)
    if half and (not cacheable or dtype == torch.float16):
        if schedule == "cached":
            raise ValueError(
                "schedule='cached' cannot keep exponentials for float16 inputs, nor for 16-bit inputs with a "
                "softcap or an "
                "entropy output; take 'deferred'"
            )
        return 0, 0, 0
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
        return 0, 0, 0
    return min(kept, n), kept * V * element, min(transit, align(n))
