"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SECONDS = 60


@pytest.fixture(scope="module")
def program(repository, tmp_path_factory):
    """program(name): the path of a program of this folder, compiled with the kernels and the sanitizers."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("sanitized")

    def build(name: str) -> Path:
        sources = [HERE / f"{name}.cpp", *sorted((repository / "csrc/cpu").glob("*.cpp"))]
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        flags = ["-std=c++17", "-O1", "-g", *sanitize, "-pthread", "-Wall", "-Wextra", "-Werror"]
        made = subprocess.run(
            [compiler, *flags, f"-I{repository / 'csrc/include'}", *map(str, sources), "-o", str(folder / name)],
            capture_output=True, text=True,
        )  # fmt: skip
        if "cannot find" in made.stderr and "san" in made.stderr:
            pytest.skip(f"{compiler} has no sanitizer runtime")
        assert made.returncode == 0, made.stderr
        return folder / name

    return build


def test_kernels_are_clean_under_the_sanitizers(program):
    run = subprocess.run([str(program("row_kernels"))], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "instruction sets" in run.stdout


@pytest.mark.long
def test_a_random_campaign(program):
    """Shapes, strides, slabs, targets and numbers of any kind; a case that fails is named by its seed."""
    seed = random.randrange(2**40)
    command = [str(program("campaign")), str(SECONDS), str(seed)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + 120)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[0]) > 100
