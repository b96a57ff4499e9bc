"""Compile every kernel ahead of time, for each architecture, and tabulate what it takes of the machine. Needs no GPU.

    python tests/kernels/resources.py                    print the table for the installed Triton
    python tests/kernels/resources.py --update FILE.csv  replace this Triton version's lines of a table
    python tests/kernels/resources.py --json FILE.json   the lines with what is wrong with the code, if anything

Columns: registers a thread (AMD: vector registers), stack bytes a thread (spills; AMD: scratch), shared memory bytes
a program, and the matrix instruction that the kernel's dot became. `test_compiled.py` holds them against limits and
the committed table.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import torch
import triton
from fastalign.kernels import _tiles, fused_forward, gae, row_kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MATRIX_INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "v_mfma")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KERNELS = {
    "row_stats": row_kernels._row_stats_kernel,
    "row_grad": row_kernels._row_grad_kernel,
    "row_exp": row_kernels._row_exp_kernel,
    "fused_forward": fused_forward._fused_forward_kernel,
    "merge_splits": fused_forward._merge_splits_kernel,
    "gae": gae._gae_kernel,
}
UNIT_STRIDES = ("stride_tv", "stride_ov", "stride_b", "stride_hh", "stride_wh")
OUTPUTS = ("ENTROPY", "TOP1", "SUM_SQ", "SUM_Z")


@dataclass(frozen=True)
class Case:
    """One kernel with one combination of flags and dtypes.

    pointers gives the element type of each pointer argument; a pointer absent from it is passed as None. Integers are
    32 bits wide, and multiples of 16 when `aligned`; column strides are 1.
    """

    kernel: str
    variant: str
    pointers: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    aligned: bool = True


@dataclass(frozen=True)
class Resources:
    """A line of the table."""

    triton: str
    kernel: str
    variant: str
    target: str
    registers: int
    stack: int
    shared: int
    matrix_instruction: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.triton, self.kernel, self.variant, self.target


def row_stats_cases() -> Iterator[Case]:
    pointers = {"tile_ptr": "fp32", "targets_ptr": "i64", "values_ptr": "fp32"}
    none = dict.fromkeys(("SOFTCAP", *OUTPUTS), False)
    yield Case("row_stats", "plain", pointers, none)
    yield Case("row_stats", "unaligned", pointers, none, aligned=False)
    for flag in none:
        top1 = {"argmax_ptr": "i64"} if flag == "TOP1" else {}
        yield Case("row_stats", flag.lower(), pointers | top1, none | {flag: True})
    everything = pointers | {"bias_ptr": "fp32", "argmax_ptr": "i64"}
    yield Case("row_stats", "bias+all", everything, dict.fromkeys(none, True))


def row_grad_cases() -> Iterator[Case]:
    vectors = dict.fromkeys(("max_ptr", "log_sum_ptr", "base_ptr", "target_coef_ptr"), "fp32") | {"targets_ptr": "i64"}
    plain = {"SOFTCAP": False, "EXP_TILE": False, "NARROW_ALIAS": False}
    for out in DTYPES:
        pointers = vectors | {"tile_ptr": "fp32", "out_ptr": out}
        everything = pointers | {"entropy_coef_ptr": "fp32", "bias_ptr": "fp32"}
        yield Case("row_grad", out, pointers, plain)
        yield Case("row_grad", f"{out} unaligned", pointers, plain, aligned=False)
        yield Case("row_grad", f"{out} bias+entropy+softcap", everything, plain | {"SOFTCAP": True})
        if out == "fp32":
            continue
        narrow = plain | {"NARROW_ALIAS": True}
        yield Case("row_grad", f"{out} narrow", pointers, narrow)
        yield Case("row_grad", f"{out} narrow bias+entropy+softcap", everything, narrow | {"SOFTCAP": True})
        exponentials = {name: kind for name, kind in pointers.items() if name != "max_ptr"} | {"tile_ptr": out}
        yield Case("row_grad", f"{out} exp_tile", exponentials, plain | {"EXP_TILE": True})


def row_exp_cases() -> Iterator[Case]:
    for out in ("bf16", "fp16"):
        pointers = {"tile_ptr": "fp32", "max_ptr": "fp32", "out_ptr": out}
        yield Case("row_exp", out, pointers, {"SOFTCAP": False, "NARROW_ALIAS": False})
        everything = pointers | {"bias_ptr": "fp32"}
        yield Case("row_exp", f"{out} narrow bias+softcap", everything, {"SOFTCAP": True, "NARROW_ALIAS": True})


def fused_cases() -> Iterator[Case]:
    none = dict.fromkeys(("SOFTCAP", *OUTPUTS), False) | {"EVEN_H": True, "WIDEN": False, "STATE_ROWS": 3}
    everything = dict.fromkeys(none, True) | {"WIDEN": False, "STATE_ROWS": 6}
    for dtype in DTYPES:
        pointers = {"hidden_ptr": dtype, "weight_ptr": dtype, "targets_ptr": "i64", "values_ptr": "fp32"}
        rows = pointers | {"rows_ptr": "i64"}
        yield Case("fused_forward", dtype, pointers, none)
        yield Case("fused_forward", f"{dtype} rows+entropy", rows, none | {"ENTROPY": True, "STATE_ROWS": 6})
        yield Case(
            "fused_forward", f"{dtype} rows+bias+all", rows | {"bias_ptr": dtype, "argmax_ptr": "i32"}, everything
        )
        if dtype == "fp16":  # differs from bf16 in the name of the product alone
            continue
        yield Case("fused_forward", f"{dtype} ragged H", rows, none | {"EVEN_H": False})
        yield Case("fused_forward", f"{dtype} unaligned", rows, none | {"EVEN_H": False}, aligned=False)
    pointers = {"partial_values_ptr": "fp32", "values_ptr": "fp32"}
    yield Case("merge_splits", "plain", pointers, dict.fromkeys(OUTPUTS, False) | {"STATE_ROWS": 3})
    argmax = {"partial_argmax_ptr": "i32", "argmax_ptr": "i64"}
    yield Case("merge_splits", "all", pointers | argmax, dict.fromkeys(OUTPUTS, True) | {"STATE_ROWS": 6})


def gae_cases() -> Iterator[Case]:
    names = ("rewards_ptr", "values_ptr", "advantages_ptr", "returns_ptr")
    pointers = dict.fromkeys(names, "fp32") | {"mask_ptr": "u8"}
    yield Case("gae", "plain", pointers)
    yield Case("gae", "unaligned", pointers, aligned=False)


def jobs() -> list[tuple[Case, str]]:
    """Every case on every architecture; sm_89, fused kernel only, stands for those without tiles of their own."""
    cases = [*fused_cases(), *row_stats_cases(), *row_grad_cases(), *row_exp_cases(), *gae_cases()]
    return [(case, arch) for case in cases for arch in TARGETS if arch != "sm_89" or case.kernel == "fused_forward"]


def launch_options(case: Case, arch: str) -> tuple[dict[str, int], dict[str, Any]]:
    """Tile sizes (compile-time constants) and compiler options, as the launcher sets them for a large vocabulary."""
    if case.kernel == "fused_forward":
        dtype = DTYPES[case.pointers["hidden_ptr"]]
        return fused_forward.launch_options(_tiles.fused_tiles(arch, dtype, aligned=case.aligned))
    if case.kernel == "merge_splits":
        return {"BLOCK": fused_forward.MERGE_BLOCK}, {"num_warps": 4, "enable_fp_fusion": False}
    if case.kernel == "gae":
        return {"BLOCK": gae.BLOCK}, {"num_warps": gae.num_warps(gae.BLOCK), "enable_fp_fusion": False}
    tiles = _tiles.row_tiles(131072)
    return {"BLOCK": tiles.block}, {"num_warps": tiles.num_warps, "enable_fp_fusion": False}


def compile_case(case: Case, arch: str) -> Any:
    """The compiled kernel, specialised as a launch with such arguments specialises it."""
    kernel = KERNELS[case.kernel]
    tile_sizes, options = launch_options(case, arch)
    constants: dict[str, Any] = case.constants | tile_sizes
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for position, name in enumerate(kernel.arg_names):
        if name in case.pointers:
            signature[name] = "*" + case.pointers[name]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif name.endswith("_ptr"):
            constants[name] = None
        elif name in UNIT_STRIDES:
            constants[name] = 1
        elif kernel.params[position].annotation_type:
            signature[name] = kernel.params[position].annotation_type
        elif name not in constants:
            signature[name] = "i32"
            if case.aligned:
                attributes[(position,)] = [["tt.divisibility", 16]]
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGETS[arch], options=options)


def measure(job: tuple[Case, str]) -> tuple[Resources, list[str]]:
    """A line of the table, and what is wrong with the code."""
    case, arch = job
    compiled = compile_case(case, arch)
    amd = arch.startswith("gfx")
    assembly = compiled.asm["amdgcn" if amd else "ptx"]
    registers, stack = _amd_resources(assembly) if amd else _nvidia_resources(compiled.asm["cubin"])
    instruction = next((name for name in MATRIX_INSTRUCTIONS if name in assembly), "")
    problems = []
    if re.search(r"\bv_\w+_f64" if amd else r"\.f64\b", assembly):
        problems.append("computes in float64")
    if case.constants.get("NARROW_ALIAS") and not _barrier_between_loads_and_stores(assembly, amd):
        problems.append("no barrier between the loads and the stores of an iteration")
    shared = compiled.metadata.shared
    return Resources(
        triton.__version__, case.kernel, case.variant, arch, registers, stack, shared, instruction
    ), problems


def _nvidia_resources(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


@functools.cache
def _cuobjdump() -> str:
    """The one that ships inside the Triton wheel."""
    return str(next((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("cuobjdump*")))


def _amd_resources(assembly: str) -> tuple[int, int]:
    usage = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", assembly))
    return int(usage["vgpr_count"]), int(usage["private_segment_fixed_size"])


def _barrier_between_loads_and_stores(assembly: str, amd: bool) -> bool:
    """Whether each run of 16-byte loads is followed by a barrier, and only then by stores.

    Stores at the very start belong to the loop that writes zeros without loading anything.
    """
    pattern = (
        r"global_(l)oad_dwordx4|s_(b)arrier|global_(s)tore_dwordx4"
        if amd
        else r"(l)d\.global\.v4|(b)ar\.sync|(s)t\.global\.v4"
    )
    order = "".join("".join(groups) for groups in re.findall(pattern, assembly))
    return re.fullmatch(r"s*(l+bs+)+", order) is not None


def table(processes: int) -> list[tuple[Resources, list[str]]]:
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return sorted(pool.imap_unordered(measure, jobs()), key=lambda line: line[0].key)


def read_table(path: Path) -> list[Resources]:
    kinds = {f.name: int if f.type == "int" else str for f in fields(Resources)}
    with path.open(newline="") as file:
        return [Resources(**{name: kinds[name](text) for name, text in line.items()}) for line in csv.DictReader(file)]


def write_table(path: Path, lines: list[Resources]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Resources)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(line) for line in sorted(lines, key=lambda line: line.key))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", type=Path, help="CSV file whose lines of this Triton version are replaced")
    parser.add_argument("--json", type=Path, help="file for the lines with their problems")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    measured = table(arguments.processes)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(line) | {"problems": problems} for line, problems in measured]))
    if arguments.update is not None:
        kept = (
            [r for r in read_table(arguments.update) if r.triton != triton.__version__]
            if arguments.update.exists()
            else []
        )
        write_table(arguments.update, kept + [line for line, _ in measured])
    if arguments.json is None and arguments.update is None:
        for line, problems in measured:
            print(*asdict(line).values(), *problems, sep=",")
    failed = [f"{line.key}: {', '.join(problems)}" for line, problems in measured if problems]
    sys.exit("\n".join(failed) if failed else 0)


if __name__ == "__main__":
    main()
