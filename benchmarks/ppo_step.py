"""A PPO update's head, and GAE, against their peers: time as ratios in one run, peak memory in processes of their own.

    python benchmarks/ppo_step.py [--shapes qwen-like …] [--tasks update gae] [--device cpu|cuda] [--rounds 5]
    [--no-memory] [--no-save]

Tasks:
    update   hidden states → log-probs, mean entropy, clipped loss, gradients of hidden and weight. `live` is the share
             of tokens with a gradient; of the others most are sequences whose advantage is 0, as in a group whose
             rewards tie, and the rest is clipped
    gae      advantages and returns of 512 right-padded sequences of up to 2048 tokens

Every provider's loss and gradients are compared with naive's before it is timed; one that differs is a row that says
so.
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

TASKS = ("update", "gae")
NARROW = {"cpu": Shape(1024, 256, 151936), "cuda": Shape(8192, 1024, 151936)}
SEQUENCES = 8
LIVE = (1.0, 0.5)
EPSILON = 0.2
GAMMA, LAM = 0.99, 0.95
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


def naive(i: Inputs, old_logps: Tensor, advantages: Tensor, entropy: bool) -> Tensor:
    logps, everything = log_probs(i.hidden @ i.weight.T, i.targets)
    if entropy:
        with torch.no_grad():  # 128 tokens at a time
            parts = everything.view(-1, everything.shape[-1]).split(128)
            torch.cat([-(part.exp() * part).sum(-1) for part in parts]).mean()
    ratio = torch.exp(logps - old_logps)
    advantages = advantages[:, None]
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages).mean()


def liger(i: Inputs, old_logps: Tensor, advantages: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="dapo")
    mask = torch.ones_like(i.targets)
    return loss(i.hidden, i.weight, i.targets, mask, advantages, old_per_token_logps=old_logps)[0]


def ours(i: Inputs, old_logps: Tensor, advantages: Tensor, schedule: str, entropy: bool) -> Tensor:
    from fastalign import linear_ppo_loss

    return linear_ppo_loss(
        i.hidden, i.weight, i.targets, old_logps=old_logps, advantages=advantages[:, None].expand_as(i.targets),
        schedule=schedule, token_metrics=entropy,
    ).loss  # fmt: skip


UPDATE: dict[str, Callable[[Inputs, Tensor, Tensor], Tensor]] = {
    "naive": lambda i, old, a: naive(i, old, a, True),
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


def update(shape: Shape, device: str, dtype: torch.dtype, rounds: int, memory: bool) -> list[dict[str, Any]]:
    inputs, calls, rows = Inputs(shape, device, dtype), {}, []
    for live in LIVE:
        reference = call_of(inputs, "naive", live)()
        expected = [reference, inputs.hidden.grad, inputs.weight.grad]
        alive = float((expected[1] != 0).any(-1).float().mean())
        for name in UPDATE:
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
    spread = harness.interleaved(calls, rounds=rounds, device=device)
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
        row["over_naive"] = times[name, live] / times[baseline(name), live]
        if live != 1.0:
            row["over_all_live"] = times[name, live] / times[name, 1.0]
        if memory:
            peak, error = harness.peak_memory(build, name, live, shape, device, dtype, device=device)
            row["error"] = "" if error is None else error.splitlines()[0][:200]
            gradients = (shape.N + shape.V) * shape.H * size
            row["beside_gradients_mib"] = None if peak is None else (peak - gradients) / 2**20
    return [{"task": "update", "shape": str(shape), "dtype": str(dtype).removeprefix("torch.")} | row for row in rows]


# ---- GAE


def tokens_one_by_one(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Python numbers, a token at a time."""
    advantages = []
    for r, v, m in zip(rewards.tolist(), values.tolist(), mask.tolist(), strict=True):
        row, following, ahead = [0.0] * len(r), 0.0, 0.0
        for t in range(len(r) - 1, -1, -1):
            if m[t]:
                ahead = r[t] + GAMMA * following - v[t] + GAMMA * LAM * ahead
                row[t], following = ahead, v[t]
        advantages.append(row)
    found = torch.tensor(advantages, device=rewards.device)
    return found, torch.where(mask, found + values, 0)


def positions_one_by_one(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A loop over positions, all sequences at once, as TRL's PPOTrainer had it."""
    rewards, values = rewards * mask, values * mask
    ahead, reversed_advantages, T = 0.0, [], rewards.shape[1]
    for t in reversed(range(T)):
        following = values[:, t + 1] if t < T - 1 else 0.0
        ahead = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * ahead
        reversed_advantages.append(ahead)
    advantages = torch.stack(reversed_advantages[::-1], dim=1) * mask
    return advantages, advantages + values


def doubling_scan(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A_t = δ_t + γλ·A_{t+1} in log2 T vectorised steps: after step k a sum spans 2^k tokens."""
    rewards, values = rewards * mask, values * mask
    advantages = rewards - values
    advantages[:, :-1] += GAMMA * values[:, 1:]
    step, factor = 1, GAMMA * LAM
    while step < advantages.shape[1]:
        advantages[:, :-step] += factor * advantages[:, step:].clone()
        step, factor = 2 * step, factor * factor
    advantages *= mask
    return advantages, advantages + values


def fused(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    from fastalign.ops import gae

    return gae(rewards, values, mask, gamma=GAMMA, lam=LAM)


GAE: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "python loop over tokens": tokens_one_by_one,
    "torch loop over positions": positions_one_by_one,
    "torch log-step scan": doubling_scan,
    "fastalign": fused,
}


def gae_rows(device: str, rounds: int, B: int = 512, T: int = 2048) -> list[dict[str, Any]]:
    g = torch.Generator(device).manual_seed(0)
    rewards, values = torch.randn(2, B, T, device=device, generator=g)
    lengths = torch.randint(T // 2, T + 1, (B, 1), device=device, generator=g)
    given = rewards, values, torch.arange(T, device=device) < lengths
    expected = tokens_one_by_one(*given)
    for name, provider in GAE.items():
        for mine, true in zip(provider(*given), expected, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    calls = {name: lambda provider=provider: provider(*given) for name, provider in GAE.items()}
    times = harness.interleaved(calls, rounds=rounds, device=device)
    scan = harness.median(times["torch log-step scan"])
    rows = []
    for name, seconds in times.items():
        middle = harness.median(seconds)
        row = {"provider": name, "seconds": middle, "fastest": min(seconds), "over_scan": middle / scan}
        rows.append({"task": "gae", "shape": f"{B}x{T}", "dtype": "float32"} | row)
    return rows


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
    device = arguments.device
    shapes = {"qwen-like": CPU["qwen-like"]} if device == "cpu" else {"qwen3-8b": CUDA["qwen3-8b"]}
    shapes["narrow"] = NARROW[device]
    dtype = getattr(torch, arguments.dtype or ("float32" if device == "cpu" else "bfloat16"))
    runs: list[Callable[[], list[dict[str, Any]]]] = []
    if "gae" in arguments.tasks:
        runs.append(lambda: gae_rows(device, arguments.rounds))
    if "update" in arguments.tasks:
        for name in arguments.shapes or shapes:
            runs.append(
                lambda shape=shapes[name]: update(shape, device, dtype, arguments.rounds, not arguments.no_memory)
            )
    for run in runs:
        others = harness.cores_of_others()
        found = run()
        rows = [row | {"cores_of_others": others()} for row in found]
        for row in rows:
            harness.say(**row)
        if not arguments.no_save:
            harness.append_rows("ppo_step", device, rows)


if __name__ == "__main__":
    main()
