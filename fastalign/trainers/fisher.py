"""The KL that TRPO bounds, products with its Hessian, the Fisher matrix, and the systems solved with nothing else.

Vectors are the parameters laid end to end, (n,), in the widest of their dtypes, float32 or float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

Term = Callable[[], Tensor]
"""() -> 0-dim float tensor, evaluated anew at every call."""


class FisherProduct:
    """v -> F·v with F the Hessian of the KL at the parameters, by a backward through its gradient.

    With one callable the graph of its gradient is kept over the products; with several, whose values are added up, each
    product computes them anew. reduce sums a tensor over processes.
    """

    def __init__(
        self, parameters: Sequence[Tensor], kl: Sequence[Term], *, reduce: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.parameters, self.kl, self.reduce = list(parameters), list(kl), reduce
        self._kept = self._slopes(self.kl[0]) if len(self.kl) == 1 else None

    def __call__(self, vector: Tensor) -> Tensor:
        parts = vector.split([parameter.numel() for parameter in self.parameters])
        parts = tuple(part.view_as(p).to(p.dtype) for part, p in zip(parts, self.parameters, strict=True))
        product = torch.zeros_like(vector)
        for term in self.kl:
            slopes = self._slopes(term) if self._kept is None else self._kept
            live = [i for i, slope in enumerate(slopes) if slope.requires_grad]
            if not live:
                raise ValueError("kl() has no second derivative: it is linear in the parameters")
            try:
                columns = torch.autograd.grad(
                    [slopes[i] for i in live], self.parameters, [parts[i] for i in live],
                    retain_graph=self._kept is not None, materialize_grads=True,
                )  # fmt: skip
            except RuntimeError as error:
                _explain(error)
                raise
            product += flat(columns, vector.dtype)
        return product if self.reduce is None else self.reduce(product)

    def _slopes(self, term: Term) -> tuple[Tensor, ...]:
        try:
            return slopes_of("kl", term, self.parameters, create_graph=True)
        except RuntimeError as error:
            _explain(error)
            raise


def natural_gradient(
    fisher: Callable[[Tensor], Tensor], descent: Tensor, *, damping: float, iterations: int, tolerance: float
) -> tuple[Tensor, float, float]:
    """(x, xᵀFx, relative residual) with (F + damping)x = descent, by conjugate gradient on products with F."""
    x, residual = conjugate_gradient(
        lambda v: fisher(v) + damping * v, descent, iterations=iterations, tolerance=tolerance
    )
    return x, dot(x, fisher(x)), residual


@torch.no_grad()
def conjugate_gradient(
    product: Callable[[Tensor], Tensor], target: Tensor, *, iterations: int, tolerance: float
) -> tuple[Tensor, float]:
    """(x, ‖target − A·x‖/‖target‖) with A·v = product(v), A symmetric and positive definite; Hestenes and Stiefel 1952.

    Stops after `iterations` products, when the residual is at most `tolerance`, or where A is found not to be positive.
    """
    x, residual = torch.zeros_like(target), target.clone()
    search = target.clone()
    square = whole = dot(target, target)
    for _ in range(iterations):
        if square <= tolerance**2 * whole:
            break
        with torch.enable_grad():
            image = product(search)
        curvature = dot(search, image)
        if not curvature > 0:
            break
        x.add_(search, alpha=square / curvature)
        residual.sub_(image, alpha=square / curvature)
        following = dot(residual, residual)
        search.mul_(following / square).add_(residual)
        square = following
    return x, math.sqrt(square / whole) if whole else 0.0


def categorical_kl(
    old_logps: Tensor, logits: Tensor, mask: Tensor | None = None, *, num_items: int | Tensor | None = None
) -> Tensor:
    """Mean over tokens of KL(π_old‖π) = Σ_v π_old(v)·(log π_old(v) − log π(v)) over the whole vocabulary, in nats.

    Args:
        old_logps: (B, T, V) float, log-probs of π_old, detached. A token may have probability 0 (−inf).
        logits: (B, T, V) float, of π (divided by the temperature), differentiable, twice. float64 stays, else float32.
        mask: (B, T) bool, True where a token was sampled; what lies outside, NaN included, never enters.
        num_items: the tokens of the whole batch where this is a part of it; None: those at hand.

    Returns:
        0-dim.
    """
    if old_logps.shape != logits.shape or logits.dim() < 2:
        raise ValueError(f"old_logps {tuple(old_logps.shape)} and logits {tuple(logits.shape)} must both be (B, T, V)")
    if old_logps.requires_grad:
        raise ValueError("old_logps requires grad, but no gradient flows there: detach it")
    mask = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device) if mask is None else mask
    if mask.shape != logits.shape[:-1] or mask.dtype != torch.bool:
        raise ValueError(f"mask: {mask.dtype} {tuple(mask.shape)}, accepted is bool {tuple(logits.shape[:-1])}")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    new = torch.where(mask[..., None], logits.to(dtype), 0).log_softmax(-1)
    old = torch.where(mask[..., None], old_logps.to(dtype), -torch.inf)
    possible = old > -torch.inf  # 0·log 0 = 0
    terms = old.exp() * torch.where(possible, old - torch.where(possible, new, 0), 0)
    return terms.sum() / (mask.sum().clamp(min=1) if num_items is None else num_items)


def check_double_backward(model: nn.Module) -> None:
    """Raise ValueError if a part of `model` uses an attention that has no second derivative: any but eager.

    SDPA, flash and flex attention have kernels without one. A module without a transformers config is taken as it is.
    """
    for name, module in model.named_modules():
        found = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if found not in (None, "eager"):
            raise ValueError(
                f"TRPO takes second derivatives, which attn_implementation={found!r} of {name or type(model).__name__} "
                "does not have: load the model with attn_implementation='eager'"
            )


def scalar(name: str, value: Tensor) -> Tensor:
    """`value`, if it is a 0-dim float tensor; else ValueError naming the callable that gave it."""
    if value.dim() or not value.is_floating_point():
        raise ValueError(f"{name}() gave {value.dtype} {tuple(value.shape)}, accepted is a 0-dim float tensor")
    return value


def gradient(name: str, terms: Sequence[Term], parameters: Sequence[Tensor]) -> Tensor:
    """The gradient of the sum of `terms`, laid end to end."""
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=dtype, device=parameters[0].device)
    for term in terms:
        total += flat(slopes_of(name, term, parameters), dtype)
    return total


def slopes_of(name: str, term: Term, parameters: Sequence[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    """One gradient per parameter, zeros where the term does not see it; ValueError if it sees none."""
    with torch.enable_grad():
        value = scalar(name, term())
        found: Sequence[Tensor | None] = [None]
        if value.requires_grad:
            found = torch.autograd.grad(value, parameters, create_graph=create_graph, allow_unused=True)
    if all(slope is None for slope in found):
        raise ValueError(f"{name}() does not depend on the parameters")
    return tuple(torch.zeros_like(p) if slope is None else slope for slope, p in zip(found, parameters, strict=True))


def flat(tensors: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors])


def dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.double(), b.double()))


def _explain(error: RuntimeError) -> None:
    """Raise ValueError with the way out if autograd says that an operation has no second derivative."""
    if any(words in str(error) for words in ("not implemented", "not support", "differentiate twice", "no autograd")):
        raise ValueError(
            f"kl() has no second derivative with respect to the parameters ({error}). It needs a plain torch head and "
            "attn_implementation='eager', see check_double_backward"
        ) from error
