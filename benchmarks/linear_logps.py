"""The fused head against its peers: time as ratios in one run, peak memory in processes of their own.

    python benchmarks/linear_logps.py [--shapes gpt2-like …] [--tasks logps …] [--device cpu|cuda] [--no-memory]
    [--no-save]

Tasks (forward and all needed gradients):
    logps    per-token log-probs with an upstream gradient that is known only after the forward
    loss     summed cross-entropy, the loss known in the forward
    pairs    DPO on pairs of which several fit the workspace;  pairs-large: a pair takes twice the workspace
    frozen   as logps, with a head that needs no gradient
    half     as logps and loss with half of the rows ignored
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import harness
import heads
from heads import behind, ours
from inputs import Inputs
from shapes import CPU, CUDA, Shape

TASKS = ("logps", "loss", "pairs", "pairs-large", "frozen", "half")


def pair_count(task: str, shape: Shape, device: str, dtype: torch.dtype) -> int:
    if not task.startswith("pairs"):
        return 0
    from fastalign.ops import plan

    rows = plan(shape.N, shape.H, shape.V, dtype=dtype, device_type=device, group_rows=1, schedule="streamed").rows
    length = rows if task == "pairs-large" else rows // 4  # of one response
    pairs = 1
    while shape.N // (2 * pairs * 2) >= length:
        pairs *= 2
    return pairs


LOGPS = {name: behind("logps", heads.LOGPS[name]) for name in ("naive", "trl", "cce")}
SFT, DPO = (heads.peers(task) for task in ("sft", "dpo"))
PROVIDERS: dict[str, dict[str, Callable[[Inputs], Tensor]]] = {
    "logps": LOGPS
    | {
        "fastalign deferred": ours("logps", schedule="deferred"),
        "fastalign auto": ours("logps"),
    },
    "loss": {
        **{name: SFT[name] for name in ("naive", "torch linear_cross_entropy", "liger", "cce")},
        "fastalign streamed": ours("sft", schedule="streamed"),
        "fastalign auto": ours("sft"),
    },
    "pairs": {
        **{name: DPO[name] for name in ("naive", "liger")},
        "fastalign streamed": ours("dpo", schedule="streamed"),
        "fastalign auto": ours("dpo"),
    },
    "frozen": LOGPS | {"fastalign frozen": ours("frozen")},
    "half": {
        "fastalign deferred": ours("logps", schedule="deferred"),
        "fastalign streamed": ours("sft", schedule="streamed"),
    },
}
PROVIDERS["pairs-large"] = PROVIDERS["pairs"]
GEMMS = {"logps": 4, "loss": 3, "pairs": 3, "pairs-large": 4, "frozen": 2, "half": 3}


def gemms(task: str, provider: str, shape: Shape, device: str, dtype: torch.dtype) -> float:
    """GEMMs of a call: ours by plan, the others' as the task's least without stored logits."""
    from fastalign.ops import plan

    schedule = provider.split()[1].strip(",") if provider.startswith("fastalign") else ""
    if schedule not in ("auto", "deferred"):
        return 3 if schedule == "streamed" else GEMMS[task]
    return plan(
        shape.N, shape.H, shape.V, dtype=dtype, device_type=device, schedule=schedule,
        group_rows=None if task in ("logps", "half") else 1,
    ).gemms  # fmt: skip


def inputs_of(task: str, shape: Shape, device: str, dtype: torch.dtype, pairs: int) -> Inputs:
    fraction = 0.5 if task == "half" else 1.0
    found = Inputs(shape, device, dtype, sequences=max(1, 2 * pairs), fraction=fraction, frozen=task == "frozen")
    return found.prepare("dpo") if pairs else found


def build(task: str, provider: str, shape: Shape, device: str, dtype: torch.dtype) -> Callable[[], Any]:
    """One call, forward and backward, on fresh gradients."""
    inputs = inputs_of(task, shape, device, dtype, pair_count(task, shape, device, dtype))
    loss = PROVIDERS[task][provider]

    def call() -> None:
        inputs.clear()
        loss(inputs).backward()

    return call


def warmed(task: str, provider: str, shape: Shape, device: str, dtype: torch.dtype) -> Callable[[], Any]:
    """`build` after one call at a smaller size, so that compilers and libraries have allocated what they keep."""
    try:
        warm = inputs_of(task, Shape(64, shape.H, 1024), device, dtype, int(task.startswith("pairs")))
        PROVIDERS[task][provider](warm).backward()
    except Exception as error:  # the real call will say what is wrong
        print(f"{provider}: warm-up failed: {error}", file=sys.stderr)
    return build(task, provider, shape, device, dtype)


def run(task: str, shape: Shape, device: str, dtype: torch.dtype, rounds: int, memory: bool) -> list[dict[str, Any]]:
    calls, rows = {}, []
    for name in PROVIDERS[task]:
        call = build(task, name, shape, device, dtype)
        try:
            call()
            calls[name] = call
        except Exception as error:
            rows.append({"provider": name, "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
    if task == "half":
        for name in list(calls):
            calls[f"{name}, all rows"] = build(
                {"fastalign deferred": "logps"}.get(name, "loss"), name, shape, device, dtype
            )
    calls["gemm"] = harness.canary(device, dtype)
    times = harness.interleaved(calls, rounds=rounds, device=device)
    rate = 2 * 2048**3 / harness.median(times["gemm"])
    for name, seconds in times.items():
        if name == "gemm":
            continue
        mid = harness.median(seconds)
        row: dict[str, Any] = {"provider": name, "seconds": mid, "fastest": min(seconds), "gflops_2048": rate / 1e9}
        k = gemms(task, name, shape, device, dtype)
        row["over_gemms"] = mid / (k * 2 * shape.N * shape.H * shape.V / rate)
        row["gemms"] = k
        if "naive" in times:
            row["over_naive"] = mid / harness.median(times["naive"])
        if task == "half" and "all rows" not in name:
            row["over_all_rows"] = mid / harness.median(times[f"{name}, all rows"])
        rows.append(row)
    if memory:
        size = torch.empty((), dtype=dtype).element_size()
        gradients = shape.N * shape.H * size + (0 if task == "frozen" else shape.V * shape.H * size)
        for row in rows:
            if "seconds" in row and "all rows" not in row["provider"]:
                peak, error = harness.peak_memory(warmed, task, row["provider"], shape, device, dtype, device=device)
                row["error"] = "" if error is None else error.splitlines()[0][:200]
                row["beside_gradients_mib"] = None if peak is None else (peak - gradients) / 2**20
    common = {
        "task": task,
        "shape": str(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "pairs": pair_count(task, shape, device, dtype),
    }
    return [common | row for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--shapes", nargs="+", default=None)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()
    named = CPU if arguments.device == "cpu" else CUDA
    dtype = getattr(torch, arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16"))
    for name in arguments.shapes or named:
        for task in arguments.tasks:
            rows = run(task, named[name], arguments.device, dtype, arguments.rounds, not arguments.no_memory)
            for row in rows:
                harness.say(**row)
            if not arguments.no_save:
                harness.append_rows("linear_logps", arguments.device, rows)


if __name__ == "__main__":
    main()
