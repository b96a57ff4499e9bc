"""Whether the numbers are right: every schedule and every kernel against float64, before anything is timed.

The rule: |ours − exact| ≤ 2·|plain PyTorch in the same dtype − exact| + floor · scale, in the largest element. `excess`
is the left side over the right one. Plain PyTorch has its logits in the inputs' dtype and a float32 softmax. Scores are
float32 whatever the inputs are, and are held to a float32 floor; gradients to that of their dtype, relative to their
own largest element. Beside the rule: log-probs never above 0, no number that is not finite, two calls equal bit by bit,
and a row's scores by the fused forward independent of the rows beside it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import heads
import torch
from inputs import IGNORED, Inputs
from shapes import Shape
from torch import Tensor

from cells import Cell, Row, Tell, numerics_kernels, protected, short

DTYPES = ("float32", "bfloat16", "float16")
SHAPES = [Shape(32, 19, 301), Shape(512, 1001, 50257), Shape(1024, 512, 32768), Shape(2048, 4096, 128256)]
SMALL = [Shape(32, 19, 301)]
SCORE_FLOOR = 4e-6
FLOORS = {torch.float32: 4e-6, torch.bfloat16: 2e-3, torch.float16: 5e-4}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled, softcap, bias": {"temperature": 0.9, "logit_scale": 1.2, "softcap": 20.0},
}
INTO = {"auto, added to a gradient": "auto", "deferred, added to a gradient": "deferred"}  # and its schedule
SCORES = ("logps", "lse", "entropy", "log_sum_sq_probs", "mean_logits")


def cells(device: str, small: bool) -> list[Cell]:
    found = []
    for number, shape in enumerate(SMALL if small else SHAPES):
        for dtype in DTYPES:
            for backend in backends(device):
                if number > 1 and backend == "torch":
                    continue  # plain PyTorch is not what large sizes could break
                gib = shape.V * (shape.N * 80 + shape.H * 70) / 2**30
                seconds = 3 + 4e-8 * shape.N * shape.V
                settings = {"shape": tuple(shape), "dtype": dtype, "backend": backend, "device": device}
                name = f"numerics/head/{backend}/{dtype}/{shape}"
                found.append(Cell("cells.numerics", name, 0, seconds, gib, settings))
    return found + numerics_kernels.cells(device, small)


def backends(device: str) -> list[str]:
    """Those that serve this device's tensors here, as named in results; found without touching the device."""
    from fastalign.ops.backends import available

    if device == "cuda" and not torch.cuda.is_available():  # a list of what would run
        return ["torch", "triton"]
    usable = [name for name, reason in available().items() if reason is None]
    return [name for name in usable if name == "torch" or (name == "cpu") == (device == "cpu")]


def run(cell: Cell, tell: Tell, skip: dict[str, str]) -> list[Row]:
    if "kernel" in cell.settings:
        return numerics_kernels.run(cell, tell, skip)
    s = cell.settings
    about = {key: s[key] for key in ("dtype", "backend")} | {"shape": str(Shape(*s["shape"]))}
    rows: list[Row] = []
    for peaked in (False, True):
        for options in OPTIONS:
            where = about | {"logits": "peaked" if peaked else "random", "head": options}
            label = f"{where['logits']}, {options}"
            if label in skip:
                continue
            tell(label)

            def compare(where: Row = where, peaked: bool = peaked, options: str = options) -> None:
                sizes = Shape(*s["shape"]), s["device"], getattr(torch, s["dtype"])
                problem = Problem.make(*sizes, peaked, OPTIONS[options])
                rows.extend(where | row for row in checks(problem, s["backend"], options == "plain"))

            if error := protected(compare):
                rows.append(where | {"check": "the float64 reference", "error": error})
    for row in rows:
        if row["error"] == "out of memory":  # says nothing of the numbers
            row["error"], row["refused"] = "", row["error"]
    for provider, reason in skip.items():
        rows.append(about | {"check": provider, "error": reason})
    return rows


def excess(ours: Tensor, naive: Tensor, exact: Tensor, floor: float, scale: float | None = None) -> float:
    """Error over what the rule allows; infinite where ours is not finite."""
    if not exact.numel():
        return 0.0
    if not ours.isfinite().all():
        return float("inf")
    scale = float(exact.abs().max()) if scale is None else scale
    allowed = 2 * float((naive.double() - exact).abs().max()) + floor * scale
    error = float((ours.double() - exact).abs().max())
    return error / allowed if allowed else float(error > 0) * float("inf") if error else 0.0


