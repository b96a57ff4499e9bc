"""A PPO update's head, and GAE, against their peers: time as ratios in one run, peak memory in processes of their own.

    python benchmarks/ppo_step.py [--shapes qwen-like …] [--tasks update …] [--device cpu|cuda] [--rounds 5]
    [--clock wall|cpu] [--patience 600] [--no-memory] [--no-save]

Tasks:
    update   hidden states → log-probs, mean entropy, clipped loss, gradients of hidden and weight. "naive" is plain
             PyTorch with its entropy in pieces of 128 tokens, "naive, whole matrix" without that care. `live` is the
             share of tokens with a gradient; of the others most are sequences whose advantage is 0, as in a group whose
             rewards tie, and the rest is clipped
    live     ours alone, at several shares of tokens with a gradient
    variants the update without entropy by the token's ratio (ppo), by the sequence's (gspo), and with capped weights
             (cispo), each over the same loss by plain PyTorch; all tokens have a gradient
    gae      advantages and returns of 512 right-padded sequences of up to 2048 tokens (scans.py)

Every provider's loss and gradients are compared with naive's before it is timed; one that differs is a row that says
so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import harness
import scans
from shapes import CPU, CUDA, Shape

TASKS = ("update", "live", "variants", "gae")
NARROW = {"cpu": Shape(1024, 256, 151936), "cuda": Shape(8192, 1024, 151936)}
SEQUENCES = 8
LIVE = (1.0, 0.5)
VARIANTS = ("ppo", "gspo", "cispo")
SHARES = (1.0, 0.9, 0.75, 0.5, 0.25, 0.1, 0.0)
EPSILON = 0.2
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}


class Inputs:
    """SEQUENCES sampled completions of equal length."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        g = torch.Generator(device).manual_seed(0)
        N, H, V = shape
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.hidden = torch.randn(SEQUENCES, N // SEQUENCES, H, generator=g, **options).requires_grad_()
        self.weight = torch.empty(V, H, **options).normal_(0, 0.05, generator=g).requires_grad_()
        self.targets = torch.randint(0, V, self.hidden.shape[:2], device=device, generator=g)
        with torch.no_grad():  # 64 tokens at a time
            chunks = zip(self.hidden.flatten(0, 1).split(64), self.targets.flatten().split(64), strict=True)
            logps = torch.cat([log_probs(h @ self.weight.T, t)[0] for h, t in chunks]).view_as(self.targets)
        self.old_logps = logps + 0.03 * torch.randn(logps.shape, device=device, generator=g).clamp(-3, 3)
        self.clipped = torch.rand(logps.shape, device=device, generator=g) < 0.2
        self.rewards = torch.tensor([1.0, -0.7] * (SEQUENCES // 2), device=device)

    def sampled(self, live: float) -> tuple[Tensor, Tensor]:
        """(old_logps, the sequences' advantages) with about that share of live tokens: 1, or 5/8 of the sequences times
        4/5 of their tokens."""
        if live == 1.0:
            return self.old_logps, self.rewards
        tied = torch.arange(SEQUENCES, device=self.rewards.device) % 3 == 2
        advantages = torch.where(tied, 0, self.rewards)
        advantages[0] = 0
        return self.old_logps - 0.35 * self.clipped * advantages.sign()[:, None], advantages

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def log_probs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log-prob of each target, log-probs of the vocabulary), float32."""
    everything = torch.log_softmax(logits.float(), -1)
    return everything.gather(-1, targets[..., None])[..., 0], everything


def naive(i: Inputs, old_logps: Tensor, advantages: Tensor, entropy: bool, loss_type: str = "ppo") -> Tensor:
    logps, everything = log_probs(i.hidden @ i.weight.T, i.targets)
    if entropy:
        with torch.no_grad():  # 128 tokens at a time
            parts = everything.view(-1, everything.shape[-1]).split(128)
            torch.cat([-(part.exp() * part).sum(-1) for part in parts]).mean()
    ratio = torch.exp(logps - old_logps)
    advantages = advantages[:, None]
    if loss_type == "cispo":
        return -(ratio.clamp(max=1 + EPSILON).detach() * advantages * logps).mean()
    if loss_type == "gspo":
        ratio = torch.exp((logps - old_logps).mean(1, keepdim=True))
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages).mean()


def whole_matrix(i: Inputs, old_logps: Tensor, advantages: Tensor) -> Tensor:
    """A line a formula, as PPO loops are written: logits over a temperature, log-softmax, entropy of the softmax."""
    logits = i.hidden @ i.weight.T
    logits = logits / (1.0 + 1e-7)
    logps = log_probs(logits, i.targets)[0]
    with torch.no_grad():
        probs = torch.softmax(logits, -1)
        (torch.logsumexp(logits, -1) - (probs * logits).sum(-1)).mean()
    ratio = torch.exp(logps - old_logps)
    advantages = advantages[:, None]
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages).mean()


def liger(i: Inputs, old_logps: Tensor, advantages: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="dapo")
    mask = torch.ones_like(i.targets)
    return loss(i.hidden, i.weight, i.targets, mask, advantages, old_per_token_logps=old_logps)[0]


def ours(
    i: Inputs, old_logps: Tensor, advantages: Tensor, schedule: str, entropy: bool, loss_type: str = "ppo"
) -> Tensor:
    """advantages (sequences,) or (sequences, tokens)."""
    from fastalign import linear_ppo_loss

    if advantages.dim() == 1:
        advantages = advantages[:, None].expand_as(i.targets)
    return linear_ppo_loss(
        i.hidden, i.weight, i.targets, old_logps=old_logps, advantages=advantages, schedule=schedule,
        token_metrics=entropy, loss_type=loss_type, epsilon_high=EPSILON,
        epsilon_low=1.0 if loss_type == "cispo" else EPSILON,
    ).loss  # fmt: skip


UPDATE: dict[str, Callable[[Inputs, Tensor, Tensor], Tensor]] = {
    "naive": lambda i, old, a: naive(i, old, a, True),
    "naive, whole matrix": whole_matrix,
    "naive, no entropy": lambda i, old, a: naive(i, old, a, False),
    "liger grpo, no entropy": liger,
    "fastalign auto": lambda i, old, a: ours(i, old, a, "auto", True),
    "fastalign streamed": lambda i, old, a: ours(i, old, a, "streamed", True),
    "fastalign auto, no entropy": lambda i, old, a: ours(i, old, a, "auto", False),
}


def baseline(provider: str) -> str:
    """What does the same work by plain PyTorch."""
    return "naive, no entropy" if provider.endswith("no entropy") else "naive"


def call_of(inputs: Inputs, provider: str, live: float) -> Callable[[], Tensor]:
    sampled = inputs.sampled(live)

    def call() -> Tensor:
        inputs.clear()
        loss = UPDATE[provider](inputs, *sampled)
        loss.backward()
        return loss.detach()

    return call


def build(provider: str, live: float, shape: Shape, device: str, dtype: torch.dtype) -> Callable[[], Any]:
    """One call on inputs of its own, after one on a small vocabulary, so that compilers and libraries have allocated
    what they keep."""
    try:
        call_of(Inputs(Shape(shape.N, shape.H, 1024), device, dtype), provider, live)()
    except Exception as error:  # the real call will say what is wrong
        print(f"{provider}: warm-up failed: {error}", file=sys.stderr)
    return call_of(Inputs(shape, device, dtype), provider, live)


def difference(inputs: Inputs, loss: Tensor, expected: list[Tensor]) -> float:
    """Largest relative difference of loss, hidden's and weight's gradient from `expected`."""
    found = [loss, inputs.hidden.grad, inputs.weight.grad]
    pairs = zip(found, expected, strict=True)
    return max(float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-12)) for a, b in pairs)


def update(shape: Shape, device: str, dtype: torch.dtype, timing: dict[str, Any], memory: bool) -> list[dict[str, Any]]:
    """Ours at every share of LIVE, the others with a gradient for all tokens: they do not ask which have one."""
    inputs, calls, rows = Inputs(shape, device, dtype), {}, []
    for live in LIVE:
        reference = call_of(inputs, "naive", live)()
        expected = [reference, inputs.hidden.grad, inputs.weight.grad]
        alive = float((expected[1] != 0).any(-1).float().mean())
        for name in (name for name in UPDATE if live == 1.0 or name.startswith("fastalign")):
            row: dict[str, Any] = {"provider": name, "live": live, "live_share": alive}
            call = call_of(inputs, name, live)
            try:
                row["difference"] = difference(inputs, call(), expected)
                if not row["difference"] < TOLERANCE[dtype]:
                    raise ValueError(f"differs from naive by {row['difference']:.1e}")
                calls[name, live] = call
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            rows.append(row)
        del expected
    calls["gemm", 1.0] = harness.canary(device, dtype)
    spread = harness.interleaved(calls, device=device, **timing)
    times = {key: harness.median(seconds) for key, seconds in spread.items()}
    rate = 2 * 2048**3 / times["gemm", 1.0]
    inputs.clear()
    del inputs, calls
    size = torch.empty((), dtype=dtype).element_size()
    for row in rows:
        name, live = row["provider"], row["live"]
        if (name, live) not in times:
            continue
        row["seconds"], row["fastest"] = times[name, live], min(spread[name, live])
        row["gflops_2048"] = rate / 1e9
        row["over_naive"] = times[name, live] / times[baseline(name), 1.0]
        if live != 1.0:
            row["over_all_live"] = times[name, live] / times[name, 1.0]
        if memory:
            peak, error = harness.peak_memory(build, name, live, shape, device, dtype, device=device)
            row["error"] = "" if error is None else error.splitlines()[0][:200]
            gradients = (shape.N + shape.V) * shape.H * size
            row["beside_gradients_mib"] = None if peak is None else (peak - gradients) / 2**20
    return [{"task": "update", "shape": str(shape), "dtype": str(dtype).removeprefix("torch.")} | row for row in rows]


def live_shares(shape: Shape, device: str, dtype: torch.dtype, timing: dict[str, Any]) -> list[dict[str, Any]]:
    """Ours alone, with an advantage on a random share of the tokens, and no other reason to be left out."""
    inputs = Inputs(shape, device, dtype)
    order = torch.rand(inputs.targets.shape, device=device, generator=torch.Generator(device).manual_seed(1))
    calls: dict[tuple[str, float], Callable[[], Any]] = {}
    for schedule in ("auto", "streamed"):
        for live in SHARES:
            advantages = inputs.rewards[:, None] * (order < live)

            def call(schedule: str = schedule, advantages: Tensor = advantages) -> None:
                inputs.clear()
                ours(inputs, inputs.old_logps, advantages, schedule, True).backward()

            calls[f"fastalign {schedule}", live] = call
    times = harness.interleaved(calls, device=device, **timing)
    common = {"task": "live", "shape": str(shape), "dtype": str(dtype).removeprefix("torch.")}
    return [
        common | {
            "provider": name, "live": live, "live_share": float((order < live).float().mean()),
            "seconds": harness.median(seconds), "fastest": min(seconds),
            "over_all_live": harness.median(seconds) / harness.median(times[name, 1.0]),
        }
        for (name, live), seconds in times.items()
    ]  # fmt: skip


def variants(shape: Shape, device: str, dtype: torch.dtype, timing: dict[str, Any]) -> list[dict[str, Any]]:
    """Ours by streaming and naive, whose first results are compared."""
    inputs = Inputs(shape, device, dtype)
    sampled = inputs.sampled(1.0)
    calls: dict[tuple[str, str], Callable[[], Any]] = {}

    def call(loss_fn: Callable[..., Tensor], *how: Any) -> Tensor:
        inputs.clear()
        loss = loss_fn(inputs, *sampled, *how)
        loss.backward()
        return loss.detach()

    for loss_type in VARIANTS:
        calls["naive", loss_type] = partial(call, naive, False, loss_type)
        calls["fastalign streamed", loss_type] = partial(call, ours, "streamed", False, loss_type)
        expected = [calls["naive", loss_type](), inputs.hidden.grad, inputs.weight.grad]
        found = difference(inputs, calls["fastalign streamed", loss_type](), expected)
        assert found < TOLERANCE[dtype], f"{loss_type} differs from naive by {found:.1e}"
    times = harness.interleaved(calls, device=device, **timing)
    common = {"task": "variants", "shape": str(shape), "dtype": str(dtype).removeprefix("torch.")}
    return [
        common | {
            "provider": f"{provider}, {loss_type}", "seconds": harness.median(seconds), "fastest": min(seconds),
            "over_naive": harness.median(seconds) / harness.median(times["naive", loss_type]),
        }
        for (provider, loss_type), seconds in times.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--shapes", nargs="+", default=None)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", default="wall", choices=list(harness.CLOCKS), help="see harness.interleaved")
    parser.add_argument("--patience", type=float, help="seconds to wait for a machine that others leave alone")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()
    device = arguments.device
    shapes = (CPU if device == "cpu" else CUDA) | {"narrow": NARROW[device]}
    standard = ["qwen-like" if device == "cpu" else "qwen3-8b", "narrow"]
    dtype = getattr(torch, arguments.dtype or ("float32" if device == "cpu" else "bfloat16"))
    quiet = None if arguments.patience is None else harness.Quiet(arguments.patience)
    timing = {"rounds": arguments.rounds, "clock": arguments.clock, "quiet": quiet}
    runs: list[Callable[[], list[dict[str, Any]]]] = []
    if "gae" in arguments.tasks:
        runs.append(lambda: scans.run(device, timing))
    for name in arguments.shapes or standard:
        given = shapes[name], device, dtype, timing
        if "update" in arguments.tasks:
            runs.append(lambda given=given: update(*given, not arguments.no_memory))
        if "live" in arguments.tasks:
            runs.append(lambda given=given: live_shares(*given))
        if "variants" in arguments.tasks:
            runs.append(lambda given=given: variants(*given))
    for run in runs:
        others = harness.cores_of_others()
        rows = run()
        beside = {"clock": arguments.clock, "cores_of_others": others() if quiet is None else quiet.cores}
        rows = [row | beside for row in rows]
        for row in rows:
            harness.say(**row)
        if not arguments.no_save:
            harness.append_rows("ppo_step", device, rows)


if __name__ == "__main__":
    main()
