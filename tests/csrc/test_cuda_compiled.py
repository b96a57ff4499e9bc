"""The CUDA kernels under nvcc, for each architecture: registers and spills against a committed table. Needs no GPU.

After a change of a kernel: python tests/csrc/test_cuda_compiled.py
"""

from __future__ import annotations

import csv
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TABLE = HERE / "cuda_resources.csv"
TARGETS = ("sm_90", "sm_100")
FIELDS = ("nvcc", "kernel", "variant", "target", "registers", "stack")
THREADS, BLOCKS = 256, 3  # of a multiprocessor with 65536 registers
NVCC = shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME') or '/usr/local/cuda'}/bin") or shutil.which("nvcc")
ELEMENTS = {"f": "fp32", "4Bf16": "bf16", "4Fp16": "fp16"}

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc")


@functools.cache
def release() -> str:
    """nvcc's version, major.minor."""
    text = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text)[1]


@functools.cache
def lines() -> list[dict[str, str]]:
    """What ptxas reports of every instance, one line each."""
    found = []
    for target in TARGETS:
        if target == "sm_100" and tuple(map(int, release().split("."))) < (12, 8):
            continue
        with tempfile.TemporaryDirectory() as folder:
            command = [NVCC, "-std=c++17", "-O3", "-fmad=false", "-cubin", f"-arch={target}", "--resource-usage"]
            command += [f"-I{ROOT}/csrc/include", str(ROOT / "csrc/cuda/row_loss_grad.cu"), "-o", f"{folder}/cubin"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        report = re.compile(
            r"Compiling entry function '\S*?\d+(row_\w+?)_kernelI\S*?(f|4Bf16|4Fp16)E?Lb([01])ELb([01])E\S*'.*?"
            r"(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers",
            re.DOTALL,
        )
        for kernel, element, softcap, sums, stack, spilled, registers in report.findall(done.stderr + done.stdout):
            flags = [name for name, on in (("softcap", softcap), ("sums", sums)) if on == "1"]
            variant = " ".join([ELEMENTS[element], "+".join(flags)]).strip()
            numbers = [registers, str(int(stack) + int(spilled))]
            found.append(dict(zip(FIELDS, [release(), kernel, variant, target, *numbers], strict=True)))
    return sorted(found, key=lambda line: tuple(line.values()))


def key(line: dict[str, str]) -> tuple[str, ...]:
    return tuple(line[name] for name in FIELDS[:4])


def test_every_instance_fits_and_none_spills():
    assert {(line["kernel"], line["variant"]) for line in lines()} == {
        ("row_loss_grad", f"{element} {flags}".strip())
        for element in ("fp32", "bf16", "fp16")
        for flags in ("", "softcap", "sums", "softcap+sums")
    }
    for line in lines():
        assert line["stack"] == "0", line
        assert int(line["registers"]) * THREADS * BLOCKS <= 65536, line


def test_no_worse_than_the_committed_table():
    with TABLE.open(newline="") as file:
        committed = {key(line): line for line in csv.DictReader(file) if line["nvcc"] == release()}
    if not committed:
        pytest.skip(f"{TABLE.name} has no lines for nvcc {release()}; the limits are checked all the same")
    assert {key(line) for line in lines()} == set(committed)
    for line in lines():
        assert int(line["registers"]) <= int(committed[key(line)]["registers"]), line


@pytest.mark.long
def test_the_extension_builds_and_loads_without_a_driver(tmp_path):
    """As an installation builds it; on a machine without a GPU it says so instead of failing to load."""
    env = os.environ | {"FASTALIGN_BUILD_EXT": "0", "FASTALIGN_BUILD_CUDA": "1"}
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path),
    ]
    built = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = tmp_path.rglob("_cuda.*")
    code = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('_cuda', sys.argv[1]); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.MAX_COLUMNS, m.why_not(0))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    columns, _, reason = done.stdout.partition(" ")
    assert int(columns) > 400_000
    assert reason.strip()


if __name__ == "__main__":
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines())
