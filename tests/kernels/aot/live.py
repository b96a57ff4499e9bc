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
    yield from products()


def products() -> Iterator[Case]:
    """grad_hidden and grad_weight from rows picked by index, logits of rows in front against a transposed head."""
    at = {"a_index_ptr": "i64"}
    rows, onto, scaled = at | {"out_index_ptr": "i64"}, {"start_ptr": "fp32"}, {"scale_ptr": "fp32"}
    wide, narrow = {"out_ptr": "fp32"}, {"out_ptr": "bf16"}
    for dtype in DTYPES:
        yield from product(dtype, "grad_weight", wide | at | onto, depth=True)
        if dtype == "fp16":  # differs from bf16 in the name of the product alone
            continue
        yield from product(dtype, "grad_hidden", wide | rows | onto)
        yield from product(dtype, "logits", wide | {"out_index_ptr": "i64"}, trans_b=True)
    yield from product("bf16", "only grad_hidden", narrow | rows | {"factors_ptr": "fp32"})
    yield from product("bf16", "only grad_weight", narrow | at | scaled, depth=True)
    yield from product("bf16", "dense grad_weight", wide | onto, depth=True)
    yield from product("bf16", "ragged grad_weight", wide | at | onto | scaled, depth=True, even=False)
    # the last block, whose columns go one by one, spills around its loads, once an output tile
    yield from product("bf16", "ragged grad_hidden", wide | rows | onto | scaled, even=False, max_stack=64)
    yield from product("bf16", "unaligned grad_hidden", wide | rows | onto | scaled, even=False, aligned=False)


def product(
    dtype: str, variant: str, pointers: dict[str, str], *, depth: bool = False, trans_b: bool = False,
    even: bool = True, aligned: bool = True, max_stack: int = 0,
) -> Iterator[Case]:  # fmt: skip
    constants = {"COUNT_IS_DEPTH": depth, "TRANS_B": trans_b, "TMA_A": False, "TMA_B": False, "WIDEN": False}
    constants |= {"EVEN_M": even, "EVEN_N": even, "MASK_K": depth or not aligned}
    constants["LAST_ALONE"] = not even and not depth and aligned
    pointers = pointers | {"count_ptr": "i32"}
    operands = {"a": dtype, "b": dtype}
    common: dict[str, Any] = {"unit": UNIT, "aligned": aligned, "matrix": dtype != "fp32", "max_stack": max_stack}
    by_pointer = PORTABLE
    if dtype != "fp32" and aligned:
        by_pointer = tuple(target for target in PORTABLE if target not in BULK)
        gathered = "a_index_ptr" in pointers
        bulk = {"b": dtype} if gathered else operands
        by_bulk = constants | {"TMA_A": not gathered, "TMA_B": True}
        picked = {"a": dtype} if gathered else {}
        yield Case("live_matmul", f"{dtype} {variant}", pointers | picked, by_bulk, bulk, targets=BULK, **common)
    yield Case("live_matmul", f"{dtype} {variant}", pointers | operands, constants, targets=by_pointer, **common)


def launch_options(case: Case, arch: str) -> tuple[dict[str, Any], dict[str, Any]]:
    if case.kernel in ("count_live", "partition"):
        return {"BLOCK": live_rows._BLOCK}, {"num_warps": 4, "enable_fp_fusion": False}
    if case.kernel == "gather_rows":
        return {"PAD": live_rows.PAD, "BLOCK": 4096}, {"num_warps": 4, "enable_fp_fusion": False}
    depth = case.constants["COUNT_IS_DEPTH"]
    gathered = "" if "a_index_ptr" not in case.pointers else "depth" if depth else "rows"
    dtype = DTYPES[(case.pointers | case.descriptors)["b"]]
    sizes, options = live_gemm.launch_options(
        live_gemm.gemm_tiles(arch, dtype, aligned=case.aligned, gathered=gathered)
    )  # fmt: skip
    m, n, k = (sizes[f"BLOCK_{name}"] for name in "MNK")
    blocks = {"a_BLOCK": [k, m] if depth else [m, k], "b_BLOCK": [n, k] if case.constants["TRANS_B"] else [k, n]}
    return sizes | {name: block for name, block in blocks.items() if name[0] in case.descriptors}, dict(options)