@dataclass
class Problem:
    """Inputs in a dtype, and what plain PyTorch makes of them in that dtype and in float64."""

    inputs: Inputs
    bias: Tensor | None
    options: dict[str, Any]
    into: Tensor | None = None  # float32 memory of the weight's gradient, where a call adds to it

    @classmethod
    def make(cls, shape: Shape, device: str, dtype: torch.dtype, peaked: bool, options: dict[str, Any]) -> Problem:
        inputs = Inputs(shape, device, dtype, sequences=8 if shape.N % 8 == 0 else 1, fraction=0.75, peaked=peaked)
        bias = torch.randn(shape.V, device=device, dtype=dtype).requires_grad_() if "softcap" in options else None
        return cls(inputs, bias, options)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.inputs.hidden, self.inputs.weight] + ([] if self.bias is None else [self.bias])

    def reference(self, dtype: torch.dtype) -> tuple[list[Tensor], Any]:
        """(leaves, LinearLogps) by the formula: float64 in all of it, else float32 behind the logits."""
        leaves = [t.detach().to(dtype).requires_grad_() for t in self.leaves]
        u = leaves[0] @ leaves[1].T + (leaves[2] if len(leaves) > 2 else 0)
        return leaves, scores(u if dtype == torch.float64 else u.float(), self.inputs.targets, **self.options)

    def losses(self) -> dict[str, Callable[[Any], Tensor]]:
        """Scalars of scores, float64: what sends a different gradient into every row."""
        i = self.inputs
        draw = torch.Generator().manual_seed(1)
        a, c, e = torch.randn(3, len(i.targets), generator=draw, dtype=torch.float64).to(i.hidden.device)
        return {
            "logps": lambda out: (out.logps.double() * a).sum() + 0.5 * (out.lse.double() * c).sum(),
            "entropy": lambda out: (out.logps.double() * a).sum() + 0.3 * (out.entropy.double() * e).sum(),
        } | {task: (lambda out, task=task: heads.LOSSES[task](i, out.logps)) for task in ("sft", "dpo", "ppo")}

    def sampled(self, exact: Any) -> None:
        """The losses' inputs, such that rounding moves no token across a bound of PPO's clipping."""
        i = self.inputs
        g = torch.Generator(i.hidden.device).manual_seed(2)
        steps = torch.tensor([0.0, 0.1, -0.1, 0.5, -0.5], device=i.hidden.device)
        index = torch.randint(0, 5, i.targets.shape, device=i.hidden.device, generator=g)
        i.__dict__["old_logps"] = (exact.logps.detach() - steps[index]).float() * (i.targets != IGNORED)
        sums = exact.logps.detach().view(i.sequences, -1).sum(1)
        i.__dict__["ref_logps"] = (sums + torch.randn(i.sequences, device=sums.device, generator=g)).float()


def scores(
    u: Tensor, targets: Tensor, *, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None
) -> Any:
    """LinearLogps of logits u (N, V), 0 where ignored."""
    from fastalign.types import LinearLogps

    z = (logit_scale * u if softcap is None else softcap * torch.tanh(logit_scale * u / softcap)) / temperature
    counts = targets != IGNORED
    log_p = z.log_softmax(-1)
    logps = log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    with torch.no_grad():
        others = (z.argmax(-1) == targets, (2 * log_p).exp().sum(-1).log(), z.mean(-1))
    found = (logps, z.logsumexp(-1), entropy, *others)
    return LinearLogps(*(torch.where(counts, x, torch.zeros_like(x)) for x in found))


def checks(problem: Problem, backend: str, plain: bool) -> Iterator[Row]:
    """One row for each schedule and loss."""
    from fastalign.ops.backends import resolve

    i = problem.inputs
    exact_leaves, exact = problem.reference(torch.float64)
    naive_leaves, naive = problem.reference(i.hidden.dtype)
    problem.sampled(exact)
    losses = problem.losses()
    invariant = resolve(backend, i.hidden).fused_forward is not None

    @functools.lru_cache(maxsize=1)  # they are large, and checks of one loss follow each other
    def gradients(loss: str) -> list[Any]:
        both = ((naive, naive_leaves), (exact, exact_leaves))
        return [torch.autograd.grad(losses[loss](out), leaves, retain_graph=True) for out, leaves in both]

    for name, loss, call in _calls(problem, backend, plain):
        row: Row = {"check": name, "error": ""}

        def check(row: Row = row, loss: str = loss, call: Any = call) -> None:
            problem.into = i.weight.new_zeros(i.weight.shape, dtype=torch.float32) if row["check"] in INTO else None
            out = _check(row, problem, call, losses, loss, naive, exact, gradients)
            if invariant and not loss:
                _check_invariance(problem, call, out)

        row["error"] = protected(check) or ""
        yield row


