"""The row kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aot.case import DTYPES, Case
from fastalign.kernels import _tiles, row_kernels, row_loss_grad

KERNELS = {
    "row_stats": row_kernels._row_stats_kernel,
    "row_grad": row_kernels._row_grad_kernel,
    "row_exp": row_kernels._row_exp_kernel,
    "row_loss_grad": row_loss_grad._row_loss_grad_kernel,
}
CAPPED = {"SCALED": True, "SOFTCAP": True}
UNIT = ("stride_tv", "stride_ov", "stride_b")


def cases() -> Iterator[Case]:
    yield from _stats()
    yield from _grad()
    yield from _exp()
    yield from _loss_grad()


def launch_options(case: Case, arch: str) -> tuple[dict[str, int], dict[str, Any]]:
    """As for a large vocabulary."""
    warp = 64 if arch.startswith("gfx") else 32
    both = case.kernel == "row_loss_grad"
    tiles = row_loss_grad.loss_grad_tiles(131072, warp) if both else _tiles.row_tiles(131072)
    sizes = {"BLOCK": tiles.block}
    if "TOP1" in case.constants:
        sizes["LANES"] = row_kernels.lanes(tiles, warp)
    return sizes, {"num_warps": tiles.num_warps, "enable_fp_fusion": False}


def _stats() -> Iterator[Case]:
    pointers = {"tile_ptr": "fp32", "targets_ptr": "i64", "values_ptr": "fp32"}
    none = dict.fromkeys(("SCALED", "SOFTCAP", "ENTROPY", "TOP1", "SUM_SQ", "SUM_Z"), False)
    yield Case("row_stats", "plain", pointers, none, unit=UNIT)
    yield Case("row_stats", "unaligned", pointers, none, unit=UNIT, aligned=False)
    for flag in none:
        top1 = {"argmax_ptr": "i64"} if flag == "TOP1" else {}
        yield Case("row_stats", flag.lower(), pointers | top1, none | {flag: True}, unit=UNIT)
    everything = pointers | {"bias_ptr": "fp32", "argmax_ptr": "i64"}
    yield Case("row_stats", "bias+all", everything, dict.fromkeys(none, True), unit=UNIT)


def _grad() -> Iterator[Case]:
    vectors = dict.fromkeys(("max_ptr", "log_sum_ptr", "base_ptr", "target_coef_ptr"), "fp32") | {"targets_ptr": "i64"}
    plain = dict.fromkeys(("SCALED", "SOFTCAP", "EXP_TILE", "NARROW_ALIAS"), False)
    for out in DTYPES:
        pointers = vectors | {"tile_ptr": "fp32", "out_ptr": out}
        everything = pointers | {"entropy_coef_ptr": "fp32", "bias_ptr": "fp32"}
        yield Case("row_grad", out, pointers, plain, unit=UNIT)
        yield Case("row_grad", f"{out} unaligned", pointers, plain, unit=UNIT, aligned=False)
        yield Case("row_grad", f"{out} bias+entropy+softcap", everything, plain | CAPPED, unit=UNIT)
        if out == "fp32":
            continue
        narrow = plain | {"NARROW_ALIAS": True}
        yield Case("row_grad", f"{out} narrow", pointers, narrow, unit=UNIT)
        yield Case("row_grad", f"{out} narrow bias+entropy+softcap", everything, narrow | CAPPED, unit=UNIT)
        exponentials = {name: kind for name, kind in pointers.items() if name != "max_ptr"} | {"tile_ptr": out}
        yield Case("row_grad", f"{out} exp_tile", exponentials, plain | {"EXP_TILE": True}, unit=UNIT)


def _exp() -> Iterator[Case]:
    for out in ("bf16", "fp16"):
        pointers = {"tile_ptr": "fp32", "max_ptr": "fp32", "out_ptr": out}
        yield Case("row_exp", out, pointers, {"SOFTCAP": False, "NARROW_ALIAS": False}, unit=UNIT)
        constants = {"SOFTCAP": True, "NARROW_ALIAS": True}
        yield Case("row_exp", f"{out} narrow bias+softcap", pointers | {"bias_ptr": "fp32"}, constants, unit=UNIT)


def _loss_grad() -> Iterator[Case]:
    pointers = {"tile_ptr": "fp32", "targets_ptr": "i64", "grad_logps_ptr": "fp32", "values_ptr": "fp32"}
    none = dict.fromkeys(("SCALED", "SOFTCAP", "ENTROPY", "TOP1", "SUM_SQ", "SUM_Z"), False)
    every = {"bias_ptr": "fp32", "grad_entropy_ptr": "fp32", "argmax_ptr": "i64"}
    for out in ("fp32", "bf16"):
        narrow = {"NARROW_ALIAS": out != "fp32"}
        yield Case("row_loss_grad", out, pointers | {"out_ptr": out}, none | narrow, unit=UNIT)
        constants = dict.fromkeys(none, True) | narrow
        given = pointers | every | {"out_ptr": out}
        # With everything on, 1024 threads have a few registers too few; loops over 10 bytes a logit do not show it.
        yield Case("row_loss_grad", f"{out} bias+all", given, constants, unit=UNIT, max_stack=128)
