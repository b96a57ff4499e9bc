"""The kernels by themselves against float64: row functions, scans, sums of sequences. Run by `numerics`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cells import Cell, Row, Tell, protected

TILES = [(1024, 128256), (1021, 50257), (70001, 1000), (129, 1)]  # more rows than a grid's y holds; odd widths
SMALL_TILES = [(19, 301), (5, 1)]
WINDOWS = [(512, 2048), (3, 17), (1, 20000), (33, 1)]
SMALL_WINDOWS = [(5, 37), (1, 1)]
SPECS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 6.0, "entropy": True, "top1": True, "sum_sq": True, "sum_z": True},
    "entropy": {"entropy": True, "top1": True, "sum_sq": True, "sum_z": True},
}
FLOOR = 4e-6
# of one element that is stored: relative, and absolute where numbers are subnormal
ROUNDING = {torch.float32: (0.0, 0.0), torch.bfloat16: (2.0**-8, 0.0), torch.float16: (2.0**-11, 2.0**-24)}


def cells(device: str, small: bool) -> list[Cell]:
    from cells.numerics import backends

    found = []
    for backend in backends(device):
        settings = {"backend": backend, "device": device}
        for tile in SMALL_TILES if small else TILES:
            own = settings | {"kernel": "rows", "shape": tile}
            name = f"numerics/rows/{backend}/{tile[0]}x{tile[1]}"
            found.append(Cell("cells.numerics", name, 0, 3.0, tile[0] * tile[1] * 80 / 2**30, own))
        for window in SMALL_WINDOWS if small else WINDOWS:
            own = settings | {"kernel": "scans", "shape": window}
            found.append(Cell("cells.numerics", f"numerics/scans/{backend}/{window[0]}x{window[1]}", 0, 1.0, 0.1, own))
    return found


def run(cell: Cell, tell: Tell, skip: dict[str, str]) -> list[Row]:
    s = cell.settings
    about = {"backend": s["backend"], "shape": "x".join(map(str, s["shape"])), "dtype": "float32"}
    rows: list[Row] = [about | {"check": name, "error": reason} for name, reason in skip.items()]
    made = row_checks if s["kernel"] == "rows" else scan_checks
    for name, check in made(s["backend"], s["device"], *s["shape"]):
        if name in skip:
            continue
        tell(name)
        row: Row = about | {"check": name}

        def filled(row: Row = row, check: Any = check) -> None:
            row["excess"], row["worst"] = max((value, part) for part, value in check().items())
            if row["excess"] > 1:
                raise AssertionError(f"{row['worst']} errs by {row['excess']:.2f} times what the rule allows")

        row["error"] = protected(filled) or ""
        if row["error"] == "out of memory":  # says nothing of the numbers
            row["error"], row["refused"] = "", row["error"]
        rows.append(row)
    return rows


def elementwise(
    ours: Tensor, naive: Tensor, exact: Tensor, dtype: torch.dtype = torch.float32, scale: Tensor | None = None
) -> float:
    """The rule in every element, where plain PyTorch's error is the largest of its row; dtype: ours is stored in.

    scale: what the floor is relative to, at least; beside it the element, or the largest of its row.
    """
    if not exact.numel():
        return 0.0
    if not ours.isfinite().all():
        return float("inf")
    naive_error = (naive.double() - exact).abs()
    size = exact.abs().clamp(min=1)
    if exact.dim() == 2:
        naive_error, size = naive_error.amax(1, keepdim=True), exact.abs().amax(1, keepdim=True)
    if scale is not None:
        size = torch.maximum(size, scale)
    relative, subnormal = ROUNDING[dtype]
    allowed = 2 * naive_error + FLOOR * size + relative * exact.abs() + subnormal
    return float(((ours.double() - exact).abs() / allowed).max())


def row_checks(backend: str, device: str, n: int, v: int) -> Iterator[tuple[str, Any]]:
    """(name, check); a check returns {what: excess}."""
    from fastalign.ops import rows as R
    from fastalign.ops.backends import resolve

    functions = resolve(backend, torch.zeros(1, device=device))
    u, bias, targets = tile(n, v, device)
    u = laid_out(functions, u)
    for name, (number, slabs) in itertools.product(SPECS, enumerate(("one tile", "slabs"))):
        spec = R.RowSpec.make(**({"temperature": 0.7, "logit_scale": 1.1, "softcap": None} | SPECS[name]))
        cuts = sorted({0, v, *((v // 3, v // 2) if number else ())})

        def statistics(spec: Any = spec, cuts: list[int] = cuts) -> dict[str, float]:
            return _statistics(R, functions, u, bias, targets, spec, cuts)

        yield f"row_stats, {name}, {slabs}", statistics
        narrow = () if functions.name == "cpu" else (torch.bfloat16, torch.float16)  # the CPU's stay float32
        for dtype in (torch.float32, *narrow) if not number else ():

            def gradient(spec: Any = spec, dtype: torch.dtype = dtype) -> dict[str, float]:
                return _gradient(R, functions, u, bias, targets, spec, dtype)

            yield f"row_grad, {name}, {dtype}".replace("torch.", ""), gradient

            def known(spec: Any = spec, dtype: torch.dtype = dtype) -> dict[str, float]:
                return _gradient(R, functions, u, bias, targets, spec, dtype, known=True)

            yield f"row_loss_grad, {name}, {dtype}".replace("torch.", ""), known


def laid_out(functions: Any, u: Tensor) -> Tensor:
    """A tile as the backend takes it: the CPU's are vocabulary-major."""
    return u.t().contiguous().t() if functions.name == "cpu" else u.contiguous()


