"""Scans and sums along sequences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aot.case import Case
from fastalign.kernels import gae

KERNELS = {"gae": gae._gae_kernel}


def cases() -> Iterator[Case]:
    names = ("rewards_ptr", "values_ptr", "advantages_ptr", "returns_ptr")
    pointers = dict.fromkeys(names, "fp32") | {"mask_ptr": "u8"}
    yield Case("gae", "plain", pointers)
    yield Case("gae", "unaligned", pointers, aligned=False)


def launch_options(case: Case, arch: str) -> tuple[dict[str, int], dict[str, Any]]:
    return {"BLOCK": gae.BLOCK}, {"num_warps": gae.num_warps(gae.BLOCK), "enable_fp_fusion": False}
