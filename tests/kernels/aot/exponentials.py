"""Rows of exponentials that are done again. The kernel that leaves them is the fused forward's, with it in `fused`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aot.case import Case
from fastalign.kernels import fused_exponentials

KERNELS = {"redo_exponentials": fused_exponentials._redo_exponentials_kernel}


def cases() -> Iterator[Case]:
    pointers = dict.fromkeys(("hidden_ptr", "weight_ptr", "keep_ptr"), "bf16")
    pointers |= dict.fromkeys(("max_ptr", "reference_ptr"), "fp32")
    unit = ("stride_hh", "stride_wh", "stride_b")
    yield Case("redo_exponentials", "plain", pointers, {"SOFTCAP": False}, unit=unit)
    rows = pointers | {"rows_ptr": "i64", "bias_ptr": "bf16"}
    yield Case("redo_exponentials", "rows+bias+softcap", rows, {"SOFTCAP": True}, unit=unit)


def launch_options(case: Case, arch: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return fused_exponentials.REDO, {"num_warps": 4, "enable_fp_fusion": False}
