"""What a call asks of an accelerator, seen on tensors without memory: its GEMMs, its bytes, and nothing of the host.

Meta tensors stand for the device. They have no values: whoever asks for one, or for a shape that depends on one, fails.
Copies from the host are counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastalign.linear import linear_dpo_loss, linear_ppo_loss
from fastalign.ops import backends, linear_logps, linear_loss, logps_op, plan, uploads
from fastalign.ops import rows as R
from fastalign.ops.schedule import Kernels
from fastalign.planning import recorder
from fastalign.planning.recorder import Recorder

MIB = 2**20
META = torch.device("meta")
ATEN = torch.ops.aten
PRODUCTS = {ATEN.mm, ATEN.addmm}
ALL = Kernels(forward=True, exponentials=True)


class Watch(TorchDispatchMode):
    """Counts copies from the host, and matrix products in units of one over (n, H, V)."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []
        self.products: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in PRODUCTS:
            a, b = args[-2:] if func._overloadpacket is ATEN.mm and len(args) == 2 else _factors(func, args)
            self.products.append((a.shape[0], a.shape[1], b.shape[1]))
        if isinstance(out, torch.Tensor) and out.device == META:
            sources = [t for t in args if isinstance(t, torch.Tensor) and t.device.type == "cpu"]
            if any(t.dim() for t in sources):  # 0-dim numbers travel as arguments
                self.copies.append(str(func))
        return out

    def gemms(self, n: int, H: int, V: int) -> float:
        return sum(a * b * c for a, b, c in self.products) / (n * H * V)


def _factors(func, args):
    first = 1 if func._overloadpacket is ATEN.addmm else 0
    return args[first], args[first + 1]


def _nothing(*args) -> None:
    return None


def _state(hidden, targets, rows, spec):
    return R.RowState.start(len(targets if rows is None else rows), spec, hidden.device)


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A backend whose row functions allocate nothing, and whose fused kernels do no library GEMM."""
    torch_backend = backends._load("torch")
    monkeypatch.setattr(recorder, "_FLOPS", {})  # of products with another output's dtype it has none
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)  # it does not know meta

    def fused_forward(hidden, weight, bias, targets, rows, spec):
        return _state(hidden, targets, rows, spec)

    def fused_exponentials(hidden, weight, bias, targets, rows, spec, out):
        state = _state(hidden, targets, rows, spec)
        return state, state.values[0].clone()

    monkeypatch.setattr(
        backends, "_load",
        lambda name: replace(
            torch_backend, row_stats=_nothing, row_grad=_nothing, row_exp=_nothing, row_loss_grad=_nothing,
            fused_forward=fused_forward, fused_exponentials=fused_exponentials,
        ),
    )  # fmt: skip


class Direct(torch.autograd.Function):
    """The custom op's own code, which meta tensors would not reach."""

    @staticmethod
    def forward(ctx, *inputs):
        output = logps_op._linear_logps._init_fn(*inputs)
        logps_op._setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, *grads):
        return logps_op._backward(ctx, *grads)


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = torch.ops.fastalign

    class Ops:
        linear_logps = staticmethod(Direct.apply)
        linear_logps_backward = staticmethod(logps_op._linear_logps_backward._init_fn)

        def __getattr__(self, name):
            return getattr(registered, name)

    monkeypatch.setattr(torch.ops, "fastalign", Ops())


def inputs(n, H, V, dtype=torch.bfloat16, weight_grad=True):
    hidden = torch.empty(n, H, dtype=dtype, device=META, requires_grad=True)
    weight = torch.empty(V, H, dtype=dtype, device=META, requires_grad=weight_grad)
    return hidden, weight, torch.empty(n, dtype=torch.int64, device=META)


CALLS = {  # schedule, budget in MB, expected library GEMMs: the fused kernels' are not counted
    "deferred, 0.3 GB": ("deferred", 300, 3),
    "deferred, 1 GB": ("deferred", 1000, 3),
    "cached": ("cached", 4400, 2),
    "overlaid": ("overlaid", 1000, 4 - 2048 / 8192),
    "frozen": ("frozen", 1000, 1),
    "streamed, one chunk": ("streamed", 4400, 2),
    "streamed": ("streamed", 1000, 2),
    "automatic": ("auto", 1000, 2),
}


