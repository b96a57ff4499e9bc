"""The build: the C++ extension is optional, and nothing about building names torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What setup.py reads, with an extension that does not compile."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "csrc/cpu").mkdir(parents=True)
    (tmp_path / "csrc/bindings.cpp").write_text("this is not C++\n")
    (tmp_path / "kernels").mkdir()
    return tmp_path


def build(checkout: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=checkout, env={**os.environ, **env}, capture_output=True, text=True, check=False)


def test_without_a_compiler_the_build_says_so_in_one_line_and_succeeds(checkout):
    result = build(checkout, PATH="/nonexistent", CXX="no-such-compiler")
    assert result.returncode == 0, result.stderr
    assert result.stderr == (
        "fastalign: C++ kernels left out: no C++ compiler (no-such-compiler) was found;"
        " the torch and triton backends work without them\n"
    )


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler")
def test_a_failed_compilation_shows_what_the_compiler_says_and_removes_the_stale_file(checkout):
    stale = checkout / f"kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.write_bytes(b"of other sources")
    os.utime(stale, (0, 0))
    result = build(checkout)
    assert result.returncode == 0, result.stderr
    assert "this is not C++" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("fastalign: C++ kernels left out: ")
    assert not stale.exists()


@pytest.fixture
def toolkit(checkout: Path) -> Path:
    """A CUDA_HOME whose nvcc knows sm_90 alone, notes its arguments, and builds nothing where `broken` exists."""
    (checkout / "csrc/cuda").mkdir()
    (checkout / "csrc/cuda/kernel.cu").write_text("")
    home = checkout / "toolkit"
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin/nvcc"
    nvcc.write_text(
        f"""#!/bin/sh
[ "$1" = --list-gpu-arch ] && echo compute_90 && exit
echo "$*" >> {home}/calls
[ -e {home}/broken ] && echo "this is not CUDA" >&2 && exit 1
while [ "$1" != -o ]; do shift; done
touch "$2"
"""
    )
    nvcc.chmod(0o755)
    return home


def test_the_cuda_kernels_are_built_where_they_are_asked_for(checkout, toolkit):
    result = build(checkout, CUDA_HOME=str(toolkit), FASTALIGN_BUILD_CUDA="1", FASTALIGN_BUILD_EXT="0")
    assert result.returncode == 0, result.stderr
    (call,) = (toolkit / "calls").read_text().splitlines()
    assert "-fmad=false" in call, "a log-prob may come out above zero"
    assert "code=[sm_90,compute_90]" in call
    assert "sm_100" not in call
    assert "torch" not in call.replace(str(checkout), "")
    assert list((checkout / "kernels").glob("_cuda.*"))


def test_cuda_kernels_that_are_asked_for_and_do_not_compile_fail_the_build(checkout, toolkit):
    (toolkit / "broken").touch()
    result = build(checkout, CUDA_HOME=str(toolkit), FASTALIGN_BUILD_CUDA="1", FASTALIGN_BUILD_EXT="0")
    assert result.returncode != 0
    assert "nvcc failed: this is not CUDA" in result.stderr


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="this machine has a GPU to build for")
def test_an_nvcc_without_a_gpu_does_not_slow_an_installation(checkout, toolkit):
    build(checkout, CUDA_HOME=str(toolkit), FASTALIGN_BUILD_EXT="0")
    assert not (toolkit / "calls").exists()


def test_building_does_not_require_torch():
    """A torch requirement here would fetch gigabytes into every isolated build environment."""
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert not any("torch" in requirement for requirement in requires)


def test_no_source_includes_a_torch_header():
    for path in (ROOT / "csrc").rglob("*.*"):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            lines = [line for line in path.read_text().splitlines() if line.lstrip().startswith("#include")]
            assert not any("torch/" in line or "ATen/" in line or "c10/" in line for line in lines), path


def test_every_pinned_package_is_in_the_supported_range():
    """constraints.txt pins what pyproject.toml allows, so that one is not raised without the other."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"]["dev"]]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = {pin.name.lower(): pin for pin in map(Requirement, lines)}
    for requirement in wanted:
        assert requirement.name.lower() in pins, f"{requirement.name} is not pinned in constraints.txt"
        pinned = [spec.version for spec in pins[requirement.name.lower()].specifier]
        assert all(requirement.specifier.contains(version) for version in pinned), f"{requirement} against {pinned}"


def test_the_changelog_is_in_order():
    """[Unreleased] comes first, then dated versions, newest first; the project's is none that came before."""
    from packaging.version import Version

    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    released = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - \d{4}-\d{2}-\d{2}", heading) for heading in headings[1:]]
    assert None not in released, headings
    versions = [Version(found[1]) for found in released if found]
    assert versions == sorted(versions, reverse=True)
    current = Version(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])
    assert all(current >= version for version in versions)


def test_the_citation_is_one():
    import yaml

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == project["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in project["authors"]]
