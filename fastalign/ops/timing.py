"""Seconds that a plan takes on a GPU at least: GEMMs in whole waves of tiles, row kernels at memory speed, in sequence.

Nothing overlaps in this model but what one kernel does inside itself, and the float32 sums that a GEMM adds to are read
and written beside it. It ranks slab widths and says what a schedule costs beside its GEMMs (`Plan.floor`); what it has
not been is fitted to measurements.
"""

from __future__ import annotations

from dataclasses import replace

from fastalign.ops.gpu_call import Call, Kernels
from fastalign.ops.plans import Plan, Timing


class Sum:
    """Seconds of products, of row kernels and of other traffic, added up."""

    def __init__(self) -> None:
        self.products = self.rows = self.moves = 0.0

    def add(self, products: float = 0.0, rows: float = 0.0, moves: float = 0.0, *, times: float = 1.0) -> None:
        self.products += times * products
        self.rows += times * rows
        self.moves += times * moves

    @property
    def seconds(self) -> float:
        return self.products + self.rows + self.moves


def add_forward(total: Sum, call: Call, rows: int, columns: int, *, times: float = 1.0, keep: bool = False) -> None:
    """Scoring (rows, columns): by the fused kernel, or GEMM and row kernel. keep: no row kernel reads them yet."""
    device, logits = call.device, rows * columns
    if call.kernels.forward:
        total.add(device.gemm(rows, columns, call.H) + device.epilogue * logits, times=times)
        return
    read = 0.0 if keep else device.traffic(4 * logits, resident=4 * logits)
    total.add(device.gemm(rows, columns, call.H), read, _rounding(call, columns), times=times)


def add_slab(total: Sum, call: Call, rows: int, slab: int, *, again: int | None = None, times: float = 1.0) -> None:
    """A slab's backward: logits (of `again` rows, None: all), their gradient, and the two gradients from it."""
    device, logits = call.device, rows * slab
    again = rows if again is None else again
    grad = device.traffic((4 + call.size) * logits, resident=4 * logits if again else None)
    total.add(device.gemm(again, slab, call.H), grad, times=times)
    add_gradients(total, call, rows, slab, times=times)


def add_gradients(total: Sum, call: Call, rows: int, slab: int, *, times: float = 1.0) -> None:
    """The GEMMs from a tile (rows, slab) of ∂L/∂u; hidden's gradient is a float32 sum over slabs."""
    device = call.device
    if call.needs[1]:
        total.add(device.gemm(slab, call.H, rows), times=times)
    if call.needs[0]:
        sums = device.traffic(8 * rows * call.H) if slab < call.V else 0.0
        total.add(device.gemm(rows, call.H, slab), 0.0, sums + _rounding(call, slab), times=times)


def _rounding(call: Call, columns: int) -> float:
    return call.device.traffic((call.weight_size + call.size) * columns * call.H) if call.rounds else 0.0


def timing(call: Call, plan: Plan) -> Timing:
    """Of a whole call."""
    total, device = Sum(), call.device
    parts = _add_whole(total, call, plan) if plan.keep else _add_deferred(total, call, plan)
    if plan.schedule != "forward":
        gathered = call.gathered * 2 * call.size * call.n * call.H
        rounded = (4 + call.size) * call.n * call.H if call.needs[0] and call.size < 4 else 0
        total.add(moves=device.traffic(gathered + rounded))
    add_sums(total, call, parts)
    return Timing(total.products, total.rows, total.moves, gemm=device.gemm(call.n, call.V, call.H))


def add_sums(total: Sum, call: Call, parts: int) -> None:
    """The weight's gradient as a float32 sum of several products, read and written, and rounded at the end."""
    if parts > 1 and call.needs[1]:
        size, last = call.V * call.H, (4 + call.weight_size) * (call.weight_size < 4)
        total.add(moves=call.device.traffic(size * (8 * (parts - 1) + last)))


def whole_seconds(call: Call, rows: int, *, exponentials: bool) -> float:
    """Of n rows in tiles of `rows` over the whole vocabulary, which is what the sizes of tiles change."""
    total, (full, rest) = Sum(), divmod(call.n, rows)
    kernels = Kernels(forward=exponentials)
    for count, size in ((full, rows), (1, rest)):
        if count and size:
            add_forward(total, replace(call, kernels=kernels), size, call.V, keep=True, times=count)
            add_gradients(total, call, size, call.V, times=count)
    add_sums(total, call, full + (rest > 0))
    return total.seconds


def _add_deferred(total: Sum, call: Call, plan: Plan) -> int:
    """Forward, then backward by what waits for it; returns the products whose sum the weight's gradient is."""
    n, V, slab, parts = call.n, call.V, plan.slab, 0
    plain = replace(call, kernels=Kernels())
    scored = replace(call, kernels=Kernels(forward=plan.fused))
    waiting = plan.kept_rows + plan.overlaid_rows
    if plan.fused:
        add_forward(total, scored, n, V)
        total.add(call.device.keeping * plan.kept_rows * V)
    else:
        rows = min(plan.rows, n)
        add_forward(total, plain, rows, slab, times=n / rows * V / slab)
    if plan.schedule == "forward":
        return 0
    if plan.kept_rows:
        parts += 1
        if plan.transit_rows:
            total.add(rows=call.device.traffic((4 + 2) * plan.kept_rows * V))
        if plan.exponentials and call.scalable:
            add_gradients(total, call, plan.kept_rows, V)
            total.add(moves=call.device.traffic(2 * call.size * plan.kept_rows * call.H))
        else:
            element = 2 if plan.exponentials else 4
            total.add(rows=call.device.traffic((element + call.size) * plan.kept_rows * V))
            add_gradients(total, call, plan.kept_rows, slab, times=V / slab)
    if plan.overlaid_rows or waiting < n:
        count = -(-(n - plan.kept_rows) // plan.rows)
        rows = -(-(n - plan.kept_rows) // count)
        again = None if not plan.overlaid_rows else rows - plan.overlaid_rows
        add_slab(total, call, rows, slab, again=again, times=count * V / slab)
        parts += count
    return parts


def _add_whole(total: Sum, call: Call, plan: Plan) -> int:
    """Tiles over the vocabulary: scored and differentiated one after the other; returns their number."""
    device, V = call.device, call.V
    count = -(-call.n // plan.rows)
    rows = -(-call.n // count)
    if plan.exponentials:
        add_forward(total, replace(call, kernels=Kernels(forward=True)), rows, V, times=count)
        total.add(device.keeping * rows * V, times=count)
    else:
        slabs = -(-V // plan.slab)
        plain = replace(call, kernels=Kernels())
        add_forward(total, plain, rows, min(plan.slab, V), times=count * V / plan.slab, keep=True)
        passes = 1 if plan.schedule == "frozen" and slabs == 1 else 2  # statistics and gradient in one, or not
        total.add(rows=device.traffic((4 * passes + call.size) * rows * V), times=count)
    add_gradients(total, call, rows, plan.slab, times=count * V / plan.slab)
    return count