def tile(n: int, v: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Head outputs, a bias, targets; of every fourth row the target has almost all of the probability."""
    g = torch.Generator(device).manual_seed(0)
    u = torch.randn(n, v, generator=g, device=device).mul_(2)
    targets = torch.randint(0, v, (n,), generator=g, device=device)
    u[::4].scatter_(1, targets[::4, None], 16.0)
    return u, torch.randn(v, generator=g, device=device), targets


def _parts(n: int, v: int) -> Iterator[slice]:
    """Rows whose float64 versions take little memory."""
    step = max(1, 2**26 // v)
    return (slice(first, min(first + step, n)) for first in range(0, n, step))


def _fold(
    R: Any, function: Any, u: Tensor, bias: Tensor, targets: Tensor, spec: Any, cuts: list[int], dtype: Any
) -> Any:
    state = R.RowState.start(len(u), spec, u.device, dtype)
    for first, last in itertools.pairwise(cuts):
        function(u[:, first:last].to(dtype), bias[first:last].to(dtype), targets, first, state, spec)
    return state


def _statistics(
    R: Any, functions: Any, u: Tensor, bias: Tensor, targets: Tensor, spec: Any, cuts: list[int]
) -> dict[str, float]:
    state = _fold(R, functions.row_stats, u, bias, targets, spec, cuts, torch.float32)
    stats = R.finish(state, spec)
    if not bool((stats.logps <= 0).all()):
        raise AssertionError(f"a log-prob of {float(stats.logps.max()):g} is above 0")
    worst: dict[str, float] = {}
    for part in _parts(*u.shape):
        found = R.RowState(state.values[:, part], state.argmax[part] if spec.top1 else state.argmax)
        others = [
            _fold(R, R.row_stats, u[part], bias, targets[part], spec, [0, u.shape[1]], dtype)
            for dtype in (torch.float32, torch.float64)
        ]
        outputs = [_outputs(R, each, spec) for each in (found, *others)]
        for name in outputs[0]:
            value = elementwise(*(each[name] for each in outputs))
            worst[name] = max(worst.get(name, 0.0), value)
        if spec.top1 and not torch.equal(found.argmax, others[0].argmax):
            raise AssertionError("another first argmax")
    return worst


def _outputs(R: Any, state: Any, spec: Any) -> dict[str, Tensor]:
    stats = R.finish(state, spec)
    found = {
        "logps": stats.logps,
        "lse": stats.lse,
        "entropy": stats.entropy,
        "sum_sq": R.log_sum_sq_probs(state, stats, spec),
    }
    found["sum_z"] = state.values[R.SUM_Z] if spec.sum_z else None
    return {name: value for name, value in found.items() if value is not None}


def _gradient(
    R: Any, functions: Any, u: Tensor, bias: Tensor, targets: Tensor, spec: Any, dtype: torch.dtype, known: bool = False
) -> dict[str, float]:
    """row_grad over its own tile, and row_exp, whose only 16-bit dtype is bfloat16; known: row_loss_grad instead."""
    from fastalign.ops.known_grads import KnownGrads, two_passes

    worst = {"gradient": 0.0}
    for part in _parts(*u.shape):
        n, v = u[part].shape
        wide = dataclasses.replace(spec, entropy=True)
        exact_stats = R.finish(_fold(R, R.row_stats, u[part], bias, targets[part], wide, [0, v], torch.float64), wide)
        g = torch.Generator(u.device).manual_seed(1)
        a, c, e = torch.randn(3, n, generator=g, device=u.device, dtype=torch.float64)
        upstream = (a, None if known else c, e if spec.entropy else None)
        coef = R.coefficients(exact_stats, *upstream)
        exact, naive = (torch.empty(n, v, dtype=d, device=u.device) for d in (torch.float64, torch.float32))
        R.row_grad(u[part].double(), bias.double(), targets[part], 0, exact_stats, coef, spec, exact)
        stats, narrow = (type(each)(*(None if x is None else x.float() for x in each)) for each in (exact_stats, coef))
        if known:  # plain PyTorch, too, has nothing but its own statistics
            given = KnownGrads(a.float(), e.float() if spec.entropy else None)
            plain = R.RowState.start(n, spec, u.device)
            two_passes(R.row_stats, R.row_grad)(u[part], bias, targets[part], plain, given, spec, naive)
        else:
            R.row_grad(u[part], bias, targets[part], 0, stats, narrow, spec, naive)
        own = laid_out(functions, u[part].clone())
        if dtype == torch.bfloat16 and not spec.entropy and not known:
            kept = torch.empty(n, v, dtype=dtype, device=u.device)
            functions.row_exp(own, bias, stats, spec, kept)
            powers = [R.tile_logits(u[part].to(d), bias, spec).sub_(s.max[:, None].to(d)).exp_() for d, s in
                      ((torch.float32, stats), (torch.float64, exact_stats))]  # fmt: skip
            worst["exponentials"] = max(worst.get("exponentials", 0.0), elementwise(kept, *powers, dtype))
        out = own if dtype == torch.float32 else own.view(dtype)[:, :v]
        if known:
            state = R.RowState.start(n, spec, u.device)
            functions.row_loss_grad(own, bias, targets[part], state, given, spec, out)
            lse = (R.finish(state, spec).lse, R.finish(plain, spec).lse, exact_stats.lse)
            worst["lse"] = max(worst.get("lse", 0.0), elementwise(*lse))
        else:
            functions.row_grad(own, bias, targets[part], 0, stats, narrow, spec, out)
        # of 1 − p, near p = 1, its own float32 statistics leave a row no more than the rounding of a sum near 1
        scale = a.abs()[:, None] if known else None
        worst["gradient"] = max(worst["gradient"], elementwise(out, naive, exact, dtype, scale))
    return worst


def scan_checks(backend: str, device: str, B: int, T: int) -> Iterator[tuple[str, Any]]:
    from fastalign.ops import sequence_logps
    from fastalign.ops.backends import resolve
    from fastalign.ops.scans import gae_torch

    functions = resolve(backend, torch.zeros(1, device=device))
    g = torch.Generator(device).manual_seed(0)
    rewards, values = torch.randn(2, B, T, generator=g, device=device)
    mask = torch.rand(B, T, generator=g, device=device) < 0.9

    def gae() -> dict[str, float]:
        given = mask, 0.99, 0.95
        ours = functions.gae(rewards, values, *given)
        naive, exact = (gae_torch(rewards.to(d), values.to(d), *given) for d in (torch.float32, torch.float64))
        return {
            name: elementwise(a.flatten(), b.flatten(), c.flatten())
            for name, a, b, c in zip(("advantages", "returns"), ours, naive, exact, strict=True)
        }

    yield "gae", gae

    lengths = torch.randint(0, T + 1, (B,), generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    packed = torch.randn(int(cu_seqlens[-1]), generator=g, device=device)

    def sums() -> dict[str, float]:
        served = backend if backend in ("torch", "triton") else "auto"  # there are no others of sums
        ours = sequence_logps(packed, cu_seqlens=cu_seqlens, backend=served)
        parts = [part.sum() for part in packed.double().split(lengths.tolist())]
        naive = torch.stack([part.float().sum() for part in packed.split(lengths.tolist())])
        return {"sums": elementwise(ours, naive, torch.stack(parts))}

    yield "sums of sequences", sums
