"""The planner: its choices, and that calls allocate what it predicts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fastalign.ops import linear_logps, linear_logps_reference, plan
from fastalign.ops.schedule import DEFAULT_WORKSPACE_MB, SCHEDULES

MIB = 2**20


@pytest.mark.parametrize(
    ("arguments", "schedule", "gemms"),
    [
        ({"needs": (False, False, False)}, "forward", 1),
        ({"needs": (True, True, False), "schedule": "deferred"}, "deferred", 4),
        ({"needs": (False, True, False), "schedule": "deferred"}, "deferred", 3),
        ({"needs": (True, False, False)}, "frozen", 2),
        ({"needs": (True, True, False), "group_rows": 64}, "streamed", 3),
        ({"needs": (True, False, False), "group_rows": 64}, "streamed", 2),
        ({"needs": (True, True, False), "workspace_bytes": 2**34}, "cached", 3),
        ({"needs": (True, False, True)}, "cached", 3 - 208 / 1024),
    ],
)
def test_choice(arguments, schedule, gemms):
    chosen = plan(1024, 64, 50257, **arguments)
    assert (chosen.schedule, chosen.gemms) == (schedule, gemms)
    assert schedule in str(chosen)
    assert chosen.reason


def test_the_gradients_memory_is_preferred_to_the_workspace():
    chosen = plan(1024, 512, 50257)
    assert (chosen.schedule, chosen.gemms, chosen.overlaid_rows) == ("overlaid", 3.5, 512)
    assert chosen.predicted_bytes == plan(1024, 512, 50257, schedule="deferred").predicted_bytes
    assert plan(1024, 1024, 151936).gemms == 3
    assert plan(1024, 512, 50257, workspace_bytes=2**34).gemms == 3
    assert plan(4096, 4096, 128256, dtype=torch.bfloat16, device_type="cuda", schedule="overlaid").gemms == 3.5


def test_what_is_kept_saves_that_share_of_a_gemm():
    chosen = plan(1024, 64, 50257, workspace_bytes=80 * MIB)
    assert chosen.schedule == "cached"
    assert 0 < chosen.kept_rows < 1024
    assert chosen.gemms == 4 - chosen.kept_rows / 1024


@given(
    n=st.integers(0, 20_000), H=st.integers(1, 8192), V=st.integers(1, 300_000), budget=st.integers(2**20, 2**34),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), device_type=st.sampled_from(["cpu", "cuda"]),
    schedule=st.sampled_from(["auto", "deferred", "streamed", "frozen"]), autocast=st.booleans(),
)  # fmt: skip
@example(  # a minimal tile, and not a whole slab of widened weight beside it
    n=0, H=1, V=16255, budget=2**20, dtype=torch.bfloat16, device_type="cpu", schedule="streamed", autocast=False,
)  # fmt: skip
@example(  # rows so short that the smallest slab of many is larger than they
    n=3105, H=10, V=64, budget=2**20, dtype=torch.bfloat16, device_type="cpu", schedule="auto", autocast=False,
)  # fmt: skip
def test_the_budget_is_kept_once_it_holds_a_minimal_tile(n, H, V, budget, dtype, device_type, schedule, autocast):
    needs = (True, schedule != "frozen", False)
    chosen = plan(
        n, H, V, dtype=dtype, device_type=device_type, needs=needs, workspace_bytes=budget, schedule=schedule,
        group_rows=64 if schedule == "streamed" else None, weight_dtype=torch.float32 if autocast else None,
    )  # fmt: skip
    assert chosen.schedule in SCHEDULES
    assert chosen.rows >= 1
    assert 1 <= chosen.slab <= V
    assert 0 <= chosen.kept_rows <= n
    narrow = 64 if device_type == "cpu" else 256
    smallest = 16 * (12 * H + 4 * V + 32) + narrow * 6 * H + narrow * (6 * H + 4 * chosen.rows)
    kept = chosen.saved_bytes if chosen.schedule == "cached" else 0
    assert chosen.workspace_bytes + kept <= max(budget, smallest)


def test_unknown_device_and_bad_budget_are_refused():
    with pytest.raises(ValueError, match="device_type must be one of"):
        plan(8, 8, 8, device_type="abacus")
    with pytest.raises(ValueError, match="the workspace must be positive"):
        plan(8, 8, 8, workspace_bytes=0)


def test_the_default_budget_is_a_constant_per_device():
    assert set(DEFAULT_WORKSPACE_MB) == {"cpu", "cuda"}
    assert plan(4096, 512, 50257) == plan(4096, 512, 50257, workspace_bytes=DEFAULT_WORKSPACE_MB["cpu"] * MIB)


@pytest.mark.parametrize("workspace_mb", [16, 48])
@pytest.mark.parametrize("ignored", [False, True], ids=["all rows", "half ignored"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("schedule", ["deferred", "overlaid", "cached", "streamed", "frozen"])
def test_peak_memory_stays_within_the_prediction(check_peak, schedule, dtype, ignored, workspace_mb):
    """High-water mark of a fresh process, above what stood before the call; naive logits here take 201 MiB and more."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads the high-water mark from /proc")
    case = {
        "n": 1500, "H": 256, "V": 35149, "dtype": dtype, "schedule": schedule, "weight": schedule != "frozen",
        "workspace_mb": workspace_mb, "ignored": ignored,
    }  # fmt: skip
    check_peak(case)


@pytest.mark.parametrize("schedule", ["deferred", "overlaid", "cached", "streamed"])
def test_leaving_rows_out_takes_no_memory(check_peak, schedule):
    if not sys.platform.startswith("linux"):
        pytest.skip("reads the high-water mark from /proc")
    case = {
        "n": 1500, "H": 256, "V": 35149, "dtype": "float32", "schedule": schedule, "weight": True, "workspace_mb": 16,
        "live": 0.5,
    }  # fmt: skip
    check_peak(case)


@pytest.fixture
def check_peak(launch, tmp_path):
    def check_peak(case):
        found = tmp_path / "found.json"
        launch(Path(__file__).with_name("peak_worker.py"), json.dumps(case), found, processes=1)
        check_found(json.loads(found.read_text()))

    return check_peak


def check_found(result):
    slack = 3 * MIB  # pages of the allocator, threads' stacks and per-row vectors
    assert result["used"] <= 1.1 * result["predicted"] + slack, result
    assert result["used"] >= 0.5 * result["predicted"] - slack, result


def test_kept_rows_in_several_blocks_round_the_weights_gradient_once():
    """16-bit rows pass through a smaller tile in the forward; their backward must not add in 16 bits."""
    g = torch.Generator().manual_seed(0)
    n, H, V = 600, 32, 3000
    hidden, weight = torch.randn(n, H, generator=g).bfloat16(), (torch.randn(V, H, generator=g) * 0.3).bfloat16()
    targets = torch.randint(0, V, (n,), generator=g)
    found = plan(n, H, V, dtype=torch.bfloat16, workspace_bytes=20 * MIB, schedule="cached")
    assert found.kept_rows == n
    assert found.transit_rows < n
    assert found.accumulator_bytes == 0

    def gradient(weight, hidden, logps):
        leaf = weight.detach().requires_grad_()
        return torch.autograd.grad(logps(hidden, leaf, targets).logps.sum(), leaf)[0].double()

    exact = gradient(weight.double(), hidden.double(), linear_logps_reference)
    mine = gradient(weight, hidden, lambda *a: linear_logps(*a, schedule="cached", workspace_mb=20))
    assert (mine - exact).norm() <= 0.002 * exact.norm()  # of one rounding 0.0017, of three 0.0025
