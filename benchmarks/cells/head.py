"""Time and memory of the head: every provider of heads.py on one problem, in turns, beside the GEMM they all need.

gemm_seconds     hidden (n, H) × weightᵀ (H, V) of the n tokens that count, by torch.mm, in the same rounds
over_gemms       seconds / (gemms · gemm_seconds): of fastalign's plan, of others the fewest of the task
tflops           work of those fewest GEMMs ÷ seconds
over_naive       seconds / those of plain PyTorch
over_all_rows    where half of the tokens count: seconds / those of the same call where all do
beside_mib       peak memory beside inputs and gradients; planned_mib: what fastalign's plan says of it
"""

from __future__ import annotations

import math
from typing import Any

import harness
import heads
import torch
from inputs import Inputs
from shapes import Shape
from torch import Tensor

from cells import Cell, Row, Tell, protected

# fastalign with options, per task; 286 MiB are 0.3 GB
TIGHT, AMPLE = {"workspace_mb": 286}, {"workspace_mb": 4400}
OURS: dict[str, dict[str, dict[str, Any]]] = {
    "forward": {},
    "logps": {"deferred": {"schedule": "deferred"}, "0.3 GB": TIGHT, "4.4 GB": AMPLE},
    "sft": {"streamed": {"schedule": "streamed"}, "0.3 GB": TIGHT, "4.4 GB": AMPLE},
    "dpo": {"streamed": {"schedule": "streamed"}, "0.3 GB": TIGHT, "4.4 GB": AMPLE},
    "ppo": {"streamed": {"schedule": "streamed"}, "0.3 GB": TIGHT, "4.4 GB": AMPLE},
    "frozen": {"0.3 GB": TIGHT},
}
PLAIN = (
    "naive",
    "naive, rows selected",
    "checkpointed chunks",
)  # the first that works is what others are compared with
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}  # differences from plain PyTorch
HIDDEN, VOCAB, TOKENS = (4096, 2048), (128256, 151936, 32000), (2048, 4096, 8192, 16384, 32768)
TARGET_VOCAB = 131072


def target(gemms: float, task: str) -> float:
    """What over_gemms shall be at most."""
    return 1.18 if task == "forward" else 1.12 if gemms > 3.5 else 1.08


def cells(device: str, small: bool) -> list[Cell]:
    if small:
        shape, wider = Shape(64, 32, 211), Shape(128, 32, 211)
        grid = [(0, task, shape, f, p, 1.0, True) for task in heads.TASKS for f, p in ((1.0, False), (0.5, True))]
        grid += [(1, "ppo", shape, 1.0, False, 0.5, False)]
        grid += [(1, task, wider, 1.0, False, 1.0, False) for task in heads.TASKS]
    else:
        grid = _grid()
    dtype = "float32" if device == "cpu" else "bfloat16"
    found: dict[str, Cell] = {}
    for tier, task, shape, fraction, peaked, live, wide in grid:
        compiled = wide and tier == 3 and VOCAB[0] == shape.V  # each shape anew, which takes its time
        name = "/".join(
            ["head", task, str(shape), "all" if fraction == 1 else f"{fraction:g}", "peaked" if peaked else "random"]
            + ([f"live{live:g}"] if live != 1 else [])
        )
        settings = {
            "task": task, "shape": tuple(shape), "fraction": fraction, "peaked": peaked, "live": live, "wide": wide,
            "compiled": compiled, "device": device, "dtype": dtype,
        }  # fmt: skip
        found.setdefault(name, Cell("cells.head", name, tier, *_estimate(task, shape, compiled, device), settings))
    return list(found.values())


