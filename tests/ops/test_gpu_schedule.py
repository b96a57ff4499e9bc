"""The planner for accelerators: every schedule's GEMMs, bytes and predicted time on one H200, and how slabs are chosen.

Times are the model's: whole waves of GEMM tiles, row kernels at memory speed, nothing overlapping. They show that a
schedule can reach its ratio, not that it does.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fastalign.kernels.fused_forward import GATHER_BYTES

from fastalign.ops import gpu_call
from fastalign.ops.devices import DEVICES, device_of
from fastalign.ops.gpu_schedule import _best_slab
from fastalign.ops.schedule import Kernels, plan

V = 131072
FUSED = Kernels(forward=True, exponentials=True)
BOTH, FROZEN, NONE = (True, True, False), (True, False, False), (False, False, False)


def on_h200(n, H, *, needs=BOTH, gigabytes=None, kernels=FUSED, **more):
    return plan(
        n, H, V, dtype=torch.bfloat16, device_type="cuda", needs=needs, kernels=kernels, gathered=False,
        workspace_bytes=None if gigabytes is None else int(gigabytes * 1e9), **more,
    )  # fmt: skip


def beside_gradients(found):
    return found.predicted_bytes - found.gradient_bytes


TARGETS = {  # schedule: GEMMs, time over the GEMMs', arguments at N = 8192, at N = 32768
    "forward": (1, 1.18, {"needs": NONE}, {"needs": NONE}),
    "cached": (3, 1.08, {"gigabytes": 2.3}, {"gigabytes": 9}),
    "streamed": (3, 1.08, {"gigabytes": 2.3, "group_rows": 1}, {"gigabytes": 4.4, "group_rows": 1}),
    "frozen": (2, 1.08, {"gigabytes": 2.3, "needs": FROZEN}, {"gigabytes": 4.4, "needs": FROZEN}),
    "deferred": (4, 1.12, {"gigabytes": 1, "schedule": "deferred"}, {"gigabytes": 4.4, "schedule": "deferred"}),
}


@pytest.mark.parametrize("H", [2048, 4096])
@pytest.mark.parametrize("n", [8192, 32768])
@pytest.mark.parametrize("schedule", TARGETS)
def test_gemms_and_predicted_time(schedule, n, H):
    gemms, ratio, small, large = TARGETS[schedule]
    found = on_h200(n, H, **(small if n == 8192 else large))
    assert found.schedule == ("cached" if schedule == "streamed" and n == 8192 else schedule)
    assert found.gemms == gemms
    assert round(found.floor, 2) <= ratio, str(found)
    assert f"{found.floor:.3f} ×" in str(found)


def test_without_fused_kernels_the_passes_over_logits_show():
    """Statistics and gradient, 10 bytes a logit: 2.5 ms of 33 at H = 4096, which no chunk size takes away."""
    found = on_h200(8192, 4096, gigabytes=4.4, kernels=Kernels(), group_rows=1, schedule="streamed")
    assert found.time.rows == pytest.approx(2.5e-3, rel=0.01)
    assert 1.08 < found.floor < 1.1
    assert on_h200(8192, 2048, gigabytes=4.4, kernels=Kernels(), group_rows=1, schedule="streamed").floor > 1.15


@pytest.mark.parametrize(("kernels", "gigabytes"), [(Kernels(), 4.4), (FUSED, 2.3)], ids=["logits", "exponentials"])
def test_one_chunk_holds_all_rows(kernels, gigabytes):
    """Beside the gradients nothing but one tile, rows side by side and a float32 tile a processor; no accumulator."""
    found = on_h200(8192, 4096, gigabytes=gigabytes, kernels=kernels, group_rows=1, schedule="streamed")
    assert (found.rows, found.slab, found.accumulator_bytes) == (8192, V, 0)
    assert beside_gradients(found) <= gigabytes * 1e9


@pytest.mark.parametrize("n", [5000, 8192, 9000, 12000])
@pytest.mark.parametrize("H", [2048, 4096])
def test_one_chunk_where_it_is_no_larger_than_several(n, H):
    """The float32 sum that several chunks need counts as room for one."""
    found = on_h200(n, H, gigabytes=1, group_rows=1)
    several = on_h200(n, H, gigabytes=1, group_rows=1, schedule="streamed")
    assert several.rows < n
    if found.schedule == "cached":
        assert found.accumulator_bytes == 0
        assert beside_gradients(found) <= beside_gradients(several)
    else:
        assert n * V * 2 > 1e9 + V * H * 4 - n * H * 6


@pytest.mark.parametrize("megabytes", [300, 400, 700, 1000, 2000, 4400, 9000])
@pytest.mark.parametrize("kernels", [Kernels(), FUSED], ids=["library", "fused"])
@pytest.mark.parametrize("schedule", ["deferred", "auto"])
def test_any_budget_from_300_megabytes_is_kept(schedule, kernels, megabytes):
    found = on_h200(8192, 4096, gigabytes=megabytes / 1e3, kernels=kernels, schedule=schedule)
    assert beside_gradients(found) <= megabytes * 1e6
    assert found.rows >= 8192  # each slab of the weight's gradient is one product, written once
    assert found.accumulator_bytes == 0


def test_forward_only_takes_less_than_20_megabytes():
    assert beside_gradients(on_h200(8192, 4096, needs=NONE)) < 20e6


@pytest.mark.parametrize("schedule", TARGETS)
def test_half_the_rows_take_half_the_time(schedule):
    arguments = TARGETS[schedule][2]
    half, full = (on_h200(n, 4096, **arguments) for n in (4096, 8192))
    assert half.time.seconds <= 0.55 * full.time.seconds


# ---- slabs


def call_of(n, H, vocab, needs, arch, kernels=FUSED):
    return gpu_call.Call(
        n, H, vocab, 2, 2, rounds=False, bf16=True, cacheable=True, gathered=True, needs=needs, tokens=n,
        device=device_of(arch), kernels=kernels,
    )  # fmt: skip


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("needs", [BOTH, (False, True, False), FROZEN], ids=["both", "weight", "hidden"])
@pytest.mark.parametrize(
    ("n", "H", "vocab", "widest"), [(8192, 4096, V, 30000), (3000, 2048, 128256, 9000), (500, 768, 50257, 60000)]
)
def test_slabs_are_near_the_best_of_all_widths(arch, needs, n, H, vocab, widest):
    from fastalign.ops.timing import Sum, add_slab

    call = call_of(n, H, vocab, needs, arch)

    def seconds(slab):
        total = Sum()
        add_slab(total, call, n, slab)
        return -(-vocab // slab) * total.seconds

    chosen = _best_slab(call, n, widest)
    assert 0 < chosen <= min(widest, vocab)
    assert chosen % 256 == 0 or chosen == vocab
    best = min(seconds(slab) for slab in range(256, min(widest, vocab) + 1, 256))
    assert seconds(chosen) <= 1.03 * best


def test_a_slab_that_fits_l2_does_not_win_against_sums_of_hiddens_gradient():
    in_cache = 1024  # 8192 rows of it in float32 take 32 MiB of an H200's 50
    call = call_of(8192, 4096, V, BOTH, "sm_90")
    assert _best_slab(call, 8192, 30000) > 8 * in_cache


def test_a_gemm_takes_whole_waves():
    h200 = device_of("sm_90")
    full = h200.gemm(128 * 132, 256, 64 * 1024)
    assert h200.gemm(128 * 133, 256, 64 * 1024) > 1.2 * full  # one tile more: parts of a second wave
    assert h200.gemm(8192, V, 4096) == pytest.approx(11.1e-3, rel=0.01)


def test_unknown_architectures_take_the_nearest_older_one():
    assert device_of("sm_89") == DEVICES["sm_80"]
    assert device_of("sm_103") == DEVICES["sm_100"]
    assert device_of("sm_120") == DEVICES["sm_100"]
    assert device_of("gfx950") == DEVICES["gfx942"]
    assert device_of("sm_75") == DEVICES["sm_80"]
    with pytest.raises(ValueError, match="arch must look like"):
        device_of("abacus")


def test_plans_differ_by_architecture_alone():
    """Never by what the machine at hand has free."""
    plans = [plan(8192, 4096, V, dtype=torch.bfloat16, device_type="cuda", arch=arch) for arch in ("sm_90", "sm_90a")]
    assert dataclasses.replace(plans[0]) == plans[1]


def test_the_planner_knows_what_the_fused_forward_takes():
    from fastalign.kernels._tiles import fused_tiles

    assert gpu_call.GATHER_BYTES == GATHER_BYTES
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert fused_tiles(arch, torch.bfloat16).split_v >= gpu_call.SPLIT
