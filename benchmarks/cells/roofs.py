"""Kernels by themselves, as a share of what the machine allows, measured in the same rounds.

    forward   log-probs without a logits tile: share of torch.mm's time for the same product (≥ 0.85 is the aim)
    rows      row functions on a float32 tile: share of the bandwidth of a copy that moves as many bytes
    live      GEMMs over the rows that have a gradient, whose number is read on the device: share of torch.mm's rate
    scans     advantages, sums of sequences: likewise. Peers are those of scans.py

Bytes are the fewest: each input read once, each output written once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import harness
import scans
import torch
from inputs import Inputs
from shapes import Shape

from cells import Cell, Row, Tell, protected
from cells.numerics import backends
from cells.numerics_kernels import laid_out

FORWARD = [Shape(8192, 4096, 131072), Shape(8192, 2048, 131072), Shape(2048, 4096, 128256), Shape(32768, 4096, 151936)]
TILES = [(8192, 32768), (2048, 131072), (8192, 131072)]
WINDOWS = [(512, 2048), (4096, 8192)]
SMALL_FORWARD, SMALL_TILES, SMALL_WINDOWS = [Shape(64, 32, 211)], [(16, 211)], [(8, 32)]
Calls = dict[str, tuple[Callable[[], Any], float]]  # a call, and its bytes or FLOP


def cells(device: str, small: bool) -> list[Cell]:
    found = []
    for number, shape in enumerate(SMALL_FORWARD if small else FORWARD):
        for dtype in ("float32",) if device == "cpu" else ("bfloat16", "float16")[: 1 if number else 2]:
            seconds = 10 + 1e-13 * shape.N * shape.H * shape.V
            gib = (shape.N * shape.H + shape.V * shape.H + 8192 * shape.V) * 2 / 2**30
            settings = {"subject": "forward", "shape": tuple(shape), "dtype": dtype}
            found.append(
                Cell("cells.roofs", f"roofs/forward/{dtype}/{shape}", 1 if number < 2 else 3, seconds, gib, settings)
            )
    for n, v in SMALL_TILES if small else TILES:
        settings = {"subject": "rows", "shape": (n, v), "dtype": "float32"}
        found.append(Cell("cells.roofs", f"roofs/rows/{n}x{v}", 2, 8.0, n * v * 30 / 2**30, settings))
    for b, t in SMALL_WINDOWS if small else WINDOWS:
        settings = {"subject": "scans", "shape": (b, t), "dtype": "float32"}
        found.append(Cell("cells.roofs", f"roofs/scans/{b}x{t}", 2, 5.0, b * t * 100 / 2**30, settings))
    if device == "cuda":
        settings = {"subject": "live", "shape": tuple(FORWARD[0]), "dtype": "bfloat16"}
        found.append(Cell("cells.roofs", f"roofs/live/{FORWARD[0]}", 2, 8.0, 12.0, settings))
    return [
        Cell(c.module, c.name, c.tier, c.seconds, c.gib, dict(c.settings) | {"device": device}) for c in found
    ]  # fmt: skip


def run(cell: Cell, tell: Tell, skip: dict[str, str]) -> list[Row]:
    s = cell.settings
    tell("inputs")
    made = {"forward": _forward, "rows": _rows, "scans": _scans, "live": _live}[s["subject"]]
    calls, roof = made(s)
    rows: list[Row] = []
    for name in list(calls):
        row: Row = {"provider": name, "error": skip.get(name, "")}
        rows.append(row)
        tell(name)
        row["error"] = row["error"] or protected(calls[name][0]) or ""
        if row["error"]:
            del calls[name]
    tell("timing")
    timed = {name: call for name, (call, _) in calls.items()} | {"roof": roof[0]}
    times = harness.interleaved(timed, rounds=20 if s["device"] == "cuda" else 3, device=s["device"], seconds=1.0)
    middle = {name: harness.median(found) for name, found in times.items()}
    rate = roof[1] / middle["roof"]  # bytes or FLOP per second
    about = {
        "subject": s["subject"], "shape": "x".join(map(str, s["shape"])), "dtype": s["dtype"],
        "unit": "TFLOP/s" if s["subject"] in ("forward", "live") else "TB/s", "roof_rate": rate / 1e12,
    }  # fmt: skip
    for row in rows:
        if row["provider"] in calls:
            name = row["provider"]
            own = calls[name][1] / middle[name]
            row |= {"seconds": middle[name], "fastest": min(times[name]), "rate": own / 1e12, "of_roof": own / rate}
    return [about | row for row in rows]


def _functions(device: str) -> list[Any]:
    from fastalign.ops.backends import resolve

    return [resolve(name, torch.zeros(1, device=device)) for name in backends(device)]


def _forward(s: dict[str, Any]) -> tuple[Calls, tuple[Any, float]]:
    from fastalign import linear_logps
    from fastalign.ops import rows as R

    shape = Shape(*s["shape"])
    i = Inputs(shape, s["device"], getattr(torch, s["dtype"]), frozen=True)
    hidden, flop = i.hidden.detach(), 2.0 * shape.N * shape.H * shape.V
    specs = {"": R.RowSpec(), ", every output": R.RowSpec(entropy=True, top1=True, sum_sq=True, sum_z=True)}
    calls: Calls = {"linear_logps": (lambda: linear_logps(hidden, i.weight, i.targets), flop)}
    for functions in _functions(s["device"]):
        if functions.fused_forward is None:
            continue
        for name, spec in specs.items():

            def fused(functions: Any = functions, spec: Any = spec) -> Any:
                return functions.fused_forward(hidden, i.weight, None, i.targets, None, spec)

            calls[f"{functions.name} fused forward{name}"] = (fused, flop)
    piece = min(8192, shape.N)
    out = hidden.new_empty(piece, shape.V)

    def product() -> None:
        for part in hidden.split(piece):
            torch.mm(part, i.weight.T, out=out[: len(part)])

    return calls, (product, flop)


def _live(s: dict[str, Any]) -> tuple[Calls, tuple[Any, float]]:
    """Products of hidden's and the weight's gradient, over all rows, three quarters, half and a quarter of them."""
    from fastalign.kernels.live_gemm import depth_matmul, rows_matmul
    from fastalign.kernels.live_rows import PAD, gather_rows

    from fastalign.ops.backends import architecture, multiprocessors

    n, h, v = s["shape"]
    options: dict[str, Any] = {"device": s["device"], "dtype": getattr(torch, s["dtype"])}
    grad, weight, hidden = (torch.randn(size, **options) for size in ((n, v), (v, h), (n, h)))
    device = grad.device
    out, wide = torch.empty(n, h, device=device), torch.empty(v, h, device=device)
    on = {"arch": architecture(device), "programs": multiprocessors(device)}
    calls: Calls = {}
    for share in (1.0, 0.75, 0.5, 0.25):
        order = torch.randperm(n, device=device)
        m = round(share * n)
        index = torch.cat([order[:m].sort().values, order[m:].sort().values])
        count, flop = torch.full((1,), m, dtype=torch.int32, device=device), 2.0 * m * h * v
        front = torch.empty(-(-n // PAD) * PAD, h, **options)
        gather_rows(hidden, index, count, front)
        rows = partial(rows_matmul, grad, weight, count, out, index=index, out_index=index, **on)
        calls[f"hidden's gradient, {share:.0%} of the rows"] = (rows, flop)
        calls[f"weight's gradient, {share:.0%} of the rows"] = (
            partial(depth_matmul, grad, front, count, wide, index=index, **on), flop
        )  # fmt: skip
    flop = 2.0 * n * h * v
    calls["torch.mm, weight's gradient"] = (partial(torch.mm, grad.T, hidden, out_dtype=torch.float32, out=wide), flop)
    return calls, (partial(torch.mm, grad, weight, out_dtype=torch.float32, out=out), flop)


def _copy(size: float, device: str) -> tuple[Callable[[], Any], float]:
    """Moves so many bytes, half of them read and half written."""
    source = torch.zeros(max(1, int(size) // 8), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 8.0 * source.numel()


def _rows(s: dict[str, Any]) -> tuple[Calls, tuple[Any, float]]:
    from fastalign.ops import rows as R
    from fastalign.ops.known_grads import KnownGrads

    (n, v), device = s["shape"], s["device"]
    g = torch.Generator(device).manual_seed(0)
    u = torch.randn(n, v, device=device, generator=g)
    targets = torch.randint(0, v, (n,), device=device, generator=g)
    ones = torch.ones(n, device=device)
    calls: Calls = {}
    for functions, (name, spec) in itertools.product(
        _functions(device), {"": R.RowSpec(), ", entropy": R.RowSpec(entropy=True)}.items()
    ):
        tile = laid_out(functions, u)
        space = laid_out(functions, torch.empty_like(u))
        state = R.RowState.start(n, spec, tile.device)
        functions.row_stats(tile, None, targets, 0, state, spec)
        stats = R.finish(state, spec)
        coef = R.coefficients(stats, ones, None, ones if spec.entropy else None)
        fresh = R.RowState.start(n, spec, tile.device)
        known = KnownGrads(ones, ones if spec.entropy else None)
        given = tile, None, targets
        calls[f"{functions.name} row_stats{name}"] = (
            partial(functions.row_stats, *given, 0, fresh, spec), 4.0 * n * v
        )  # fmt: skip
        narrow = {} if functions.name == "cpu" else {"bfloat16": space.view(torch.bfloat16)[:, :v]}
        for kind, out in ({"float32": space} | narrow).items():
            moved = (4.0 + out.element_size()) * n * v
            calls[f"{functions.name} row_grad to {kind}{name}"] = (
                partial(functions.row_grad, *given, 0, stats, coef, spec, out), moved
            )  # fmt: skip
            calls[f"{functions.name} row_loss_grad to {kind}{name}"] = (
                partial(functions.row_loss_grad, *given, fresh, known, spec, out), moved
            )  # fmt: skip
    return calls, _copy(8.0 * n * v, device)


def _scans(s: dict[str, Any]) -> tuple[Calls, tuple[Any, float]]:
    from fastalign.ops import gae, sequence_logps

    (B, T), device = s["shape"], s["device"]
    g = torch.Generator(device).manual_seed(0)
    rewards, values = torch.randn(2, B, T, device=device, generator=g)
    lengths = torch.randint(T // 2, T + 1, (B,), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(T, device=device) < lengths.to(device)[:, None]
    slow = ("python loop over tokens", "torch loop over positions", "fastalign")
    calls: Calls = {}
    given = rewards, values, mask
    moved = 17.0 * B * T  # rewards, values, mask; advantages, returns
    for name, provider in scans.GAE.items():
        if name not in slow or (name == "torch loop over positions" and B * T <= 2**20):
            calls[f"gae, {name}"] = (lambda provider=provider: provider(*given), moved)
    for name in backends(device):
        if name != "torch" or B * T <= 2**20:  # a step of plain PyTorch is a kernel for each token
            calls[f"gae, {name}"] = (
                lambda name=name: gae(*given, gamma=scans.GAMMA, lam=scans.LAM, backend=name), moved
            )  # fmt: skip
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    packed = torch.randn(int(cu_seqlens[-1]), device=device, generator=g)
    tokens = packed.numel()
    index = torch.repeat_interleave(torch.arange(B), lengths).to(device)
    cu_seqlens = cu_seqlens.to(device, torch.int64)
    for name in (name for name in backends(device) if name in ("torch", "triton")):
        calls[f"sums, {name}"] = (partial(sequence_logps, packed, cu_seqlens=cu_seqlens, backend=name), 4.0 * tokens)
    calls["sums, torch index_add"] = (
        lambda: torch.zeros(B, device=device).index_add_(0, index, packed), 12.0 * tokens
    )  # fmt: skip
    return calls, _copy(moved, device)
