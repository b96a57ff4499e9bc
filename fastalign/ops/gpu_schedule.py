"""The planner's side for accelerators: a call's numbers in, a plan with its bytes and its time out. Pure arithmetic.

One GEMM of a slab (rows × slab) works in whole waves of output tiles, so a tile has all rows where they fit, and slabs
are as wide as the budget allows. A slab that stays in L2 for its row kernel (rows × slab × 4 B ≤ ¾ of it: 1024 columns
for 8192 rows on an H200) saves the reading of 4 B a logit from memory, 0.2 ms of 8192 × 131072 at the speed of L2. But
hidden's float32 gradient is then read and written 128 times instead of 4, 8·rows·H bytes each: 8 ms at H = 4096. So
narrow slabs can win only where hidden needs no gradient; `_best_slab` adds it up for each width.

What stands in memory, by path, for n rows (pitch: V rounded up to 16-byte rows; e: bytes of hidden's dtype):

    slab by slab     n·H·(e + 4) + n·slab·4      gathered rows, float32 gradient of hidden, float32 logits
    exponentials     n·H·e + n·pitch·2           exp(z − reference) is multiplied as it lies, between scaled rows
    logits           n·H·e + n·pitch·4           their gradient is written over them

and, over a whole vocabulary, one float32 tile a processor (17 MB on an H200): hidden's gradient is then no sum, and is
rounded piece by piece.

One chunk of all rows writes a 16-bit gradient of the weight once. Several add up in float32, V·H·4 bytes beside it. So
all rows go in one chunk where that takes no more than the budget and those bytes together: with exponentials at
N < C + 2H for chunks of C rows, with float32 logits at N < C + H.
"""

from __future__ import annotations

from dataclasses import replace

from fastalign.ops.gpu_call import Call, Kernels, pitch
from fastalign.ops.plans import Plan, accumulators, choose
from fastalign.ops.tile_sizes import ROW_ALIGN, align
from fastalign.ops.timing import Sum, add_forward, add_slab, timing, whole_seconds

COLUMNS = 256  # slabs are multiples of a GEMM tile's longer side
TRANSIT_ROWS = 512  # a GEMM of fewer rows waits for the weight


def gpu_plan(call: Call, budget: int, *, schedule: str, group_rows: int | None, polite: bool) -> Plan:
    """The plan of a call. polite: the budget is the default, of which rows that wait for the backward of an unknown
    loss take no more than half of what their float32 logits would.

    Raises:
        ValueError: as `choose`, and for a schedule that the sizes forbid.
    """
    name, reason = choose(call.needs, group_rows, schedule)
    call = replace(call, piece_rows=_piece_rows(call, budget))
    if name == "forward":
        return _forward(call, budget, reason)
    if name == "overlaid":
        if not call.overlay:
            raise ValueError(f"schedule='overlaid' needs H ≥ {64 // call.weight_size}, got H = {call.H}")
        return _slabs(call, budget, name, reason, overlaid=call.overlay)
    if name == "cached":
        return _as_many_as_fit(call, budget, reason)
    if name == "frozen":
        return _whole(call, budget, name, reason, None)
    if name == "streamed":
        streamed = _whole(call, budget, name, reason, group_rows)
        return streamed if schedule == "streamed" else _in_one_chunk(call, budget, streamed)
    if schedule == "deferred":
        return _slabs(call, budget, name, reason)
    return _deferred(call, budget, min(budget, call.n * call.V * 2) if polite else budget, reason)