def _calls(problem: Problem, backend: str, plain: bool) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """(name, loss, call): the call returns LinearLogps, or the loss itself where a fused loss is called."""
    from fastalign import linear_logps
    from fastalign.ops.schedule import SCHEDULES

    i = problem.inputs
    given: dict[str, Any] = {"bias": problem.bias, "backend": backend, **problem.options}
    every = {"entropy": True, "top1": True, "log_sum_sq_probs": True, "mean_logits": True}

    def logps(frozen: bool = False, **options: Any) -> Callable[[], Any]:
        weight = i.weight.detach() if frozen else i.weight
        own = given | ({"bias": problem.bias.detach()} if frozen and problem.bias is not None else {})
        return lambda: linear_logps(i.hidden, weight, i.targets, rows=i.rows, **own, **options)

    for name, schedule in INTO.items():
        yield name, "logps", lambda s=schedule: logps(schedule=s, accumulate_into=problem.into)()
    yield "forward, every output", "", torch.no_grad()(logps(**every))
    yield "auto, every output", "entropy", logps(**every)
    yield "frozen, every output", "entropy", logps(frozen=True, **every)
    for schedule in ("auto", *(name for name in SCHEDULES if name not in ("forward", "streamed"))):
        for budget in (None, 24) if schedule in ("auto", "deferred", "cached") else (None,):
            name = schedule if budget is None else f"{schedule}, {budget} MiB"
            yield name, "logps", logps(schedule == "frozen", schedule=schedule, workspace_mb=budget)
    if plain:
        # which products "auto" takes may depend on the call before, and two calls are compared bit by bit
        skipped = [{"skip_rows": how} for how in ("never", "always")] if heads.skips_rows() else [{}]
        for task in ("sft", "dpo", "ppo"):
            ways = skipped if task == "ppo" else [{}]
            for way, (schedule, budget) in itertools.product(
                ways, (("auto", None), ("streamed", None), ("streamed", 24))
            ):
                given = {"schedule": schedule, "workspace_mb": budget, "backend": backend, **way}
                name = ", ".join([task, schedule, *(() if budget is None else (f"{budget} MiB",)), *way.values()])
                yield name, task, partial(heads.ours(task, **given), i)


def _check(
    row: Row, problem: Problem, call: Callable[[], Any], losses: Any, loss: str, naive: Any, exact: Any, gradients: Any
) -> Any:
    """Fills in `excess`, or `refused` where a schedule says that it cannot serve; raises what is wrong. The result."""
    try:
        out = call()
    except ValueError as refusal:
        if row["check"].split(",")[0] not in ("cached", "overlaid"):
            raise
        row["refused"] = short(refusal)
        return None
    worst: dict[str, float] = {}
    if isinstance(out, Tensor):
        value, theirs = (losses[loss](given).detach() for given in (exact, naive))
        worst["loss"] = excess(out.detach(), theirs, value, SCORE_FLOOR, float(value.abs()) + 1)
        total = out
    else:
        for name in SCORES:
            mine = getattr(out, name)
            if mine is not None:
                true = getattr(exact, name).detach()
                scale = max(1.0, float(true.abs().max()))
                worst[name] = excess(mine.detach(), getattr(naive, name).detach(), true, SCORE_FLOOR, scale)
        if not bool((out.logps <= 0).all()):
            raise AssertionError(f"a log-prob of {float(out.logps.detach().max()):g} is above 0")
        total = losses[loss](out) if loss else None
    grads = _gradients(problem, total)
    for name, mine, theirs, true in _named(grads, gradients(loss) if loss else None):
        worst[name] = excess(mine, theirs, true, FLOORS[mine.dtype])
    row["excess"], row["worst"] = max((value, name) for name, value in worst.items())
    if row["excess"] > 1:
        raise AssertionError(f"{row['worst']} errs by {row['excess']:.2f} times what the rule allows")
    again = call()
    same = [(a, b) for a, b in zip(_tensors(out), _tensors(again), strict=True)]
    if total is not None:
        repeated = _gradients(problem, again if isinstance(again, Tensor) else losses[loss](again))
        same += list(zip(grads, repeated, strict=True))
    if not all(a is b or torch.equal(a, b) for a, b in same):
        raise AssertionError("two calls differ")
    return out


def _check_invariance(problem: Problem, call: Callable[[], Any], out: Any) -> None:
    """Where the forward has no logits, a row's scores do not depend on the rows that are scored with it."""
    i = problem.inputs
    rows, keep = i.rows, i.keep
    for some in (slice(0, 1), slice(len(rows) // 3, len(rows) // 3 + 130)):
        i.rows, i.keep = rows[some], keep[some]
        try:
            alone = call()
        finally:
            i.rows, i.keep = rows, keep
        if not torch.equal(alone.logps[keep[some]], out.logps[keep[some]]):
            raise AssertionError(f"{len(rows[some])} rows alone are scored otherwise than among {len(rows)}")


def _tensors(out: Any) -> list[Any]:
    return [out] if isinstance(out, Tensor) else list(out)


def _gradients(problem: Problem, total: Tensor | None) -> list[Tensor | None]:
    if total is None:
        return []
    if problem.into is not None:
        problem.into.zero_()
    found = list(torch.autograd.grad(total, problem.leaves, allow_unused=True))
    if problem.into is not None:
        found[1] = problem.into.clone()
    return found


def _named(grads: list[Any], expected: Any) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    names = ("grad_hidden", "grad_weight", "grad_bias")
    for number, mine in enumerate(grads):
        if mine is not None:
            yield names[number], mine, expected[0][number], expected[1][number]