def _grid() -> list[tuple[int, str, Shape, float, bool, float, bool]]:
    """(tier, task, shape, fraction, peaked, live, whether every setting takes part): what matters most first."""
    grid: list[tuple[int, str, Shape, float, bool, float, bool]] = []
    for hidden in HIDDEN:
        at_target = Shape(8192, hidden, TARGET_VOCAB)
        grid += [(1, task, at_target, 1.0, False, 1.0, True) for task in heads.TASKS]
    at_target = Shape(8192, 4096, TARGET_VOCAB)
    grid += [(2, task, at_target, 0.5, False, 1.0, False) for task in ("ppo", "dpo", "sft", "logps")]
    grid += [(2, task, at_target, 1.0, True, 1.0, False) for task in ("sft", "logps", "ppo")]
    grid += [(2, "ppo", at_target, 1.0, False, live, False) for live in (0.5, 0.25)]
    for vocab in VOCAB:
        grid += [(3, task, Shape(8192, 4096, vocab), 1.0, False, 1.0, True) for task in heads.TASKS]
    grid += [(4, task, Shape(n, 4096, VOCAB[0]), 1.0, False, 1.0, False) for n in TOKENS for task in heads.TASKS]
    everything = [
        (task, Shape(n, hidden, vocab), fraction, peaked)
        for n in TOKENS for hidden in HIDDEN for vocab in VOCAB for fraction in (1.0, 0.5) for peaked in (False, True)
        for task in heads.TASKS
    ]  # fmt: skip
    grid += [(5, *found, 1.0, found[1].N == 8192 and found[2] == 1 and not found[3]) for found in everything]
    return grid


def _estimate(task: str, shape: Shape, compiled: bool, device: str) -> tuple[float, float]:
    """(seconds, GiB) of all providers: about eight, which take 13 calls of 6 GEMMs each; GiB of plain PyTorch's."""
    N, H, V = shape
    call = 2 * N * H * V * 2 * heads.TASKS[task] / (6e14 if device == "cuda" else 5e10)
    size = 2 if device == "cuda" else 4
    gib = (size * (N * H * 2 + V * H * 4) + N * V * (2 * size + 12)) / 2**30
    return 2.0 + (25.0 if compiled else 0.0) + 8 * 13 * call, gib


def run(cell: Cell, tell: Tell, skip: dict[str, str]) -> list[Row]:
    s = cell.settings
    device, dtype, task = s["device"], getattr(torch, s["dtype"]), s["task"]
    shape = Shape(*s["shape"])
    tell("inputs")
    torch.manual_seed(0)
    made: dict[str, Any] = {"live": s["live"], "frozen": task == "frozen", "peaked": s["peaked"]}
    inputs = Inputs(shape, device, dtype, fraction=s["fraction"], **made).prepare(task)
    whole = None
    if s["fraction"] != 1:
        whole = Inputs(shape, device, dtype, weight=inputs.weight, **made).prepare(task)
    options = _ours(task, s["wide"], s["live"])
    others = {name: peer for name, peer in heads.peers(task).items() if name != "torch.compile" or s["compiled"]}
    providers = others | {name: heads.ours(task, **given) for name, given in options.items()}
    calls, rows = _first_calls(task, inputs, providers, tell, skip)
    for name in [name for name in calls if whole is not None and name in options]:
        calls[name, "all rows"] = _call(task, whole, providers[name])
    calls["gemm"] = _gemm(inputs)
    tell("timing")
    # a peer cannot fail here any more but by ending the process, which is put down to the timing
    times = harness.interleaved(calls, rounds=10 if device == "cuda" else 3, device=device, seconds=1.5)
    middle = {name: harness.median(found) for name, found in times.items()}
    about = {
        "task": task, "shape": str(shape), "dtype": s["dtype"], "fraction": s["fraction"], "peaked": s["peaked"],
        "live": s["live"], "gemm_seconds": middle["gemm"], "gemm_tflops": _tflop(inputs) / middle["gemm"],
    }  # fmt: skip
    for row in rows:
        name = row["provider"]
        if name in middle:
            row |= _figures(task, inputs, name, middle, min(times[name]), options.get(name))
            row["beside_mib"] = row["peak_mib"] - row["gradients_mib"]
    return [about | row for row in rows]


def _ours(task: str, wide: bool, live: float) -> dict[str, dict[str, Any]]:
    """Options of each of fastalign's calls, by its name in the rows."""
    chosen = OURS[task] if wide else {name: given for name, given in OURS[task].items() if name == "0.3 GB"}
    if live != 1:
        chosen = {name: given for name, given in OURS[task].items() if name == "streamed"}
        if heads.skips_rows():
            chosen |= {f"rows skipped {how}": {"skip_rows": how} for how in ("always", "never")}
    return {"fastalign": {}} | {f"fastalign {name}": given for name, given in chosen.items()}


