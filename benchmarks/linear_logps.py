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
from shapes import CPU, CUDA, Shape

TASKS = ("logps", "loss", "pairs", "pairs-large", "frozen", "half")


class Inputs:
    """Leaves of one call. `pairs` sequences of equal length, chosen first; `pairs` is 0 where the task has none."""

    def __init__(self, task: str, shape: Shape, device: str, dtype: torch.dtype) -> None:
        g = torch.Generator(device).manual_seed(0)
        N, H, V = shape
        self.hidden = torch.randn(N, H, device=device, dtype=dtype, generator=g).requires_grad_()
        self.weight = torch.empty(V, H, device=device, dtype=dtype).normal_(0, 0.05, generator=g)
        self.weight.requires_grad_(task != "frozen")
        self.targets = torch.randint(0, V, (N,), device=device, generator=g)
        if task.startswith("half"):
            self.targets[::2] = -100
        self.upstream = torch.randn(N, device=device, generator=g)
        self.pairs = pair_count(task, shape, device, dtype)
        self.ref_logps = torch.randn(2 * self.pairs, device=device, generator=g)

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    @property
    def padded(self) -> tuple[Tensor, Tensor]:
        return self.hidden.view(2 * self.pairs, -1, self.hidden.shape[1]), self.targets.view(2 * self.pairs, -1)


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


def naive_logps(i: Inputs) -> Tensor:
    logits = (i.hidden @ i.weight.T).float()
    return torch.log_softmax(logits, -1).gather(1, i.targets.clamp(min=0)[:, None])[:, 0] * (i.targets != -100)


def trl_logps(i: Inputs) -> Tensor:
    from trl.trainer.utils import _ChunkedLogProbFunction

    keep = (i.targets != -100).nonzero()[:, 0]
    logps = _ChunkedLogProbFunction.apply(i.hidden[keep], i.weight, None, i.targets[keep], 1.0, 8192, None, 1.0, ())[0]
    return torch.zeros_like(i.upstream).index_copy(0, keep, logps)


def cce(i: Inputs, reduction: str) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    impl = "torch_compile" if i.hidden.device.type == "cpu" else "cce"
    return linear_cross_entropy(i.hidden, i.weight, i.targets, reduction=reduction, impl=impl)


def ours_logps(i: Inputs, schedule: str) -> Tensor:
    from fastalign import linear_logps

    return linear_logps(i.hidden, i.weight, i.targets, schedule=schedule).logps


def ours_loss(i: Inputs, schedule: str) -> Tensor:
    from fastalign import linear_cross_entropy

    return linear_cross_entropy(i.hidden, i.weight, i.targets, reduction="sum", schedule=schedule).loss


def torch_loss(i: Inputs) -> Tensor:
    return torch.nn.functional.linear_cross_entropy(i.hidden, i.weight, i.targets, reduction="sum")


def naive_loss(i: Inputs) -> Tensor:
    return torch.nn.functional.cross_entropy((i.hidden @ i.weight.T).float(), i.targets, reduction="sum")


def liger_loss(i: Inputs) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(i.hidden, i.weight, i.targets, reduction="sum")


def naive_pairs(i: Inputs) -> Tensor:
    from fastalign.losses import dpo_loss

    logps = naive_logps(i).view(2 * i.pairs, -1).sum(1)
    return dpo_loss(*logps.chunk(2), *i.ref_logps.chunk(2)).loss


def ours_pairs(i: Inputs, schedule: str) -> Tensor:
    from fastalign import linear_dpo_loss

    hidden, targets = i.padded
    return linear_dpo_loss(hidden, i.weight, targets, ref_logps=i.ref_logps, schedule=schedule).loss


def liger_pairs(i: Inputs) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    hidden, targets = i.padded
    return LigerFusedLinearDPOLoss(use_ref_model=False, compiled=False)(i.weight, hidden, targets)[0]


def with_upstream(logps: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
    return lambda i: (logps(i) * i.upstream).sum()


LOGPS: dict[str, Callable[[Inputs], Tensor]] = {
    "naive": with_upstream(naive_logps),
    "trl": with_upstream(trl_logps),
    "cce": with_upstream(lambda i: -cce(i, "none")),
}
PROVIDERS: dict[str, dict[str, Callable[[Inputs], Tensor]]] = {
    "logps": LOGPS
    | {
        "fastalign deferred": with_upstream(lambda i: ours_logps(i, "deferred")),
        "fastalign auto": with_upstream(lambda i: ours_logps(i, "auto")),
    },
    "loss": {
        "naive": naive_loss, "torch linear_cross_entropy": torch_loss, "liger": liger_loss,
        "cce": lambda i: cce(i, "sum"),
        "fastalign streamed": lambda i: ours_loss(i, "streamed"),
        "fastalign auto": lambda i: ours_loss(i, "auto"),
    },
    "pairs": {
        "naive": naive_pairs, "liger": liger_pairs,
        "fastalign streamed": lambda i: ours_pairs(i, "streamed"),
        "fastalign auto": lambda i: ours_pairs(i, "auto"),
    },
    "frozen": LOGPS | {"fastalign frozen": with_upstream(lambda i: ours_logps(i, "auto"))},
    "half": {
        "fastalign deferred": with_upstream(lambda i: ours_logps(i, "deferred")),
        "fastalign streamed": lambda i: ours_loss(i, "streamed"),
    },
}  # fmt: skip
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


def build(task: str, provider: str, shape: Shape, device: str, dtype: torch.dtype) -> Callable[[], Any]:
    """One call, forward and backward, on fresh gradients."""
    inputs = Inputs(task, shape, device, dtype)
    loss = PROVIDERS[task][provider]

    def call() -> None:
        inputs.clear()
        loss(inputs).backward()

    return call


def warmed(task: str, provider: str, shape: Shape, device: str, dtype: torch.dtype) -> Callable[[], Any]:
    """`build` after one call at a smaller size, so that compilers and libraries have allocated what they keep."""
    small = Shape(max(64, 4 * pair_count(task, shape, device, dtype)), shape.H, 1024)
    try:
        warm = Inputs(task if not task.startswith("pairs") else "loss", small, device, dtype)
        warm.pairs = 1 if task.startswith("pairs") else 0
        warm.ref_logps = torch.zeros(2 * warm.pairs, device=device)
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
