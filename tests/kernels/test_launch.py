"""Launches without a GPU: Triton's own path from a launcher's arguments to machine code, stopping before the device.

The interpreter drops options it does not know and takes numbers as they come; this does not.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from fastalign.kernels import fused_forward, row_kernels, row_loss_grad
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled"
)

TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
KERNELS = (row_kernels, row_loss_grad, fused_forward)
NO_DEVICE = -1  # its own entry in every kernel's cache of compiled code


@pytest.fixture(params=TARGETS)
def launches(request, monkeypatch):
    """What is launched while a device of some architecture seems to be there: name, grid, and the compiled kernel."""
    recorded = []
    fake = SimpleNamespace(
        get_current_device=lambda: NO_DEVICE,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: TARGETS[request.param],
    )

    def compile_only(kernel, grid):
        def launch(*args, **kwargs):
            compiled = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            name, names = kernel.fn.__name__, kernel.arg_names
            recorded.append(SimpleNamespace(name=name, names=names, grid=grid, compiled=compiled))

        return launch

    monkeypatch.setattr(driver, "_active", fake)
    monkeypatch.setattr(JITFunction, "__getitem__", compile_only)
    yield SimpleNamespace(arch=request.param, recorded=recorded)
    for value in (value for module in KERNELS for value in vars(module).values()):
        if isinstance(value, JITFunction):
            value.device_caches.pop(NO_DEVICE, None)


def vectors(n, count):
    return torch.zeros(count, n).unbind()


def scalars(launch, *names):
    """Types of the scalar arguments, as the launch was specialised."""
    signature = launch.compiled.src.signature
    return {name: signature[name] for name in names or ("in_scale", "out_scale")}


def test_row_stats(launches):
    tile, targets = torch.zeros(5, 8192)[:, :5000], torch.zeros(5, dtype=torch.int64)
    argmax = torch.zeros(5, dtype=torch.int64)
    flags = {"entropy": True, "top1": True, "sum_sq": True, "sum_z": True, "softcap": True}
    row_kernels.row_stats_fwd(tile, torch.zeros(5000), targets, 64, torch.zeros(6, 5), argmax, in_scale=1, **flags)
    (launch,) = launches.recorded
    assert launch.grid == (5,)
    assert scalars(launch) == {"in_scale": "fp32", "out_scale": "fp32"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy", [False, True])
def test_row_grad_over_its_tile(entropy, dtype, launches):
    tile, targets = torch.zeros(3, 4096), torch.zeros(3, dtype=torch.int64)
    row_max, log_sum, base, target, coef = vectors(3, 5)
    out = tile.view(dtype)[:, :4096]
    coef = coef if entropy else None
    row_kernels.row_grad_bwd(tile, None, targets, 0, row_max, log_sum, base, target, coef, out)
    (launch,) = launches.recorded
    assert scalars(launch) == {"in_scale": "fp32", "out_scale": "fp32"}
    code = launch.compiled.asm["ptx" if launches.arch == "sm_90" else "amdgcn"]
    source = launch.compiled.src
    assert source.constants[(source.fn.arg_names.index("NARROW_ALIAS"),)] == (dtype != torch.float32)
    assert "v4.b32" in code or "dwordx4" in code, "16-byte accesses"


@pytest.mark.parametrize(("n", "v"), [(1, 1), (3, 100), (2, 50257)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_one_pass(dtype, n, v, launches):
    """A single row or column is a compile-time 1; an odd width has 16-byte accesses where its pitch allows them."""
    tile = torch.zeros(n, -(-v // 16) * 16)[:, :v]
    out, targets = tile.view(dtype)[:, :v], torch.zeros(n, dtype=torch.int64)
    flags = {"entropy": True, "top1": True, "in_scale": 0.5}
    a, e = torch.ones(2, n).unbind()
    row_loss_grad.row_loss_grad(tile, None, targets, torch.zeros(6, n), torch.zeros_like(targets), a, e, out, **flags)
    row_kernels.row_stats_fwd(tile, None, targets, 0, torch.zeros(6, n), targets)
    both, stats = launches.recorded
    assert both.grid == stats.grid == (n,)
    for launch in launches.recorded:
        code = launch.compiled.asm["ptx" if launches.arch == "sm_90" else "amdgcn"]
        assert v < 1000 or "v4.b32" in code or "dwordx4" in code


def test_exponentials(launches):
    tile, targets = torch.zeros(3, 100), torch.zeros(3, dtype=torch.int64)
    row_max, log_sum, base, target = vectors(3, 4)
    exponentials = torch.empty(3, 100, dtype=torch.float16)
    row_kernels.row_exp_fwd(tile, torch.zeros(100, dtype=torch.float16), row_max, exponentials)
    row_kernels.row_grad_bwd(
        exponentials, None, targets, 0, row_max, log_sum, base, target, None, exponentials, exp_tile=True
    )
    assert [launch.name for launch in launches.recorded] == ["_row_exp_kernel", "_row_grad_kernel"]


@pytest.mark.parametrize(("dtype", "hidden_size"), [(torch.bfloat16, 128), (torch.float16, 99), (torch.float32, 128)])
def test_fused_forward(dtype, hidden_size, launches):
    hidden, weight = torch.zeros(300, hidden_size, dtype=dtype), torch.zeros(5000, hidden_size, dtype=dtype)
    targets, rows = torch.zeros(200, dtype=torch.int64), torch.arange(200)
    fused_forward.fused_logps_fwd(
        hidden, weight, weight[:, 0], targets, rows, 0.5, 1.0, False, True, True, arch=launches.arch, programs=7
    )
    main, merge = launches.recorded
    persistent = launches.arch == "sm_90" and dtype == torch.bfloat16
    assert main.name == ("_fused_persistent_kernel" if persistent else "_fused_forward_kernel")
    assert merge.name == "_merge_splits_kernel"
    tiles = fused_forward.fused_tiles(launches.arch, dtype, aligned=hidden_size == 128)
    work = -(-200 // tiles.block_n) * -(-5000 // tiles.split_v)
    assert main.grid == (min(work, 7) if persistent else work,)
    assert merge.grid == (7,)
    assert scalars(main, "in_scale", "unit") == {"in_scale": "fp32", "unit": "fp32"}
    assembly = main.compiled.asm.get("ptx") or main.compiled.asm["amdgcn"]
    if dtype != torch.float32:
        assert "wgmma.mma_async" in assembly or "v_mfma" in assembly
    if persistent:
        assert "cp.async.bulk.tensor" in assembly, "tiles come by bulk copies"


def test_rows_that_are_aligned_for_copies_but_not_for_descriptors(launches):
    """On sm_90 pointer loads of aligned rows are never launched; what they need is checked where they are."""
    hidden, weight = torch.zeros(300, 136, dtype=torch.bfloat16), torch.zeros(5000, 136, dtype=torch.bfloat16)
    fused_forward.fused_logps_fwd(hidden, weight, None, torch.zeros(300, dtype=torch.int64), None, arch=launches.arch)
    main = launches.recorded[0]
    assert main.name == ("_fused_persistent_kernel" if launches.arch == "sm_90" else "_fused_forward_kernel")
    if launches.arch != "sm_90":
        assert main.compiled.src.constants[(main.names.index("BLOCK_H"),)] == 16, "tiles for unaligned rows"
