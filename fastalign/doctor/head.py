"""Identities of the fused head on given hidden states: every backend and schedule, and the losses at their start.

The oracle is the formula in float64, a slab of the vocabulary at a time, written out here and used by nothing else:

    z = softcap · tanh(s·(u + b)/softcap)/τ,   logps = z_y − logsumexp z,   ∂/∂z Σ c·logps = c·(onehot − p)

A backend passes when it is no worse than twice plain PyTorch in the same dtype, plus a floor of rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastalign.doctor.findings import FAILED, OK, SKIPPED, Finding, compare, guarded
from fastalign.linear import linear_dpo_loss, linear_ppo_loss
from fastalign.ops import backends, gae, linear_logps, sequence_logps

FLOORS = {torch.float32: 2e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4}
"""Of an error relative to the largest value, by the dtype of the operands."""

_SLAB = 8192
SCHEDULES = ("overlaid", "cached", "frozen")


@dataclass(frozen=True)
class HeadProblem:
    """The hidden states of scored tokens of whole pairs, and the head they go through.

    hidden (n, H); weight (V, H), bias (V,) or None; targets (n,) int64; cu_seqlens (2P + 1,) int32 on the host, chosen
    responses first; logit_scale, softcap and temperature as in `linear_logps`.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        names = ("bias", "logit_scale", "softcap", "temperature")
        return {"rows": torch.arange(len(self.hidden))} | {name: getattr(self, name) for name in names}

    @property
    def head(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.targets

    @property
    def floor(self) -> float:
        return FLOORS.get(self.hidden.dtype, FLOORS[torch.float32])

    def coefficients(self) -> Tensor:
        """(n,) a different number into each log-prob, the same at every call."""
        return torch.linspace(-1.0, 1.0, len(self.hidden), dtype=torch.float64).to(self.hidden.device)

    def first(self, count: int) -> HeadProblem:
        """Its first tokens, as a problem of two responses."""
        count = min(count, len(self.hidden)) // 2 * 2 or len(self.hidden)
        cu = torch.tensor([0, count // 2, count], dtype=torch.int32)
        return replace(self, hidden=self.hidden[:count], targets=self.targets[:count], cu_seqlens=cu)


def oracle(problem: HeadProblem, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(logps (n,), ∂Σ c·logps/∂hidden (n, H)), operands and products in `dtype`, the softmax in float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    hidden = problem.hidden.detach().to(dtype)
    scale = problem.logit_scale if problem.softcap is None else problem.logit_scale / problem.softcap
    last = (1.0 if problem.softcap is None else problem.softcap) / problem.temperature

    def slabs() -> Iterator[tuple[int, Tensor]]:
        for start in range(0, len(problem.weight), _SLAB):
            yield start, problem.weight[start : start + _SLAB].detach().to(dtype)

    parts, slopes = [], []
    for start, weight in slabs():
        u = (hidden @ weight.T).to(wide)
        if problem.bias is not None:
            u = u + problem.bias[start : start + _SLAB].detach().to(wide)
        x = scale * u
        parts.append(last * (x if problem.softcap is None else x.tanh()))
        slopes.append(last * scale * (torch.ones_like(x) if problem.softcap is None else 1 - x.tanh().square()))
    logps = torch.cat(parts, 1).log_softmax(1)
    grad = -logps.exp()
    rows = torch.arange(len(hidden), device=hidden.device)
    grad[rows, problem.targets] += 1
    grad = grad * problem.coefficients().to(wide)[:, None] * torch.cat(slopes, 1)
    grad_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
    for start, weight in slabs():
        grad_hidden += (grad[:, start : start + len(weight)].to(dtype) @ weight).to(wide)
    return logps[rows, problem.targets], grad_hidden


def examine_head(problem: HeadProblem) -> Iterator[Finding]:
    """Every check of this module."""
    small = problem.first(64)
    yield from guarded("head", lambda: _backends(small))
    yield from guarded("schedules", lambda: _schedules(problem))
    yield from guarded("dpo", lambda: _dpo(problem))
    yield from guarded("temperature", lambda: _temperature(small))
    yield from guarded("ppo", lambda: _ppo(problem))
    yield from guarded("gae", lambda: _gae(problem.hidden.device))


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def _error(found: Tensor, truth: Tensor) -> float:
    """Largest difference relative to the largest value."""
    if not bool(found.isfinite().all()):
        return math.inf
    return float((found.double() - truth.double()).abs().max() / truth.double().abs().max().clamp(min=1e-30))


def _logps_and_grad(problem: HeadProblem, weight: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    hidden = _leaf(problem.hidden)
    out = linear_logps(hidden, weight, problem.targets, **problem.options, **how)
    (out.logps.double() * problem.coefficients()).sum().backward()
    assert hidden.grad is not None
    return out.logps.detach(), hidden.grad


def _backends(problem: HeadProblem) -> Iterator[Finding]:
    """Log-probs and gradients of each backend against float64."""
    truth, plain = oracle(problem), oracle(problem, problem.hidden.dtype)
    allowed = [2 * _error(ours, exact) + problem.floor for ours, exact in zip(plain, truth, strict=True)]
    for name, reason in backends.available().items():
        check = f"head on backend {name}"
        if reason is None:
            try:
                backends.resolve(name, problem.hidden)
            except ValueError as error:
                reason = str(error)
        if reason is not None:
            yield Finding(check, SKIPPED, reason)
            continue
        logps, grad = _logps_and_grad(problem, problem.weight.detach(), backend=name)
        for what, ours, exact, limit in zip(("log-probs", "gradient"), (logps, grad), truth, allowed, strict=True):
            yield compare(check, _error(ours, exact), limit, f"error of {what} against float64")
        highest = float(logps.max())
        yield Finding(check, OK if highest <= 0 else FAILED, f"highest log-prob {highest:.2e}, never above 0")


def _schedules(problem: HeadProblem) -> Iterator[Finding]:
    """The same gradients whenever the coefficient of a row is known."""
    tolerance = 10 * problem.floor

    def gradients(schedule: str) -> tuple[Tensor, Tensor | None]:
        weight = problem.weight.detach() if schedule == "frozen" else _leaf(problem.weight)
        _, grad = _logps_and_grad(problem, weight, schedule=schedule)
        return grad, weight.grad

    hidden, weight = gradients("deferred")
    assert weight is not None
    for schedule in SCHEDULES:
        check = f"schedule {schedule}"
        try:
            ours, ours_weight = gradients(schedule)
        except ValueError as error:
            yield Finding(check, SKIPPED, str(error))
            continue
        yield compare(check, _error(ours, hidden), tolerance, "gradient of hidden, from deferred's")
        if ours_weight is not None:
            yield compare(check, _error(ours_weight, weight), tolerance, "gradient of weight, from deferred's")
        del ours, ours_weight


def _dpo(problem: HeadProblem) -> Iterator[Finding]:
    """At the reference the loss is log 2; a constant on both sides changes nothing; pairs add up; schedules agree."""
    with torch.no_grad():
        logps = linear_logps(*problem.head, **problem.options).logps
    sums = sequence_logps(logps, cu_seqlens=problem.cu_seqlens)
    pairs = len(sums) // 2
    rounding = 10 * problem.floor * max(1.0, float(sums.abs().max()))
    beta = 0.1

    def run(ref: Tensor, schedule: str = "auto", part: slice | None = None) -> tuple[float, Tensor, Any]:
        chosen = problem if part is None else _pairs(problem, part)
        hidden = _leaf(chosen.hidden)
        output = linear_dpo_loss(
            hidden, chosen.weight.detach(), chosen.targets, ref_logps=ref, cu_seqlens=chosen.cu_seqlens, beta=beta,
            num_items=pairs, schedule=schedule, **chosen.options,
        )  # fmt: skip
        output.loss.backward()
        assert hidden.grad is not None
        return float(output.loss.detach()), hidden.grad, output.metrics

    loss, grad, metrics = run(sums)
    yield compare("dpo, policy = reference", abs(loss - math.log(2)), beta * rounding, "loss minus log 2")
    yield compare("dpo, policy = reference", abs(float(metrics["rewards/margins"].value)), beta * rounding, "margin")
    shifted, _, _ = run(sums + 3.0)
    yield compare("dpo, reference + 3 on both sides", abs(shifted - loss), beta * rounding, "change of the loss")
    for schedule in ("streamed", "deferred"):
        _, other, _ = run(sums, schedule)
        yield compare(f"dpo, {schedule}", _error(other, grad), 10 * problem.floor, "gradient, from auto's")
    halves = [run(torch.cat([part[cut] for part in sums.chunk(2)]), part=cut) for cut in _halves(pairs)]
    total = sum(half[0] for half in halves)
    yield compare("dpo, split", abs(total - loss), beta * rounding, "sum over parts, from the whole")


def _halves(pairs: int) -> list[slice]:
    return [slice(0, pairs // 2), slice(pairs // 2, pairs)] if pairs > 1 else [slice(0, 1)]


def _pairs(problem: HeadProblem, part: slice) -> HeadProblem:
    """Some of the pairs of a problem."""
    cu, pairs = problem.cu_seqlens.tolist(), (len(problem.cu_seqlens) - 1) // 2
    numbers = [side + i for side in (0, pairs) for i in range(part.start, part.stop)]
    index = torch.cat([torch.arange(cu[i], cu[i + 1]) for i in numbers]).to(problem.hidden.device)
    lengths = torch.tensor([0] + [cu[i + 1] - cu[i] for i in numbers], dtype=torch.int32)
    return replace(
        problem, hidden=problem.hidden[index], targets=problem.targets[index],
        cu_seqlens=lengths.cumsum(0).to(torch.int32),
    )  # fmt: skip


def _temperature(problem: HeadProblem) -> Iterator[Finding]:
    """Twice the hidden states at twice the temperature are the same logits."""
    check = "hidden · 2 at temperature · 2"
    if problem.bias is not None or problem.softcap is not None:
        yield Finding(check, SKIPPED, "the head has a bias or a softcap")
        return
    twice = replace(problem, hidden=problem.hidden * 2, temperature=problem.temperature * 2)
    with torch.no_grad():
        one, two = (linear_logps(*each.head, **each.options).logps for each in (problem, twice))
    yield compare(check, _error(two, one), 4 * problem.floor, "log-probs, from the plain ones")


def _ppo(problem: HeadProblem) -> Iterator[Finding]:
    """At old = new the loss is −mean(A), nothing is clipped and the KL is 0."""
    with torch.no_grad():
        logps = linear_logps(*problem.head, **problem.options).logps
    advantages = problem.coefficients().float() + 0.25
    output = linear_ppo_loss(
        _leaf(problem.hidden), problem.weight.detach(), problem.targets, old_logps=logps, advantages=advantages,
        ref_logps=logps, kl_coef=0.1, **problem.options,
    )  # fmt: skip
    tolerance = 10 * problem.floor
    check = "ppo, old = new"
    yield compare(
        check, abs(float(output.loss.detach()) + float(advantages.mean())), tolerance, "loss + mean advantage"
    )
    for name in ("clip_fraction", "approx_kl"):
        yield compare(check, abs(float(output.metrics[name].value)), tolerance, name)


def _gae(device: torch.device) -> Iterator[Finding]:
    """λ = 1 is the return minus the value, λ = 0 the one-step error."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 4, 33, generator=generator).to(device)
    mask = torch.arange(33, device=device) < torch.tensor([33, 20, 1, 32], device=device)[:, None]
    rewards, values = rewards * mask, values * mask
    after = torch.cat([values[:, 1:], values.new_zeros(4, 1)], 1)
    returns = rewards.double().flip(1).cumsum(1).flip(1)
    truth = {1.0: (returns - values) * mask, 0.0: (rewards + after - values) * mask}
    for name, reason in backends.available().items():
        if reason is not None or (name == "cpu" and device.type != "cpu"):
            continue
        for lam, exact in truth.items():
            advantages, _ = gae(rewards, values, mask, gamma=1.0, lam=lam, backend=name)
            yield compare(f"gae on backend {name}, λ = {lam:g}", _error(advantages, exact), 1e-5, "error")
