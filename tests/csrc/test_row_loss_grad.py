"""The CUDA kernel on a host: the same source, its threads emulated (emulated_device.h), against float64."""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fastalign.kernels
import pytest
import torch

import fastalign.ops
from fastalign.ops import rows as R
from fastalign.ops.known_grads import KnownGrads

HERE = Path(__file__).parent
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL = {"entropy": True, "top1": True, "sum_sq": True, "sum_z": True}


class Arguments(ctypes.Structure):
    _fields_ = [
        ("tile", ctypes.c_void_p), ("tile_stride", ctypes.c_int64), ("n", ctypes.c_int64), ("v", ctypes.c_int64),
        ("in_scale", ctypes.c_float), ("out_scale", ctypes.c_float), ("bias", ctypes.c_void_p),
        ("targets", ctypes.c_void_p), ("values", ctypes.c_void_p), ("argmax", ctypes.c_void_p),
        ("grad_logps", ctypes.c_void_p), ("grad_entropy", ctypes.c_void_p), ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
    ]  # fmt: skip


class Shape(ctypes.Structure):
    _fields_ = [("cluster", ctypes.c_int), ("slice", ctypes.c_int), ("shared_bytes", ctypes.c_int64)]


@pytest.fixture(scope="module")
def library(repository, tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("emulation") / "row_loss_grad.so"
    includes = [f"-I{folder}" for folder in (HERE, repository / "csrc/cuda", repository / "csrc/include")]
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    command = [compiler, *flags, "-Wno-unknown-pragmas", *includes, str(HERE / "row_loss_grad.cpp"), "-o", str(path)]
    build = subprocess.run(command, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    loaded = ctypes.CDLL(str(path))
    loaded.shape_of.restype, loaded.shape_of.argtypes = Shape, [ctypes.c_int64]
    loaded.max_columns.restype = ctypes.c_int64
    return loaded


@pytest.fixture
def run(library):
    """run(tile, bias, targets, a, e, spec, out) -> state; cluster None: the launch's own shape, threads and chunks."""

    def call(tile, bias, targets, a, e, spec, out, *, cluster=None, seed=0):
        n, v = tile.shape
        state = R.RowState(torch.full((6, n), 7.0), torch.full((n,), -1))
        pointers = [None if x is None else x.data_ptr() for x in (bias, targets, state.values, state.argmax, a, e)]
        arguments = Arguments(
            tile.data_ptr(), tile.stride(0), n, v, spec.in_scale, spec.out_scale, *pointers, out.data_ptr(),
            out.stride(0),
        )  # fmt: skip
        shape = library.shape_of(v)
        if cluster is not None:
            shape = Shape(cluster, (-(-v // cluster) + 7) // 8 * 8, 0)
        sums = spec.entropy or spec.top1 or spec.sum_sq or spec.sum_z
        aligned = all(
            x.data_ptr() % k == x.stride(0) * x.itemsize % k == 0 for x, k in ((tile, 16), (out, 4 * out.itemsize))
        )
        library.emulate(
            ctypes.byref(arguments), DTYPES.index(out.dtype), spec.softcap, sums, shape.cluster, shape.slice, aligned,
            cluster is not None, seed,
        )  # fmt: skip
        return state

    return call


def problem(n, v, *, pitch=None, scale=3.0, seed=0):
    """Rows whose target has p from 0.9 to 1 − 1e-7, then random ones. tile (n, v) with NaN between its rows."""
    g = torch.Generator().manual_seed(seed)
    u, bias, targets = torch.randn(n, v, generator=g) * scale, torch.randn(v, generator=g), torch.arange(n) * 37 % v
    for row in range(min(n, 4) if v > 1 else 0):
        others = (u[row] + bias).double()
        others[targets[row]] = -torch.inf
        odds = torch.tensor(1 - 10.0 ** (-1 - 2 * row), dtype=torch.float64).logit()
        u[row, targets[row]] = (others.logsumexp(0) + odds - bias[targets[row]]).float()
    tile = torch.full((n, v if pitch is None else pitch), torch.nan)[:, :v]
    tile.copy_(u)
    return tile, bias, targets, torch.linspace(-1, 0.7, n), torch.linspace(0.5, -0.2, n)


def plain(tile, bias, targets, a, e, spec, dtype):
    state = R.RowState.start(tile.shape[0], spec, tile.device, dtype)
    wide = None if bias is None else bias.to(dtype)
    R.row_stats(tile.to(dtype), wide, targets, 0, state, spec)
    stats = R.finish(state, spec)
    coef = R.coefficients(stats, a.to(dtype), None, None if e is None else e.to(dtype))
    grad = torch.empty(tile.shape, dtype=dtype)
    R.row_grad(tile.to(dtype), wide, targets, 0, stats, coef, spec, grad)
    return state, stats, grad


def within_rule(name, ours, naive, exact, floor=2e-6):
    error, naive_error = (ours.double() - exact).abs(), (naive.double() - exact).abs()
    allowed = 2 * (naive_error.amax(-1, keepdim=True) if exact.dim() == 2 else naive_error.max())
    excess = error - allowed - floor * exact.abs().clamp(min=1)
    assert ours.isfinite().all(), name
    assert excess.max() <= 0, f"{name}: off by {error.flatten()[excess.argmax()]}"


@pytest.mark.parametrize("cluster", [1, 2, 8])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("n", "v", "pitch"), [(1, 1, None), (6, 1300, 1300), (5, 1043, 1056), (3, 777, 777)])
def test_against_float64(n, v, pitch, softcap, entropy, cluster, run):
    """Blocks without a column; chunks that are whole, cut or missing; rows that start on 16 bytes or do not."""
    tile, bias, targets, a, e = problem(n, v, pitch=pitch)
    bias, e = (bias, e) if entropy else (None, None)
    spec = R.RowSpec.make(temperature=0.7, logit_scale=1.1, softcap=softcap, **(ALL if entropy else {}))
    exact_state, exact, exact_grad = plain(tile, bias, targets, a, e, spec, torch.float64)
    _, naive, naive_grad = plain(tile, bias, targets, a, e, spec, torch.float32)
    out = torch.full((n, v), torch.nan)
    state = run(tile, bias, targets, a, e, spec, out, cluster=cluster)
    ours = R.finish(state, spec)
    for name in ("max", "target", "logps", "lse", *(["entropy"] if entropy else [])):
        within_rule(name, *(getattr(stats, name) for stats in (ours, naive, exact)))
    within_rule("gradient", out, naive_grad, exact_grad)
    assert (ours.logps <= 0).all()
    assert (state.values[R.SUM] >= 1).all()
    if entropy:
        assert torch.equal(state.argmax, exact_state.argmax)
        for row in (R.SUM_SQ, R.SUM_Z):
            torch.testing.assert_close(state.values[row].double(), exact_state.values[row], rtol=1e-5, atol=2e-3)
    else:
        assert (state.values[R.ENT :] == 7).all(), "what was not asked for was written"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("v", "pitch"), [(1300, 1312), (1043, 1043)])
def test_over_the_tile_itself_in_any_order_of_threads(dtype, v, pitch, run):
    """In 16 bits over the first half of each row: what threads run first, and when copies arrive, changes nothing."""
    tile, bias, targets, a, e = problem(2, v, pitch=pitch)
    spec = R.RowSpec.make(temperature=1.0, logit_scale=1.0, softcap=None, entropy=True)
    apart = torch.empty(2, v)
    state = run(tile, bias, targets, a, e, spec, apart, cluster=4)
    for seed in range(1, 5):
        kept = torch.full((2, pitch), 3.0)
        own = kept[:, :v]
        own.copy_(tile)
        out = own if dtype == torch.float32 else kept.view(dtype)[:, :v]
        again = run(own, bias, targets, a, e, spec, out, cluster=4, seed=7 * seed)
        assert torch.equal(out, apart.to(dtype))
        assert torch.equal(again.values, state.values)
        expected = torch.full((2, pitch), 3.0)
        expected[:, :v] = tile
        written = 2 * v if dtype == torch.float32 else v  # in units of 16 bits
        assert torch.equal(kept.view(torch.int16)[:, written:], expected.view(torch.int16)[:, written:])


def test_ties_masked_columns_and_rows_without_gradient(run):
    tile, bias, targets, a, _ = problem(4, 1000)
    tile[0, [900, 17, 333]] = 50.0
    bias[:600] = -torch.inf
    bias[17] = bias[333] = bias[900] = 0.0
    targets[:] = 950
    a[2] = 0.0
    tile[3, 700] = torch.nan
    spec = R.RowSpec(top1=True, entropy=True)
    out = torch.full((4, 1000), torch.nan)
    state = run(tile, bias, targets, a, None, spec, out, cluster=4)
    assert state.argmax[0] == 17
    assert (out[0, :17] == 0).all()
    assert (out[2] == 0).all()
    assert out[:3].isfinite().all()
    assert R.finish(state, spec).logps.isnan().tolist() == [False, False, False, True]
    assert out[3].isnan().any()


def test_at_the_sizes_of_a_launch(run, library):
    """Two rows of a real vocabulary, one in another place and pitch: equal bits, within the rule."""
    v = 20011  # a little more than one block holds
    assert library.shape_of(v).cluster == 2
    tile, bias, targets, a, e = problem(1, v, pitch=20016)
    spec = R.RowSpec.make(temperature=0.9, logit_scale=1.0, softcap=None, **ALL)
    out, again = torch.empty(1, v), torch.empty(1, v)
    state = run(tile, bias, targets, a, e, spec, out)
    _, exact, exact_grad = plain(tile, bias, targets, a, e, spec, torch.float64)
    _, naive, naive_grad = plain(tile, bias, targets, a, e, spec, torch.float32)
    within_rule("gradient", out, naive_grad, exact_grad)
    within_rule("logps", R.finish(state, spec).logps, naive.logps, exact.logps)
    memory = torch.empty(v + 1)
    unaligned = memory[1:].view(1, v).copy_(tile)
    other = run(unaligned, bias, targets, a, e, spec, again, seed=3)
    assert torch.equal(other.values, state.values), "where a row starts in memory changed its sums"
    assert torch.equal(again, out)


def test_how_a_row_is_cut(library):
    """Every column has a block; three blocks fit a multiprocessor up to 152064 columns."""
    for v in (1, 7, 19040, 32000, 50257, 128256, 131072, 151936, 152064, 256000, library.max_columns()):
        shape = library.shape_of(v)
        assert shape.slice % 8 == 0
        assert shape.cluster * shape.slice >= v
        assert (shape.cluster - 1) * shape.slice < v or shape.cluster == 8
        assert shape.shared_bytes <= 227 * 1024
        if v <= 152064:
            assert 3 * (shape.shared_bytes + 1024) <= 228 * 1024
    assert library.shape_of(32000).cluster == 2
    assert library.shape_of(131072).cluster == 8
    assert library.max_columns() > 400000


@pytest.fixture
def cuda_backend(library, repository, monkeypatch):
    """backend='cuda', its extension played by the emulation, which gets what bindings_cuda.cpp says it takes."""
    pytest.importorskip("triton")
    source = (repository / "csrc/bindings_cuda.cpp").read_text()
    parameters = re.search(r'"row_loss_grad",\s*\[\]\((.*?)\)', source, re.DOTALL)[1]
    order = [parameter.split()[-1] for parameter in parameters.split(",")]

    def launch(*values):
        given = SimpleNamespace(**dict(zip(order, values, strict=True)))
        arguments = Arguments(**{name: getattr(given, name) for name, _ in Arguments._fields_})
        shape = library.shape_of(given.v)
        library.emulate(
            ctypes.byref(arguments), given.element, given.softcap, given.sums, shape.cluster, shape.slice, True, True, 1
        )  # fmt: skip
        assert given.stream == 99

    elements = SimpleNamespace(float32=0, bfloat16=1, float16=2)
    fake = SimpleNamespace(MAX_COLUMNS=library.max_columns(), Element=elements, row_loss_grad=launch)
    modules = {fastalign.kernels: "cuda_rows", fastalign.ops: "cuda_backend"}  # made anew with it, and forgotten again
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "fastalign.kernels._cuda", fake)
        patch.setattr(fastalign.kernels, "_cuda", fake, raising=False)
        patch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=99))
        for package, name in modules.items():
            patch.delitem(sys.modules, f"{package.__name__}.{name}", raising=False)
            patch.delattr(package, name, raising=False)
        yield importlib.import_module("fastalign.ops.cuda_backend").BACKEND
        for package, name in modules.items():
            del sys.modules[f"{package.__name__}.{name}"]
            delattr(package, name)