def _call(task: str, inputs: Inputs, provider: Any) -> Any:
    def call() -> Tensor:
        inputs.clear()
        out: Tensor = provider(inputs)
        if task != "forward":
            out.backward()
        return out.detach()

    return call


def _first_calls(
    task: str, inputs: Inputs, providers: dict[str, Any], tell: Tell, skip: dict[str, str]
) -> tuple[dict[Any, Any], list[Row]]:
    """Those that work, and a row for each: what it differs from plain PyTorch by, its memory, or its error."""
    calls: dict[Any, Any] = {}
    rows: list[Row] = []
    expected: list[Tensor] = []
    for name, provider in providers.items():
        row: Row = {"provider": name, "error": skip.get(name, "")}
        if name == "naive, rows selected" and len(inputs.rows) == len(inputs.targets):
            continue  # the same as naive
        rows.append(row)
        if not row["error"] and (package := heads.missing(name)):
            row["error"] = f"not installed: {package}"
        if row["error"]:
            continue
        tell(name)
        call = _call(task, inputs, provider)

        def first(call: Any = call, row: Row = row, name: str = name) -> None:
            out = call()  # compiles
            found = [out, *(g for g in (inputs.hidden.grad, inputs.weight.grad) if g is not None)]
            if not expected and name in PLAIN:
                expected.extend(found)
            elif expected and (task, name) not in heads.OTHER_LOSS:
                row["difference"] = _difference(found, expected)
            del out, found
            inputs.clear()
            row["peak_mib"] = harness.peak_bytes(call, inputs.hidden.device.type) / 2**20

        row["error"] = protected(first) or ""
        allowed = ALLOWED[inputs.hidden.dtype]
        if not row["error"] and not row.get("difference", 0.0) <= allowed:
            row["error"] = f"differs from plain PyTorch by {row['difference']:.1e}, more than {allowed:g}"
        if not row["error"]:
            calls[name] = call
        inputs.clear()
    return calls, rows


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative difference of loss and gradients."""
    pairs = zip(found, expected, strict=True)
    return max(float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)) for a, b in pairs)


def _tflop(inputs: Inputs) -> float:
    return 2 * len(inputs.rows) * inputs.shape.H * inputs.shape.V / 1e12


def _gemm(inputs: Inputs, most: int = 8192) -> Any:
    """The product of the tokens that count, in pieces whose results share memory."""
    hidden = inputs.hidden.detach()[inputs.keep]
    out = hidden.new_empty(min(most, len(hidden)), inputs.shape.V)
    weight = inputs.weight.detach().T

    def call() -> None:
        for part in hidden.split(most):
            torch.mm(part, weight, out=out[: len(part)])

    return call


def _figures(
    task: str, inputs: Inputs, name: str, middle: dict[Any, float], fastest: float, options: dict[str, Any] | None
) -> Row:
    seconds, gemm = middle[name], middle["gemm"]
    least = heads.TASKS[task]
    row: Row = {
        "seconds": seconds, "fastest": fastest, "tflops": least * _tflop(inputs) / seconds,
        "over_naive": seconds / middle["naive"] if "naive" in middle else math.nan,
    }  # fmt: skip
    size = inputs.hidden.element_size()
    gradients = 0 if task == "forward" else inputs.hidden.numel() * size
    gradients += inputs.weight.numel() * size if inputs.weight.requires_grad and task != "forward" else 0
    row["gradients_mib"] = gradients / 2**20
    gemms = float(least)
    if options is not None:
        plan = heads.planned(task, inputs, **options)
        gemms = plan.gemms
        row |= {"schedule": plan.schedule, "planned_mib": (plan.predicted_bytes - plan.gradient_bytes) / 2**20}
        row["planned_seconds"] = None if plan.time is None else plan.time.seconds
        row["target"] = target(gemms, task)
    row |= {"gemms": gemms, "over_gemms": seconds / (gemms * gemm)}
    if (name, "all rows") in middle:
        row["over_all_rows"] = seconds / middle[name, "all rows"]
    return row
