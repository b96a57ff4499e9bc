"""TRPO's update (arXiv 1502.05477): the natural-gradient step, held inside a KL ball by a line search.

For small models. It takes second derivatives of the KL, which the fused head and fused attention do not have: it runs
on a plain torch head (`logits = hidden @ weight.T`) and eager attention (`fisher.check_double_backward`), in float32,
with dropout off. One step costs a gradient, cg_iterations + 1 products with the Fisher matrix, each a backward through
a backward, and a forward per try of the line search; it holds a handful of vectors of the model's size.

    old = logits().log_softmax(-1).detach()
    surrogate = lambda: ppo_loss(logps(), old_logps, advantages, mask, epsilon_low=1.0, epsilon_high=math.inf).loss
    result = trpo_step(model.parameters(), surrogate, lambda: categorical_kl(old, logits(), mask), max_kl=0.01)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.trainers.fisher import FisherProduct, Term, dot, gradient, natural_gradient, scalar


class TRPOResult(NamedTuple):
    """What a step did, in plain floats.

    kl and improvement are those of the parameters as they now stand; expected_improvement is the first-order one of
    the step that was taken, or of the full step if none was.
    """

    accepted: bool
    kl: float  # nats, as kl() measures them
    improvement: float  # surrogate before − after; 0 if no step was accepted
    step_fraction: float  # of the full natural-gradient step; 0 if no step was accepted
    cg_residual: float  # ‖g − (F + damping)x‖/‖g‖
    expected_improvement: float


def trpo_step(
    parameters: Iterable[Tensor],
    surrogate: Term | Sequence[Term],
    kl: Term | Sequence[Term],
    *,
    max_kl: float,
    cg_iterations: int = 10,
    cg_damping: float = 0.1,
    cg_tolerance: float = 1e-5,
    line_search_steps: int = 10,
    backtrack: float = 0.5,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> TRPOResult:
    """Lower `surrogate` by one natural-gradient step with KL(π_old‖π) ≤ max_kl; parameters change in place.

        (F + damping)x = −∇surrogate by conjugate gradient,    step = x·√(2·max_kl / xᵀFx),
        then step, backtrack·step, backtrack²·step, … until the KL is at most max_kl and the surrogate is lower

    F is the Hessian of the KL at π = π_old, the Fisher matrix; it enters by products alone. The damping steadies the
    direction and does not enter the length, which is that of the quadratic model of the KL.

    Args:
        parameters: float32 or float64, on one device; those without requires_grad are left alone.
        surrogate: () -> 0-dim loss, minimised: the mean of −ρA. Or several such callables, one per micro-batch, whose
            values are *added up*: give each the whole's denominator (`num_items`), as for any loss of this package.
        kl: () -> 0-dim mean KL(π_old‖π), twice differentiable and 0 at the parameters as they are given. Or several.
            With one callable its graph is kept over the products; with several each product computes it anew.
        max_kl: the constraint, in the nats of kl().
        cg_iterations, cg_tolerance: conjugate gradient stops after so many products, or when the residual is below
            cg_tolerance times the gradient.
        reduce: sums a tensor over processes, each with its share of the batch; every process takes the same step.

    Returns:
        TRPOResult. Where no step is accepted the parameters are as before, to the bit; so they are after an error.

    Raises:
        ValueError: an option out of range; parameters in 16 bits, or none to train; a surrogate or KL that is not a
            finite scalar, does not depend on the parameters or has no second derivative; a KL that does not start at 0.
    """
    for name, value, low, high in (
        ("max_kl", max_kl, 0, math.inf), ("cg_iterations", cg_iterations, 0, math.inf),
        ("line_search_steps", line_search_steps, 0, math.inf), ("backtrack", backtrack, 0, 1),
    ):  # fmt: skip
        if not low < value < high:
            raise ValueError(f"{name}={value}: it must lie between {low} and {high}, both excluded")
    for name, value in (("cg_damping", cg_damping), ("cg_tolerance", cg_tolerance)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value}: it must be at least 0 and finite")
    trained = _checked(parameters)
    total = reduce or (lambda tensor: tensor)
    surrogates, kls = ([t] if callable(t) else list(t) for t in (surrogate, kl))

    before, start = _value("surrogate", surrogates, total), _value("kl", kls, total)
    if abs(start) > 0.01 * max_kl:
        raise ValueError(
            f"kl() is {start:.3g} before the step, accepted is about 0: the step starts at π = π_old, with dropout off"
        )
    descent = total(-gradient("surrogate", surrogates, trained))
    if not descent.isfinite().all():
        raise ValueError("the gradient of surrogate() is not finite")
    nothing = TRPOResult(False, start, 0.0, 0.0, 0.0, 0.0)
    if not descent.any():
        return nothing
    direction, curvature, residual = natural_gradient(
        FisherProduct(trained, kls, reduce=reduce), descent, damping=cg_damping, iterations=cg_iterations,
        tolerance=cg_tolerance,
    )  # fmt: skip
    if not curvature > 0:  # the KL does not feel the direction, to rounding: no length follows from it
        return nothing._replace(cg_residual=residual)
    step = direction * math.sqrt(2 * max_kl / curvature)
    expected = dot(descent, step)

    old = [parameter.detach().clone() for parameter in trained]
    fraction, accepted = 1.0, False
    try:
        for _ in range(line_search_steps):
            _move(trained, old, step, fraction)
            loss, distance = _value("surrogate", surrogates, total, False), _value("kl", kls, total, False)
            accepted = distance <= max_kl and loss < before  # neither holds for NaN
            if accepted:
                return TRPOResult(True, distance, before - loss, fraction, residual, expected * fraction)
            fraction *= backtrack
    finally:
        if not accepted:
            _move(trained, old)
    return nothing._replace(cg_residual=residual, expected_improvement=expected)


def _checked(parameters: Iterable[Tensor]) -> list[Tensor]:
    trained = [parameter for parameter in dict.fromkeys(parameters) if parameter.requires_grad]
    if not trained:
        raise ValueError("parameters: none requires grad")
    for i, parameter in enumerate(trained):
        if parameter.dtype not in (torch.float32, torch.float64) or parameter.device != trained[0].device:
            raise ValueError(
                f"parameters[{i}], {tuple(parameter.shape)}, is {parameter.dtype} on {parameter.device}: accepted are "
                f"float32 and float64, all on one device ({trained[0].device})"
            )
    return trained


@torch.no_grad()
def _value(name: str, terms: Sequence[Term], total: Callable[[Tensor], Tensor], finite: bool = True) -> float:
    if not terms:
        raise ValueError(f"{name} holds no callable")
    value = float(total(torch.stack([scalar(name, term()).double() for term in terms]).sum()))
    if finite and not math.isfinite(value):
        raise ValueError(f"{name}() is {value} before the step, accepted is a finite number")
    return value


@torch.no_grad()
def _move(parameters: Sequence[Tensor], old: Sequence[Tensor], step: Tensor | None = None, fraction: float = 0) -> None:
    """Set parameters to old + fraction·step, or back to old."""
    parts = [None] * len(old) if step is None else step.split([tensor.numel() for tensor in old])
    for parameter, start, part in zip(parameters, old, parts, strict=True):
        parameter.copy_(start if part is None else start + part.view_as(start) * fraction)
