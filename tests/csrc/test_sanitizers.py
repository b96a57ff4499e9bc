"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_kernels_are_clean_under_the_sanitizers(repository, tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "row_kernels"
    sources = [HERE / "row_kernels.cpp", *sorted((repository / "csrc/cpu").glob("*.cpp"))]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags = ["-std=c++17", "-O1", "-g", *sanitize, "-pthread", "-Wall", "-Wextra", "-Werror"]
    build = subprocess.run(
        [compiler, *flags, f"-I{repository / 'csrc/include'}", *map(str, sources), "-o", str(program)],
        capture_output=True, text=True,
    )  # fmt: skip
    if "cannot find" in build.stderr and "san" in build.stderr:
        pytest.skip(f"{compiler} has no sanitizer runtime")
    assert build.returncode == 0, build.stderr
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "instruction sets" in run.stdout
