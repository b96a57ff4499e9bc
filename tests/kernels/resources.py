"""Compile every kernel ahead of time, for each architecture, and tabulate what it takes of the machine. Needs no GPU.

    python tests/kernels/resources.py                    print the table for the installed Triton
    python tests/kernels/resources.py --update FILE.csv  replace this Triton version's lines of a table
    python tests/kernels/resources.py --json FILE.json   the lines with what is wrong with the code, if anything
    ... --only gae                                       some cases: a regular expression on "kernel,variant,target"

Another version of Triton goes into a folder of its own and is put before the installed one:

    pip install --no-deps --target build/triton-3.6 triton==3.6.0
    PYTHONPATH=build/triton-3.6 python tests/kernels/resources.py --update tests/kernels/resources.csv

Columns: registers a thread (AMD: vector registers), stack bytes a thread (spills; AMD: scratch), shared memory bytes
a program, and the matrix instruction that the kernel's dot became. The cases, and how to add one: `aot/case.py`.
`test_compiled.py` holds the lines against the committed table.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import triton
from aot import exponentials, fused, live, rows, scans
from aot.case import Case
from fastalign.kernels import _tiles
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_tiles.USER_TABLES = Path(os.devnull)  # the table is of the package's own tiles

SUBJECTS = (fused, exponentials, live, rows, scans)
KERNELS = {name: (kernel, subject) for subject in SUBJECTS for name, kernel in subject.KERNELS.items()}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MATRIX_INSTRUCTIONS = {
    "sm_80": "mma.sync",
    "sm_89": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma",
}


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


def jobs(pattern: str = "") -> list[tuple[Case, str]]:
    """Every case on its architectures; `pattern` (a regular expression) searches "kernel,variant,target"."""
    cases = [case for subject in SUBJECTS for case in subject.cases()]
    pairs = [(case, arch) for case in cases for arch in case.targets]
    return [(case, arch) for case, arch in pairs if re.search(pattern, f"{case.kernel},{case.variant},{arch}")]


def compile_case(case: Case, arch: str) -> Any:
    """The compiled kernel, specialised as a launch with such arguments specialises it."""
    kernel, subject = KERNELS[case.kernel]
    tile_sizes, options = subject.launch_options(case, arch)
    constants: dict[str, Any] = case.constants | tile_sizes
    blocks = {name: constants.pop(f"{name}_BLOCK") for name in case.descriptors}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for position, name in enumerate(kernel.arg_names):
        if name in case.pointers:
            signature[name] = "*" + case.pointers[name]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif name in case.descriptors:
            signature[name] = f"tensordesc<{case.descriptors[name]}{list(blocks[name])}>"
        elif name.endswith(("_ptr", "_desc")):
            constants[name] = None
        elif name in case.unit:
            constants[name] = 1
        elif kernel.params[position].annotation_type:
            signature[name] = kernel.params[position].annotation_type
        elif name not in constants:
            signature[name] = "i32"
            if case.aligned and not kernel.params[position].do_not_specialize:
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
    instruction = next((name for name in set(MATRIX_INSTRUCTIONS.values()) if name in assembly), "")
    shared = compiled.metadata.shared
    line = Resources(triton.__version__, case.kernel, case.variant, arch, registers, stack, shared, instruction)
    problems = []
    if stack > case.max_stack:
        problems.append(f"spills {stack} bytes a thread, {case.max_stack} are allowed")
    if shared > _tiles.SHARED_MEMORY_LIMIT[arch]:
        problems.append(f"takes {shared} bytes of shared memory, there are {_tiles.SHARED_MEMORY_LIMIT[arch]}")
    if case.matrix and instruction != MATRIX_INSTRUCTIONS[arch]:
        problems.append(f"multiplies with {instruction or 'no matrix instruction'}, not {MATRIX_INSTRUCTIONS[arch]}")
    if case.matrix and arch == "sm_90":
        problems += _hopper_problems(_cuobjdump("-sass", compiled.asm["cubin"]), bool(case.descriptors))
    if re.search(r"\bv_\w+_f64" if amd else r"\.f64\b", assembly) and not case.float64:
        problems.append("computes in float64")
    if case.constants.get("NARROW_ALIAS") and not _barrier_between_loads_and_stores(assembly, amd):
        problems.append("no barrier between the loads and the stores of an iteration")
    return line, problems


def _hopper_problems(sass: str, bulk: bool) -> list[str]:
    """What ptxas made of wgmma and of bulk copies."""
    problems = []
    if bulk and "UTMALDG" not in sass:
        problems.append("does not copy its tiles in bulk, through tensor descriptors")
    order = "".join("".join(groups) for groups in re.findall(r"(H)GMMA|WARPGROUP.DEPBAR.LE gsb(0), 0x0|(B)RA", sass))
    if "H0H" in order:
        problems.append("waits for every single wgmma: something else touches the accumulator in the loop")
    return problems


def _nvidia_resources(cubin: bytes) -> tuple[int, int]:
    report = _cuobjdump("--dump-resource-usage", cubin)
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _cuobjdump(what: str, cubin: bytes) -> str:
    """By the tools that ship inside the Triton wheel."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}  # it calls nvdisasm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [next(map(str, tools.glob("cuobjdump*"))), what, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def _amd_resources(assembly: str) -> tuple[int, int]:
    usage = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", assembly))
    return int(usage["vgpr_count"]), int(usage["private_segment_fixed_size"])


def _barrier_between_loads_and_stores(assembly: str, amd: bool) -> bool:
    """Whether, in the order of the code, a barrier stands between each run of 16-byte loads and the next stores."""
    pattern = (
        r"global_(l)oad_dwordx4|s_(b)arrier|global_(s)tore_dwordx4"
        if amd
        else r"(l)d\.global\.v4|(b)ar\.sync|(s)t\.global\.v4"
    )
    order = "".join("".join(groups) for groups in re.findall(pattern, assembly))
    return {"l", "s"} <= set(order) and "ls" not in order


def table(pattern: str, processes: int) -> list[tuple[Resources, list[str]]]:
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return sorted(pool.imap_unordered(measure, jobs(pattern)), key=lambda line: line[0].key)


def read_table(path: Path) -> list[Resources]:
    kinds = {f.name: int if f.type == "int" else str for f in fields(Resources)}
    with path.open(newline="") as file:
        return [Resources(**{name: kinds[name](text) for name, text in line.items()}) for line in csv.DictReader(file)]


def update_table(path: Path, pattern: str, lines: list[Resources]) -> None:
    """Replace the lines of this Triton version that `pattern` matches."""
    kept = [
        line
        for line in (read_table(path) if path.exists() else [])
        if line.triton != triton.__version__ or not re.search(pattern, ",".join(line.key[1:]))
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Resources)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(line) for line in sorted(kept + lines, key=lambda line: line.key))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="", metavar="REGEX", help='cases to compile, found in "kernel,variant,target"'
    )
    parser.add_argument("--update", type=Path, help="CSV file whose lines of this Triton version are replaced")
    parser.add_argument("--json", type=Path, help="file for the lines with their problems")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    measured = table(arguments.only, arguments.processes)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(line) | {"problems": problems} for line, problems in measured]))
    if arguments.update is not None:
        update_table(arguments.update, arguments.only, [line for line, _ in measured])
    if arguments.json is None and arguments.update is None:
        for line, problems in measured:
            print(*asdict(line).values(), *problems, sep=",")
    failed = [f"{line.key}: {', '.join(problems)}" for line, problems in measured if problems]
    sys.exit("\n".join(failed) if failed else 0)


if __name__ == "__main__":
    main()
