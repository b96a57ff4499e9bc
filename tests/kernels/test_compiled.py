"""Every kernel, compiled ahead of time for NVIDIA and AMD architectures: does it fit, does it spill, is it the code
we meant?

No GPU is needed. Compiling runs in a process of its own (`resources.py`), since this one may be interpreting kernels.
After a change of a kernel or its tiles: python tests/kernels/resources.py --update tests/kernels/resources.csv
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fastalign.kernels import _tiles

FOLDER = Path(__file__).parent
COLUMNS = ("kernel", "variant", "target")
# The fused forward with all five optional outputs at once keeps so many row vectors beside its accumulator that a few
# registers spill around the epilogue. Nothing else may spill.
ALLOWED_STACK = {("fused_forward", "rows+bias+all"): 128}


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> list[dict]:
    """The table for the installed Triton: what `resources.py` prints, with its complaints about the code."""
    path = tmp_path_factory.mktemp("resources") / "lines.json"
    command = [sys.executable, str(FOLDER / "resources.py"), "--json", str(path)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert path.exists(), process.stdout + process.stderr
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def committed(lines) -> dict[tuple[str, ...], dict]:
    import csv

    with (FOLDER / "resources.csv").open(newline="") as file:
        table = [line for line in csv.DictReader(file) if line["triton"] == lines[0]["triton"]]
    if not table:
        pytest.skip(f"resources.csv has no lines for Triton {lines[0]['triton']}; the limits are checked all the same")
    return {key(line): line for line in table}


def key(line: dict) -> tuple[str, ...]:
    return tuple(line[column] for column in COLUMNS)


def report(failures: list[str]) -> None:
    assert not failures, "\n" + "\n".join(failures)


@pytest.mark.timeout(900)
def test_covers_every_kernel_and_architecture(lines):
    kernels = {"row_stats", "row_grad", "row_exp", "fused_forward", "merge_splits", "gae"}
    assert {line["kernel"] for line in lines} == kernels
    for kernel in {line["kernel"] for line in lines}:
        targets = {line["target"] for line in lines if line["kernel"] == kernel}
        assert targets >= {"sm_80", "sm_90", "sm_100", "gfx942"}, kernel


def test_shared_memory_fits(lines):
    report([
        f"{key(line)}: {line['shared']} bytes of {_tiles.SHARED_MEMORY_LIMIT[line['target']]}"
        for line in lines
        if line["shared"] > _tiles.SHARED_MEMORY_LIMIT[line["target"]]
    ])  # fmt: skip


def test_registers_do_not_spill(lines):
    def allowed(line: dict) -> int:
        return ALLOWED_STACK.get((line["kernel"], line["variant"].partition(" ")[2]), 0)

    report([f"{key(line)}: {line['stack']} bytes" for line in lines if line["stack"] > allowed(line)])


def test_products_run_on_matrix_units(lines):
    """16-bit products use the architecture's own instruction: wgmma on Hopper, tcgen05 on Blackwell."""
    instructions = {
        "sm_80": "mma.sync",
        "sm_89": "mma.sync",
        "sm_90": "wgmma.mma_async",
        "sm_100": "tcgen05.mma",
        "gfx942": "v_mfma",
    }
    report([
        f"{key(line)}: {line['matrix_instruction'] or 'no matrix instruction'}"
        for line in lines
        if line["kernel"] == "fused_forward"
        and not line["variant"].startswith("fp32")
        and line["matrix_instruction"] != instructions[line["target"]]
    ])  # fmt: skip


def test_code_is_what_was_meant(lines):
    """No float64 anywhere; a barrier between loads and stores where a 16-bit gradient goes over its float32 tile."""
    report([f"{key(line)}: {', '.join(line['problems'])}" for line in lines if line["problems"]])


def test_no_worse_than_the_committed_table(lines, committed):
    failures = []
    for line in lines:
        before = committed.get(key(line))
        if before is None:
            failures.append(f"{key(line)} is not in resources.csv")
            continue
        for column in ("registers", "stack", "shared"):
            if line[column] > int(before[column]):
                failures.append(f"{key(line)}: {column} {before[column]} -> {line[column]}")
    report(failures)


def test_the_committed_table_has_nothing_else(lines, committed):
    report([f"{name} is no longer compiled" for name in committed.keys() - {key(line) for line in lines}])