@pytest.mark.parametrize("every", [True, False], ids=["all rows", "half the rows"])
@pytest.mark.parametrize("case", CALLS)
def test_products_bytes_and_copies(silent, direct, case, every):
    """8192 × 4096 × 131072, bfloat16; of half the rows, half the products."""
    schedule, megabytes, gemms = CALLS[case]
    N, H, V = 8192, 4096, 131072
    n = N if every else N // 2
    rows = torch.arange(N) if every else torch.arange(0, N, 2)
    group = case.startswith(("streamed", "automatic"))
    budget = int(megabytes * 1e6)
    how = {"schedule": schedule, "workspace_mb": budget / MIB, "backend": "torch"}
    with Recorder() as memory, Watch() as watch:
        hidden, weight, targets = inputs(N, H, V, weight_grad=schedule != "frozen")
        before = memory.now
        if group:
            loss = linear_loss(lambda s, cu: -s.logps, hidden, weight, targets, groups="tokens", rows=rows, **how).loss
        else:
            loss = linear_logps(hidden, weight, targets, rows=rows, **how).logps.sum()
        loss.backward()
    found = plan(
        n, H, V, dtype=torch.bfloat16, device_type="cuda", needs=(True, schedule != "frozen", False),
        workspace_bytes=budget, schedule=schedule, group_rows=1 if group else None, num_tokens=N, kernels=ALL,
        gathered=not every,
    )  # fmt: skip
    if case == "overlaid":
        gemms = 4 - found.overlaid_rows / n
    assert watch.gemms(n, H, V) == pytest.approx(gemms, rel=1e-3)
    assert len(watch.copies) <= (0 if every else 1), watch.copies
    vectors = 400 * N + MIB
    used = memory.peak - before
    assert used <= found.predicted_bytes + vectors, (used / 1e6, str(found))
    assert used >= 0.8 * found.predicted_bytes, (used / 1e6, str(found))


def test_each_gradient_of_one_tile_is_one_product(silent, direct):
    """Not one per slab: the weight's over all rows, hidden's in pieces that fill the processors."""
    hidden, weight, targets = inputs(8192, 4096, 131072)
    with Watch() as watch:
        loss = linear_loss(
            lambda s, cu: -s.logps, hidden, weight, targets, groups="tokens", rows=torch.arange(8192),
            workspace_mb=4400e6 / MIB, backend="torch", schedule="streamed",
        ).loss  # fmt: skip
        loss.backward()
    assert watch.products.count((131072, 8192, 4096)) == 1
    assert {p[1:] for p in watch.products if p[0] != 131072} == {(131072, 4096)}
    assert watch.gemms(8192, 4096, 131072) == 2


@pytest.mark.parametrize(
    "rows", [torch.arange(512), torch.arange(512).view(8, 64)[:, 5:50].flatten()], ids=["all", "some"]
)
@pytest.mark.parametrize("workspace_mb", [1, 100], ids=["several chunks", "one chunk"])
@pytest.mark.parametrize("loss", ["dpo", "ppo", "logps"])
def test_nothing_comes_from_the_host(silent, direct, monkeypatch, loss, workspace_mb, rows):
    """While a graph is captured: forward and backward of padded pairs and rollouts whose rows are known."""
    monkeypatch.setattr(uploads, "_capturing", lambda device: True)
    hidden, weight, targets = inputs(8 * 64, 256, 4000)
    hidden, targets = hidden.detach().view(8, 64, 256).requires_grad_(), targets.view(8, 64)
    how = {"rows": rows, "backend": "torch", "workspace_mb": workspace_mb}
    per_token = {name: torch.empty(8, 64, device=META) for name in ("old_logps", "advantages", "ref_logps")}
    with Watch() as watch:
        if loss == "dpo":
            value = linear_dpo_loss(hidden, weight, targets, ref_logps=torch.empty(8, device=META), **how).loss
        elif loss == "ppo":
            value = linear_ppo_loss(hidden, weight, targets, **per_token, kl_coef=0.1, **how).loss
        else:
            value = linear_logps(hidden, weight, targets, **how).logps.sum()
        value.backward()
    assert not watch.copies
    assert hidden.grad is not None
    assert weight.grad is not None


@pytest.mark.parametrize(
    "values", [[], [5], [3, 4, 5, 6], [0, 2, 4, 9, 10, 11, 11, 11, 2, 1, 0], [7, 7], [0, 45, 90, 91]], ids=str
)
def test_integers_written_run_by_run(values):
    host = torch.tensor(values, dtype=torch.int64)
    for dtype in (torch.int64, torch.int32):
        assert torch.equal(uploads._from_runs(host.to(dtype), torch.device("cpu")), host.to(dtype))
