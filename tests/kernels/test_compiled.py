"""Every kernel, compiled ahead of time for NVIDIA and AMD architectures: does it fit, does it spill, is it the code
we meant?

No GPU is needed. Compiling runs in a process of its own (`resources.py`), since this one may be interpreting kernels.
After a change of a kernel or its tiles: python tests/kernels/resources.py --update tests/kernels/resources.csv, with
the installed Triton and with the oldest that is supported (resources.py says how).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent
COLUMNS = ("kernel", "variant", "target")


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
def test_covers_every_kernel(lines):
    """Each jitted kernel of the package is compiled; its device functions are, within those that call them."""
    written = set()
    for path in (FOLDER.parents[1] / "kernels").glob("*.py"):
        written |= set(re.findall(r"@triton\.jit(?:\(.*\))?\ndef _(\w+)_kernel\(", path.read_text()))
    assert written
    assert {line["kernel"] for line in lines} == written


def test_code_is_what_was_meant(lines):
    """No spills beyond what a case allows, shared memory that fits, 16-bit products on the architecture's own matrix
    instruction, bulk copies where there are tensor descriptors, no float64, a barrier between loads and stores where a
    16-bit gradient goes over its float32 tile.
    """
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
