"""The fused forward, and the merging of its splits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aot.case import DTYPES, PORTABLE, Case
from fastalign.kernels import _tiles, fused_forward

KERNELS = {
    "fused_forward": fused_forward._fused_forward_kernel,
    "merge_splits": fused_forward._merge_splits_kernel,
}
OUTPUTS = ("ENTROPY", "TOP1", "SUM_SQ", "SUM_Z")
UNIT = ("stride_hh", "stride_wh", "stride_b")
TARGETS = (*PORTABLE, "sm_89")  # sm_89 stands for the architectures without tiles of their own


def cases() -> Iterator[Case]:
    yield from _pointers()
    yield from _merge()


def launch_options(case: Case, arch: str) -> tuple[dict[str, int], dict[str, Any]]:
    if case.kernel == "merge_splits":
        return {"BLOCK": fused_forward.MERGE_BLOCK}, {"num_warps": 4, "enable_fp_fusion": False}
    dtype = DTYPES[case.pointers["hidden_ptr"]]
    return fused_forward.launch_options(_tiles.fused_tiles(arch, dtype, aligned=case.aligned))


def _pointers() -> Iterator[Case]:
    none = dict.fromkeys(("SOFTCAP", *OUTPUTS), False) | {"EVEN_H": True, "WIDEN": False, "STATE_ROWS": 3}
    everything = dict.fromkeys(none, True) | {"WIDEN": False, "STATE_ROWS": 6}
    for dtype in DTYPES:
        pointers = {"hidden_ptr": dtype, "weight_ptr": dtype, "targets_ptr": "i64", "values_ptr": "fp32"}
        rows = pointers | {"rows_ptr": "i64"}
        outputs = rows | {"bias_ptr": dtype, "argmax_ptr": "i32"}
        entropy = none | {"ENTROPY": True, "STATE_ROWS": 6}

        def case(variant: str, given: dict[str, str], constants: dict[str, Any], dtype: str = dtype, **more) -> Case:
            name = f"{dtype} {variant}".strip()
            return Case(
                "fused_forward", name, given, constants, unit=UNIT, targets=TARGETS, matrix=dtype != "fp32", **more
            )

        yield case("", pointers, none)
        yield case("rows+entropy", rows, entropy)
        # All five optional outputs keep so many row vectors beside the accumulator that a few registers spill around
        # the epilogue.
        yield case("rows+bias+all", outputs, everything, max_stack=128)
        if dtype == "fp16":  # differs from bf16 in the name of the product alone
            continue
        yield case("ragged H", rows, none | {"EVEN_H": False})
        yield case("unaligned", rows, none | {"EVEN_H": False}, aligned=False)


def _merge() -> Iterator[Case]:
    pointers = {"partial_values_ptr": "fp32", "values_ptr": "fp32"}
    yield Case("merge_splits", "plain", pointers, dict.fromkeys(OUTPUTS, False) | {"STATE_ROWS": 3})
    argmax = {"partial_argmax_ptr": "i32", "argmax_ptr": "i64"}
    yield Case("merge_splits", "all", pointers | argmax, dict.fromkeys(OUTPUTS, True) | {"STATE_ROWS": 6})
