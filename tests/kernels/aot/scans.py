"""Scans and sums along sequences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aot.case import Case
from fastalign.kernels import gae, segments

KERNELS = {
    "gae": gae._gae_kernel,
    "segment_sums": segments._segment_sums_kernel,
    "add_pieces": segments._add_pieces_kernel,
    "spread_segments": segments._spread_segments_kernel,
}


def cases() -> Iterator[Case]:
    names = ("rewards_ptr", "values_ptr", "advantages_ptr", "returns_ptr")
    pointers = dict.fromkeys(names, "fp32") | {"mask_ptr": "u8"}
    yield Case("gae", "plain", pointers)
    yield Case("gae", "unaligned", pointers, aligned=False)
    tokens = {"values_ptr": "fp32", "offsets_ptr": "i64"}
    outputs = {"sums_ptr": "fp32", "counts_ptr": "i64"}
    mask = {"mask_ptr": "u8"}
    yield Case("segment_sums", "plain", tokens | outputs, float64=True)
    yield Case("segment_sums", "mask+pieces", tokens | outputs | mask | {"sums_ptr": "fp64"}, float64=True)
    partial = {"partial_sums_ptr": "fp64", "partial_counts_ptr": "i64"}
    yield Case("add_pieces", "plain", outputs | partial, float64=True)
    yield Case("spread_segments", "plain", tokens | {"out_ptr": "fp32"})
    yield Case("spread_segments", "mask", tokens | mask | {"out_ptr": "fp32"})


def launch_options(case: Case, arch: str) -> tuple[dict[str, int], dict[str, Any]]:
    if case.kernel == "gae":
        return {"BLOCK": gae.BLOCK}, {"num_warps": gae.num_warps(gae.BLOCK), "enable_fp_fusion": False}
    if case.kernel == "add_pieces":
        return {"BLOCK": 128}, {"num_warps": 4, "enable_fp_fusion": False}
    sizes = {"PIECE": segments.PIECE, "BLOCK": segments.BLOCK}
    return sizes, {"num_warps": segments.NUM_WARPS, "enable_fp_fusion": False}
