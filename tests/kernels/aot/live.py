"""Rows that are live, known on the device only: their partition, and the GEMMs over them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aot.case import DTYPES, PORTABLE, Case
from fastalign.kernels import live_gemm, live_rows

KERNELS = {
    "count_live": live_rows._count_live_kernel,
    "partition": live_rows._partition_kernel,
    "gather_rows": live_rows._gather_rows_kernel,
    "column_sums": live_rows._column_sums_kernel,
    "live_matmul": live_gemm._live_matmul_kernel,
}
BULK = ("sm_90", "sm_100")  # where operands come through tensor descriptors
UNIT = ("stride_ac", "stride_bc", "stride_sc", "stride_oc")


def cases() -> Iterator[Case]:
    coefficients = dict.fromkeys(("base_ptr", "target_coef_ptr", "entropy_coef_ptr"), "fp32") | {"counts_ptr": "i32"}
    yield Case("count_live", "entropy", coefficients)
    yield Case("partition", "entropy", coefficients | {"index_ptr": "i64", "count_ptr": "i32"})
    gather = {"index_ptr": "i64", "count_ptr": "i32"}
    yield Case("gather_rows", "bf16", gather | {"source_ptr": "bf16", "out_ptr": "bf16"}, unit=("stride_sc",))
    yield Case(
        "column_sums", "bf16 scale", {"a_ptr": "bf16", "out_ptr": "fp32", "count_ptr": "i32", "scale_ptr": "fp32"}
    )
    yield from products()


def products() -> Iterator[Case]:
    """grad_hidden into rows by index, grad_weight onto what is there, logits against a transposed head."""
    index, onto = {"index_ptr": "i64"}, {"start_ptr": "fp32"}
    for dtype in DTYPES:
        yield from product(dtype, "grad_weight", {"out_ptr": "fp32"} | onto, True, False)
        if dtype == "fp16":  # differs from bf16 in the name of the product alone
            continue
        yield from product(dtype, "grad_hidden", {"out_ptr": "fp32"} | index, False, False)
        yield from product(dtype, "logits", {"out_ptr": "fp32"} | index, False, True)
    narrow = {"out_ptr": "bf16", "scale_ptr": "fp32"}
    yield from product("bf16", "last grad_hidden", narrow | index | onto, False, False)
    yield from product("bf16", "only grad_weight", narrow, True, False)
    ragged = {"out_ptr": "fp32", "scale_ptr": "fp32"} | onto
    yield from product("bf16", "grad_weight ragged", ragged, True, False, even=False)
    yield from product("bf16", "grad_hidden ragged unaligned", ragged | index, False, False, even=False, aligned=False)


def product(
    dtype: str, variant: str, pointers: dict[str, str], depth: bool, trans_b: bool, *, even: bool = True,
    aligned: bool = True,
) -> Iterator[Case]:  # fmt: skip
    even_flags = {"EVEN_M": even, "EVEN_N": even, "EVEN_K": even or depth}
    constants = {"COUNT_IS_DEPTH": depth, "TRANS_B": trans_b, "WIDEN": False, "TMA": False} | even_flags
    pointers = pointers | {"count_ptr": "i32"}
    operands = {"a": dtype, "b": dtype}
    common: dict[str, Any] = {"unit": UNIT, "aligned": aligned, "matrix": dtype != "fp32"}
    by_pointer = PORTABLE
    if dtype != "fp32" and aligned:
        by_pointer = tuple(target for target in PORTABLE if target not in BULK)
        bulk = constants | {"TMA": True}
        yield Case("live_matmul", f"{dtype} {variant}", pointers, bulk, operands, targets=BULK, **common)
    yield Case("live_matmul", f"{dtype} {variant}", pointers | operands, constants, targets=by_pointer, **common)


def launch_options(case: Case, arch: str) -> tuple[dict[str, Any], dict[str, Any]]:
    if case.kernel in ("count_live", "partition"):
        return {"BLOCK": live_rows._BLOCK}, {"num_warps": 4, "enable_fp_fusion": False}
    if case.kernel == "gather_rows":
        return {"PAD": live_rows.PAD, "BLOCK": 4096}, {"num_warps": 4, "enable_fp_fusion": False}
    if case.kernel == "column_sums":
        block = {"BLOCK_ROWS": live_rows._SUM_BLOCK, "BLOCK_COLS": live_rows._SUM_BLOCK}
        return block, {"num_warps": 8, "enable_fp_fusion": False}
    dtype = DTYPES[(case.descriptors or case.pointers)["a"]]
    sizes, options = live_gemm.launch_options(live_gemm.gemm_tiles(arch, dtype, aligned=case.aligned))
    if not case.descriptors:
        return dict(sizes), dict(options)
    m, n, k = (sizes[f"BLOCK_{name}"] for name in "MNK")
    a = [k, m] if case.constants["COUNT_IS_DEPTH"] else [m, k]
    b = [n, k] if case.constants["TRANS_B"] else [k, n]
    return sizes | {"a_BLOCK": a, "b_BLOCK": b}, dict(options)
