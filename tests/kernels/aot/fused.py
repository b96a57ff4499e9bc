"""The fused forward, and the merging of its splits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aot.case import DTYPES, PORTABLE, Case
from fastalign.kernels import _fold, _fused_persistent, _fused_pointers, _tiles, fused_forward

KERNELS = {
    "fused_persistent": _fused_persistent._fused_persistent_kernel,
    "fused_forward": _fused_pointers._fused_forward_kernel,
    "merge_splits": _fold._merge_splits_kernel,
}
FLAGS = ("SOFTCAP", "SCALE_FIRST", "ENTROPY", "TOP1", "SUM_SQ", "SUM_Z")
UNIT = ("stride_hh", "stride_wh", "stride_b")
TARGETS = (*PORTABLE, "sm_89")  # sm_89 stands for the architectures without tiles of their own
BULK = ("sm_90", "sm_100")


def cases() -> Iterator[Case]:
    yield from _persistent()
    yield from _pointers()
    yield from _merge()


def launch_options(case: Case, arch: str) -> tuple[dict[str, Any], dict[str, Any]]:
    if case.kernel == "merge_splits":
        return fused_forward.MERGE, {"num_warps": 4, "enable_fp_fusion": False}
    dtype = DTYPES[case.descriptors.get("hidden_desc") or case.pointers["hidden_ptr"]]
    tiles = _tiles.fused_tiles(arch, dtype, aligned=case.aligned)
    if "reference_ptr" in case.pointers:
        tiles = fused_forward.keeping(tiles)
    sizes, options = fused_forward.launch_options(tiles)
    if case.kernel == "fused_persistent":
        blocks = {
            "hidden_desc_BLOCK": (tiles.block_n, tiles.block_h),
            "weight_desc_BLOCK": (tiles.block_v, tiles.block_h),
        }
        if "keep_desc" in case.descriptors:
            blocks["keep_desc_BLOCK"] = (tiles.block_n, tiles.block_v // tiles.parts)
        return sizes | blocks, options
    return sizes, options


def _flags(*on: str) -> dict[str, Any]:
    rows = 2 + sum(flag in on for flag in ("ENTROPY", "SUM_SQ", "SUM_Z"))
    return {flag: flag in on for flag in FLAGS} | {"STATE_ROWS": rows, "WIDEN": False}


def _persistent() -> Iterator[Case]:
    pointers = dict.fromkeys(("partial_values_ptr", "values_ptr"), "fp32") | {"targets_ptr": "i64"}
    for dtype in ("bf16", "fp16"):
        descriptors = {"hidden_desc": dtype, "weight_desc": dtype}
        more = {"descriptors": descriptors, "unit": UNIT, "targets": BULK, "matrix": True}
        yield Case("fused_persistent", dtype, pointers, _flags(), **more)
        if dtype == "fp16":  # differs from bf16 in the name of the product alone
            continue
        kept = more | {"descriptors": descriptors | {"keep_desc": "bf16"}}
        for arch, stack in (("sm_90", 0), ("sm_100", 64)):
            kept |= {"targets": (arch,), "max_stack": stack}
            yield Case("fused_persistent", f"{dtype} kept", pointers | {"reference_ptr": "fp32"}, _flags(), **kept)
        yield Case("fused_persistent", f"{dtype} entropy", pointers, _flags("ENTROPY"), **more)
        top1 = pointers | {"partial_argmax_ptr": "i32"}
        yield Case("fused_persistent", f"{dtype} entropy+top1", top1, _flags("ENTROPY", "TOP1"), **more)
        yield Case(
            "fused_persistent", f"{dtype} bias+softcap", pointers | {"bias_ptr": dtype}, _flags("SOFTCAP"), **more
        )
        everything = _flags(*(flag for flag in FLAGS if flag != "SCALE_FIRST"))
        yield Case("fused_persistent", f"{dtype} bias+all", top1 | {"bias_ptr": dtype}, everything, **more)


def _pointers() -> Iterator[Case]:
    everything = _flags(*(flag for flag in FLAGS if flag != "SCALE_FIRST"))
    for dtype in DTYPES:
        pointers = {"hidden_ptr": dtype, "weight_ptr": dtype, "targets_ptr": "i64"}
        pointers |= dict.fromkeys(("partial_values_ptr", "values_ptr"), "fp32")
        rows = pointers | {"rows_ptr": "i64"}
        outputs = rows | {"bias_ptr": dtype, "partial_argmax_ptr": "i32"}
        aligned = {
            "unit": UNIT,
            "targets": TARGETS if dtype == "fp32" else tuple(arch for arch in TARGETS if arch not in BULK),
            "matrix": dtype != "fp32",
        }
        # In float32 on sm_80 ptxas gives up 16 bytes for a second program on the multiprocessor.
        spills = {"max_stack": 16 if dtype == "fp32" else 0}
        yield Case("fused_forward", dtype, pointers, _flags() | {"EVEN_H": True}, **aligned, **spills)
        if dtype == "fp16":
            continue
        if dtype == "bf16":
            kept = rows | {"keep_ptr": "bf16", "reference_ptr": "fp32"}
            yield Case("fused_forward", "bf16 rows+kept", kept, _flags() | {"EVEN_H": True}, **aligned, max_stack=8)
        yield Case("fused_forward", f"{dtype} rows+entropy", rows, _flags("ENTROPY") | {"EVEN_H": True}, **aligned)
        yield Case("fused_forward", f"{dtype} rows+bias+all", outputs, everything | {"EVEN_H": True}, **aligned)
        ragged = _flags() | {"EVEN_H": False}
        yield Case("fused_forward", f"{dtype} ragged H", rows, ragged, **aligned)
        unaligned = aligned | {"targets": TARGETS, "aligned": False}
        yield Case("fused_forward", f"{dtype} unaligned", rows, ragged, **unaligned)


def _merge() -> Iterator[Case]:
    pointers = {"partial_values_ptr": "fp32", "values_ptr": "fp32"}

    def flags(*on: str) -> dict[str, Any]:
        return {name: value for name, value in _flags(*on).items() if name not in ("SOFTCAP", "SCALE_FIRST", "WIDEN")}

    yield Case("merge_splits", "plain", pointers, flags())
    argmax = {"partial_argmax_ptr": "i32", "argmax_ptr": "i64"}
    yield Case("merge_splits", "all", pointers | argmax, flags("ENTROPY", "TOP1", "SUM_SQ", "SUM_Z"))
