"""The one error rule, and problems to apply it to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fastalign.ops import backends, devices
from fastalign.ops import rows as R
from fastalign.ops.whole_tiles import REACH
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


# ---- an accelerator's path on CPU tensors


def _fused_forward(hidden, weight, bias, targets, rows, spec):
    return _fused_exponentials(hidden, weight, bias, targets, rows, spec, None)[0]


def _fused_exponentials(hidden, weight, bias, targets, rows, spec, out):
    """What a GPU's kernels may do: a reference that is not the maximum, but not so far below that exp overflows."""
    h, y = (hidden, targets) if rows is None else (hidden[rows], targets[rows])
    u = h.float() @ weight.float().T
    state = R.RowState.start(len(y), spec, u.device)
    b = None if bias is None else bias.float()
    R.row_stats(u, b, y, 0, state, spec)
    z = R.tile_logits(u, b, spec)
    maximum = state.values[R.MAX]
    reference = torch.where(maximum - z[:, 0] > REACH, maximum, z[:, 0])
    if out is not None:
        out.copy_((z - reference[:, None]).exp())
    return state, reference


@pytest.fixture
def gpu_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """CPU tensors take the way of an accelerator: token-major tiles, 16-bit operands, the GPU planner. Called with
    fused=True, the torch backend has the fused kernels as well."""
    monkeypatch.setattr(devices, "gemm_style", lambda device: "cuda")
    monkeypatch.setattr(R, "live_rows", lambda coef: None)
    library = torch.library.Library("aten", "IMPL")

    def mm(a, b, out_dtype, *, out):
        return torch.mm(a.to(out_dtype), b.to(out_dtype), out=out)

    def addmm(self, a, b, out_dtype, *, beta=1, alpha=1, out):
        return torch.addmm(self, a.to(out_dtype), b.to(out_dtype), beta=beta, alpha=alpha, out=out)

    library.impl("mm.dtype_out", mm, "CPU")
    library.impl("addmm.dtype_out", addmm, "CPU")

    def use(*, fused: bool) -> None:
        plain = backends._load("torch")
        kernels = {"fused_forward": _fused_forward, "fused_exponentials": _fused_exponentials} if fused else {}
        monkeypatch.setattr(backends, "_load", lambda name: replace(plain, **kernels))

    yield use
    library._destroy()
