"""What the kernel tests share: a device, logits that are hard to get right, and the error rule."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastalign.ops import rows as R


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the CPU under Triton's interpreter, else a CUDA (or ROCm) device."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        torch.set_num_threads(1)
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.skip("Triton kernels need a CUDA device, or TRITON_INTERPRET=1 in the environment")


@pytest.fixture(scope="session")
def arch(device: torch.device) -> str:
    """The architecture's name as `fused_tiles` takes it."""
    if device.type == "cpu":
        return "sm_90"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@pytest.fixture(scope="session")
def make_tile(device: torch.device) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """make_tile(n, v, scale=1.0, seed=0) -> head outputs u (n, v), bias (v,), targets (n,).

    The first rows are peaked: their targets have p of about 0.9, 0.99, 0.999, 0.9999, 1 and exp(-40).
    """

    def make(n: int, v: int, scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        u, bias = torch.randn(n, v, generator=g) * scale, torch.randn(v, generator=g)
        targets = torch.randint(0, v, (n,), generator=g)
        for row, p in enumerate((0.9, 0.99, 0.999, 0.9999, 1 - 1e-12, 4e-18)[:n]):
            others = (u[row] + bias).double()
            others[targets[row]] = -torch.inf
            logit = (
                others.logsumexp(0) + torch.tensor(p, dtype=torch.float64).logit() if v > 1 else others.new_zeros(())
            )
            u[row, targets[row]] = (logit - bias[targets[row]]).float()
        return u.to(device), bias.to(device), targets.to(device)

    return make


@pytest.fixture(scope="session")
def assert_within_rule() -> Callable[..., None]:
    """|ours − exact| ≤ 2·(largest |naive − exact| of the row) + floor·max(1, |exact|), in every element."""

    def check(name: str, ours: Tensor, naive: Tensor, exact: Tensor, floor: float = 2e-6) -> None:
        assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
        if not exact.numel():
            return
        error = (ours.double() - exact).abs()
        naive_error = (naive.double() - exact).abs()
        if exact.dim() == 2:
            naive_error = naive_error.amax(1, keepdim=True)
        excess = error - (2 * naive_error + floor * exact.abs().clamp(min=1))
        worst = excess.flatten().argmax()
        assert ours.isfinite().all(), f"{name} is not finite"
        assert excess.max() <= 0, f"{name}: {ours.flatten()[worst]} for {exact.flatten()[worst]} at flat index {worst}"

    return check


@pytest.fixture(scope="session")
def rounded(device: torch.device) -> Callable[[Tensor, torch.dtype], Tensor]:
    """float32 in a narrower dtype, as a kernel stores it: rounded; Triton's interpreter truncates to bfloat16."""

    def convert(x: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype == torch.bfloat16 and device.type == "cpu":
            return (x.contiguous().view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
        return x.to(dtype)

    return convert


FLAGS = ("entropy", "top1", "sum_sq", "sum_z")


def spec_of(softcap=None, **flags):
    return R.RowSpec.make(temperature=0.7, logit_scale=1.1, softcap=softcap, **flags)


def row_stats(tile, bias, targets, v0, state, spec):
    from fastalign.kernels import row_kernels

    flags = {name: getattr(spec, name) for name in FLAGS}
    row_kernels.row_stats_fwd(
        tile, bias, targets, v0, state.values, state.argmax,
        in_scale=spec.in_scale, out_scale=spec.out_scale, softcap=spec.softcap, **flags,
    )  # fmt: skip


def row_grad(tile, bias, targets, v0, stats, coef, spec, out):
    from fastalign.kernels import row_kernels

    row_kernels.row_grad_bwd(
        tile, bias, targets, v0, stats.max, stats.log_sum, coef.base, coef.target, coef.entropy, out,
        in_scale=spec.in_scale, out_scale=spec.out_scale, softcap=spec.softcap, exp_tile=spec.exp_tile,
    )  # fmt: skip


def fold(function, u, bias, targets, spec, cuts, dtype=torch.float32):
    """The state after folding the slabs between `cuts`."""
    state = R.RowState.start(u.shape[0], spec, u.device, dtype)
    for first, last in itertools.pairwise(cuts):
        part = None if bias is None else bias[first:last].to(dtype)
        function(u[:, first:last].to(dtype), part, targets, first, state, spec)
    return state


def exact_stats(u, bias, targets, spec):
    return R.finish(fold(R.row_stats, u, bias, targets, spec, [0, u.shape[1]], torch.float64), spec)


def gradient_problem(u, bias, targets, spec, *, entropy=True, seed=0):
    """Float64 stats and coefficients, and what a float32 caller passes."""
    stats = exact_stats(u, bias, targets, dataclasses.replace(spec, entropy=True))
    g = torch.Generator().manual_seed(seed)
    a, c, e = (torch.randn(u.shape[0], generator=g, dtype=torch.float64).to(u.device) for _ in range(3))
    coef = R.coefficients(stats, a, c, e if entropy else None)
    return stats, coef, as_float32(stats), as_float32(coef)


def as_float32(vectors):
    return type(vectors)(*(None if x is None else x.float() for x in vectors))


def exact_gradient(u, bias, targets, stats, coef, spec):
    out = torch.empty_like(u, dtype=torch.float64)
    R.row_grad(u.double(), None if bias is None else bias.double(), targets, 0, stats, coef, spec, out)
    return out


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """The functions above, for test modules."""
    functions = (spec_of, row_stats, row_grad, fold, exact_stats, gradient_problem, as_float32, exact_gradient)
    return SimpleNamespace(**{function.__name__: function for function in functions})