def test_the_launcher_hands_over_what_the_binding_takes(run, cuda_backend):
    for softcap, dtype in ((None, torch.bfloat16), (5.0, torch.float32)):
        tile, bias, targets, a, e = problem(3, 640)
        spec = R.RowSpec.make(temperature=0.7, logit_scale=1.1, softcap=softcap, **ALL)
        expected = torch.empty(3, 640, dtype=dtype)
        wanted = run(tile, bias, targets, a, e, spec, expected, cluster=1)
        state, memory = R.RowState.start(3, spec, tile.device), tile.clone()
        out, known = memory.view(dtype)[:, :640], KnownGrads(a, e)
        cuda_backend.row_loss_grad(memory, bias, targets, state, known, spec, out)
        assert torch.equal(out, expected)
        assert torch.equal(state.values, wanted.values)
        assert torch.equal(state.argmax, wanted.argmax)


def test_the_launcher_refuses_what_would_corrupt_memory(cuda_backend):
    tile, bias, targets, a, e = problem(3, 640)
    state = R.RowState.start(3, R.RowSpec(), tile.device)
    halves = tile.view(torch.bfloat16)
    refused = {
        "overlaps tile": (R.RowSpec(), KnownGrads(a), halves[:, 640:]),
        "column strides must be 1": (R.RowSpec(), KnownGrads(a), torch.empty(640, 3).t()),
        "without sums=True": (R.RowSpec(), KnownGrads(a, e), tile),
    }
    for message, (spec, known, out) in refused.items():
        with pytest.raises(ValueError, match=message):
            cuda_backend.row_loss_grad(tile, bias, targets, state, known, spec, out)
    wide = torch.zeros(1, 500_000)
    with pytest.raises(ValueError, match="take backend='triton'"):
        cuda_backend.row_loss_grad(wide, None, targets[:1], state, KnownGrads(a[:1]), R.RowSpec(), wide)
