"""The one error rule, and problems to apply it to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastalign.ops import backends
from fastalign.types import LinearLogps

FLOORS = {torch.float32: 2e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4}


def usable_backends() -> list[str]:
    """Backends that can serve CPU tensors in this process."""
    names = [name for name, reason in backends.available().items() if reason is None]
    return [name for name in names if name != "triton" or backends.interpreting()]


@dataclass
class Problem:
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None and t.requires_grad]

    def gradients(self, out: LinearLogps, *, entropy: bool = True) -> tuple[Tensor, ...]:
        """Gradients of a scalar that sends a different number into every logps, lse and entropy."""
        g = torch.Generator().manual_seed(1)
        a, c, e = torch.randn(3, len(self.targets), generator=g, dtype=torch.float64)
        total = (out.logps.double() * a).sum() + 0.5 * (out.lse.double() * c).sum()
        if entropy and out.entropy is not None:
            total = total + 0.3 * (out.entropy.double() * e).sum()
        return torch.autograd.grad(total, self.leaves)

    def cast(self, dtype: torch.dtype) -> Problem:
        def leaf(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad)

        hidden, weight = leaf(self.hidden), leaf(self.weight)
        assert hidden is not None
        assert weight is not None
        return Problem(hidden, weight, leaf(self.bias), self.targets)


@pytest.fixture(params=usable_backends())
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make_problem() -> Callable[..., Problem]:
    """Random inputs; `peaked`: rows whose target has p up to 0.9999, and rows where it is all but impossible."""

    def make(
        n: int = 37, H: int = 19, V: int = 301, dtype: torch.dtype = torch.float32, *, bias: bool = True,
        peaked: bool = False, ignored: float = 0.3, needs: tuple[bool, bool, bool] = (True, True, True), seed: int = 0,
    ) -> Problem:  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        hidden, weight = torch.randn(n, H, generator=g), torch.randn(V, H, generator=g) * 0.3
        b = torch.randn(V, generator=g) if bias else None
        targets = torch.randint(0, V, (n,), generator=g)
        if peaked:
            hidden *= torch.linspace(0.5, 12, n)[:, None]
            best = (hidden @ weight.T + (0 if b is None else b)).argmax(1)
            targets[::2] = best[::2]
        targets[torch.rand(n, generator=g) < ignored] = -100
        problem = Problem(hidden, weight, b, targets).cast(dtype)
        for t, needed in zip((problem.hidden, problem.weight, problem.bias), needs, strict=True):
            if t is not None:
                t.requires_grad_(needed)
        return problem

    return make


@pytest.fixture
def within_rule() -> Callable[..., None]:
    """|ours − exact| ≤ 2·|naive − exact| + floor, in the largest element, relative to the exact result's scale."""

    def check(name: str, ours: Tensor, naive: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
        scale = max(1.0, exact.abs().max().item()) if exact.numel() else 1.0
        error = (ours.double() - exact).abs().max().item() if exact.numel() else 0.0
        allowed = 2 * (naive.double() - exact).abs().max().item() + FLOORS[dtype] * scale if exact.numel() else 0.0
        assert ours.isfinite().all(), f"{name} is not finite"
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"

    return check