def _piece_rows(call: Call, budget: int) -> int:
    """As many as give every processor a tile of hidden's gradient, in an eighth of the budget."""
    across = -(-call.H // call.device.tile[1])
    filled = max(1, call.device.processors // across) * call.device.tile[0]
    return max(ROW_ALIGN, min(filled, call.n, budget // 8 // (4 * call.H)))


# ---- what "auto" prefers


def _in_one_chunk(call: Call, budget: int, streamed: Plan) -> Plan:
    """All rows at once, coefficients in the backward, where that is no larger: nothing is rounded or scaled twice."""
    if 0 < call.n <= call.overlay:
        reason = "the logits of all rows fit the memory of the weight's gradient"
        return _slabs(call, budget, "overlaid", reason, overlaid=call.overlay)
    spared = call.accumulator if streamed.rows < call.n else 0
    return _kept(call, budget + spared, call.n, "one chunk holds all rows") or streamed


def _deferred(call: Call, budget: int, room: int, reason: str) -> Plan:
    """Rows wait in the memory of the weight's gradient, or in the budget if it holds all of them; else none does.

    Some of them would make the weight's gradient a sum, in float32.
    """
    plain = _slabs(call, budget, "deferred", reason)
    if call.overlay < call.n and (kept := _kept(call, room, call.n, f"{reason}; the budget keeps all rows")):
        return kept
    if not call.n or not call.overlay or plain.rows < call.n:
        return plain
    where = f"{min(call.overlay, call.n)} of {call.n} rows wait for it in the memory of the weight's gradient"
    overlaid = _slabs(call, budget, "overlaid", f"{reason}; {where}", overlaid=call.overlay)
    assert plain.time is not None
    assert overlaid.time is not None
    return overlaid if overlaid.time.seconds < plain.time.seconds else plain


# ---- the schedules


def _forward(call: Call, budget: int, reason: str) -> Plan:
    if call.kernels.forward:
        return _plan(call, budget, "forward", reason, align(call.n), call.V, call.fused_bytes, gemms=1, fused=True)
    return _plan(call, budget, "forward", reason, *_slab_sizes(replace(call, kernels=Kernels()), budget), gemms=1)


def _slabs(call: Call, budget: int, name: str, reason: str, *, overlaid: int = 0) -> Plan:
    """Logits again, slab by slab; the weight's gradient is written once a slab where a tile holds all rows."""
    rows, slab, workspace = _slab_sizes(call, budget)
    overlaid = min(overlaid, rows, call.n)
    return _plan(
        call, budget, name, reason, rows, slab, max(workspace, call.fused_bytes * call.kernels.forward),
        gemms=_gemms(call, overlaid), overlaid=overlaid, several=call.n > rows,
        fused=call.kernels.forward and not overlaid,
    )  # fmt: skip


def _gemms(call: Call, waiting: int) -> float:
    return 2 + call.needs[0] + call.needs[1] - (waiting / call.n if call.n else 0)


def _kept(call: Call, budget: int, kept: int, reason: str) -> Plan | None:
    """Cached: `kept` rows wait for the backward; None where they and what goes with them exceed the budget."""
    element = 2 if call.exponentials else 4
    stored, rest = align(kept) * pitch(call.V) * element, call.n - kept
    room, transit = budget - stored, 0
    if room <= 0 or not kept or (call.size == 2 and not call.exponentials):
        return None
    fused = call.scalable and call.kernels.exponentials  # relative to a reference that row_grad does not know
    workspace = call.fused_bytes if fused else 0
    if call.exponentials and not fused:
        row = pitch(call.V) * 4 + call.H * call.size
        transit = min(TRANSIT_ROWS, align(kept), room // row // ROW_ALIGN * ROW_ALIGN)
        if not transit:
            return None
        workspace = transit * row
    rows, slab, beside = align(kept), call.V, align(kept) * call.H * call.size + call.piece_bytes
    if rest or not call.scalable:
        rows, slab, slabs = _slab_sizes(replace(call, n=rest or kept), room)
        if rows < kept and not call.scalable:
            return None
        beside = max(beside if call.scalable else 0, slabs)
    workspace = max(workspace, beside)
    if stored + workspace > budget:
        return None
    return _plan(
        call, budget, "cached", reason, rows, slab, workspace, gemms=_gemms(call, kept), kept=kept, transit=transit,
        several=rest > 0, exponentials=call.exponentials, fused=fused and (not rest or call.kernels.forward),
    )  # fmt: skip


def _as_many_as_fit(call: Call, budget: int, reason: str) -> Plan:
    """schedule="cached": all rows, or the most that leave a quarter of the budget to the others."""
    if call.size == 2 and not call.exponentials:
        raise ValueError(
            "schedule='cached' cannot keep exponentials for float16 inputs, nor for 16-bit inputs with a softcap or an "
            "entropy output; take 'deferred'"
        )
    if not call.n:
        return replace(_slabs(call, budget, "cached", reason), fused=False)
    row = pitch(call.V) * (2 if call.exponentials else 4)
    kept = call.n
    while kept and (found := _kept(call, budget, kept, reason)) is None:
        most = kept * 3 // 4 if kept < call.n else min(call.n - 1, budget * 3 // 4 // (row + call.H * call.size))
        kept = most // ROW_ALIGN * ROW_ALIGN
    if not kept or found is None:
        raise ValueError(
            f"schedule='cached' has {budget} bytes left for kept rows, but {ROW_ALIGN} rows of V = {call.V} take "
            f"{ROW_ALIGN * row} and the backward works beside them; raise workspace_mb"
        )
    return found


def _whole(call: Call, budget: int, name: str, reason: str, group_rows: int | None) -> Plan:
    """Frozen and streamed: tiles over the whole vocabulary, of whole groups, and equal where there are several."""
    slab = call.V
    if call.column_bytes:
        spare = min(budget // 4, budget - ROW_ALIGN * (pitch(call.V) * 4 + call.row_bytes))  # beside the smallest tile
        slab = min(slab, max(COLUMNS, spare // call.column_bytes // COLUMNS * COLUMNS))
    beside = slab * call.column_bytes + (call.piece_bytes if slab == call.V else 0)
    room = max(budget - beside, 1)

    def most(per_row: int) -> int:
        return max(ROW_ALIGN, room // per_row // ROW_ALIGN * ROW_ALIGN)

    scaled = pitch(call.V) * 2 + call.H * call.size * (name == "streamed")
    exponentials = call.kernels.exponentials and call.scalable and (group_rows or 1) <= most(scaled)
    per_row = pitch(call.V) * 4 + (call.H * call.size if slab == call.V else call.row_bytes)
    if exponentials:
        per_row = scaled
    overlaid, memory = 0, max(4, call.weight_size) if call.needs[1] else 0
    beside_slab = pitch(call.V) * 4 + call.row_bytes + min(slab, 8192) * 4  # a group that fills several tiles
    if memory and group_rows is not None and group_rows > most(per_row) and room // beside_slab >= ROW_ALIGN:
        slab, per_row = min(slab, 8192), beside_slab  # overlays the first, with a slab of scratch beside it
        overlaid = min(call.n, most(per_row), call.H * memory // 4 // ROW_ALIGN * ROW_ALIGN)
    rows = _even_rows(call, most(per_row), exponentials=exponentials)
    return _plan(
        call, budget, name, reason, rows, slab, rows * per_row + beside, gemms=1 + call.needs[0] + call.needs[1],
        overlaid=overlaid, exponentials=exponentials, several=call.n > rows, fused=exponentials,
    )  # fmt: skip


def _even_rows(call: Call, most: int, *, exponentials: bool = False) -> int:
    """Rows of tiles that hold at most `most`: of those that are about equal or fill whole waves, what takes least."""
    n = call.n
    if n <= most:
        return align(n) if n else ROW_ALIGN
    fewest = -(-n // most)
    across = -(-call.H // call.device.tile[1])  # tiles beside each other in a gradient of hidden
    sizes = [-(-n // (count * 128)) * 128 for count in range(fewest, fewest + 3)]
    sizes += [wave * call.device.processors // across * call.device.tile[0] for wave in range(1, 9)]
    fit = [size for size in sizes if 0 < size <= most] or [most]
    return min(fit, key=lambda rows: whole_seconds(call, rows, exponentials=exponentials))


# ---- slabs


def _slab_sizes(call: Call, budget: int) -> tuple[int, int, int]:
    """(rows, slab, workspace) of tiles of one slab: all rows where they fit beside the narrowest slab."""
    per_row, column = call.row_bytes, call.column_bytes
    narrowest = min(COLUMNS, pitch(call.V))

    def widest(rows: int) -> int:
        return (budget - rows * per_row) // (column + rows * 4)

    rows = align(call.n) if call.n else ROW_ALIGN
    if widest(rows) < narrowest:
        most = (budget // 2 - narrowest * column) // (per_row + narrowest * 4)
        rows = _even_rows(call, max(ROW_ALIGN, most // ROW_ALIGN * ROW_ALIGN))
    slab = _best_slab(call, rows, max(widest(rows), narrowest))
    return rows, slab, rows * per_row + pitch(slab) * rows * 4 + slab * column


def _best_slab(call: Call, rows: int, widest: int) -> int:
    """The width by which the vocabulary takes least time, up to `widest`."""
    if widest >= COLUMNS:
        widest = widest // COLUMNS * COLUMNS
    widest = min(call.V, widest)
    fewest = -(-call.V // widest)
    widths = {widest, call.device.l2_bytes * 3 // 4 // (rows * 4) // COLUMNS * COLUMNS}
    widths |= {-(-call.V // (count * COLUMNS)) * COLUMNS for count in range(fewest, fewest + 8)}

    def seconds(slab: int) -> float:
        total = Sum()
        if not call.kernels.forward:
            add_forward(total, call, rows, slab)
        add_slab(total, call, rows, slab)
        return -(-call.V // slab) * total.seconds

    return min(sorted((w for w in widths if 0 < w <= widest), reverse=True), key=seconds)


def _plan(
    call: Call, budget: int, name: str, reason: str, rows: int, slab: int, workspace: int, *, gemms: float,
    overlaid: int = 0, kept: int = 0, transit: int = 0, several: bool = False, exponentials: bool = False,
    fused: bool = False,
) -> Plan:  # fmt: skip
    size, needs = call.weight_size, call.needs
    saved = align(kept) * pitch(call.V) * (2 if exponentials else 4)
    once = "deferred" if name == "streamed" and not several else name  # its results are written in their own dtype
    found = Plan(
        schedule=name, reason=reason, n=call.n, rows=rows, slab=slab, overlaid_rows=overlaid, kept_rows=kept,
        transit_rows=transit, gemms=float(gemms), budget_bytes=budget, workspace_bytes=workspace,
        gradient_bytes=needs[0] * call.tokens * call.H * call.size + (needs[1] * call.H + needs[2]) * call.V * size,
        accumulator_bytes=accumulators(once, needs, call.H, call.V, call.tokens, call.size, size, several),
        saved_bytes=call.n * call.H * 4 if name == "frozen" else saved, fused=fused, exponentials=exponentials,
        piece_rows=call.piece_rows,
    )  # fmt: skip
    return replace(found, time=timing(call, found)) if call.n else found
