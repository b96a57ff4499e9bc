"""What is given to others: the sdist, the wheel built from it, and both where there is no compiler."""

from __future__ import annotations

import email.message
import email.parser
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build", reason="`build` is not here: pip install '.[dev]'")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
STEM = f"{PROJECT['name']}-{PROJECT['version']}"
COMPILER = shutil.which((sysconfig.get_config_var("CXX") or "c++").split()[0])
EXTENSION = f"fastalign/kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
WITHOUT_COMPILER = {
    "PATH": "/nonexistent",
    **{name: value for name, value in os.environ.items() if name in ("HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH")},
}


def python(*words: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """sdist and wheel, made by `python -m build` from a copy of the checkout, tests, documents and all."""
    tree, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "results")
    for path in ROOT.iterdir():
        if path.is_dir() and path.name in ("fastalign", "kernels", "csrc", "tests", "docs", "benchmarks", "examples"):
            shutil.copytree(path, tree / path.name, ignore=unwanted)
        elif path.is_file() and not path.name.startswith("."):
            shutil.copy(path, tree / path.name)
    env = {**os.environ, "FASTALIGN_BUILD_EXT": "1" if COMPILER else "0"}
    built = python("-m", "build", "--no-isolation", "--outdir", out, tree, env=env)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(dist) -> Path:
    return dist / f"{STEM}.tar.gz"


def sources() -> set[str]:
    """What the wheel is made of, under its installed names."""
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "fastalign").rglob("*.py")}
    kernels = {f"fastalign/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    kernels |= {f"fastalign/kernels/tiles/{path.name}" for path in (ROOT / "kernels/tiles").glob("*.json")}
    return package | kernels | {"fastalign/py.typed"}


def environment(folder: Path, wheel: Path) -> Path:
    """The interpreter of an environment with this wheel. The requirements are those of this environment, whose own
    fastalign is not seen: a path in a .pth file does not read the .pth files there."""
    assert python("-m", "venv", "--without-pip", folder).returncode == 0
    interpreter = folder / "bin/python"
    purelib = folder / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    (purelib / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = ("-m", "pip", "--python", interpreter, "install", "-q", "--no-deps", "--no-index", wheel)
    installed = python(*pip)
    assert installed.returncode == 0, installed.stderr
    return interpreter


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    return environment(tmp_path_factory.mktemp("clean"), wheel)


def smoke(interpreter: Path, backend: str, folder: Path) -> None:
    """.ci/smoke.py in an environment that knows no compiler."""
    env = {"PATH": str(interpreter.parent), "HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    command = [interpreter, "-P", ROOT / ".ci/smoke.py", backend]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"works, on the {backend} backend" in done.stdout


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    about = {name for name in names if name.startswith(f"{STEM}.dist-info/")}
    assert names - about == sources() | ({EXTENSION} if COMPILER else set())
    assert f"{STEM}.dist-info/licenses/LICENSE" in about


def test_the_sdist_holds_what_a_build_needs_and_no_more(sdist):
    with tarfile.open(sdist) as archive:
        names = {member.name.removeprefix(f"{STEM}/") for member in archive if member.isfile()}
    code = {
        str(path.relative_to(ROOT)) for folder in ("fastalign", "kernels") for path in (ROOT / folder).rglob("*.py")
    }
    code |= {str(path.relative_to(ROOT)) for path in (ROOT / "kernels/tiles").glob("*.json")}
    code |= {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    about = {"pyproject.toml", "setup.py", "MANIFEST.in", "constraints.txt", "README.md", "LICENSE", "CHANGELOG.md"}
    made = {name for name in names if name.startswith("fastalign.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert names - made == code | about | {"fastalign/py.typed"}


def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        return email.parser.BytesParser().parsebytes(archive.read(f"{STEM}.dist-info/METADATA"))


def test_the_metadata_are_those_of_the_project(wheel):
    from packaging.metadata import Metadata

    with zipfile.ZipFile(wheel) as archive:
        found = Metadata.from_email(archive.read(f"{STEM}.dist-info/METADATA"), validate=True)
    assert (found.name, str(found.version)) == (PROJECT["name"], PROJECT["version"])
    assert found.license_expression == "Apache-2.0"
    assert found.description_content_type == "text/markdown"
    assert found.description == (ROOT / "README.md").read_text()
    assert sorted(found.provides_extra) == sorted(PROJECT["optional-dependencies"])
    required = {requirement.name for requirement in found.requires_dist if requirement.marker is None}
    assert {"torch", "transformers", "accelerate", "datasets", "peft"} <= required


def test_the_wheel_says_what_it_runs_on(wheel):
    """The extension knows one Python and one platform; it knows no version of torch."""
    from packaging.tags import sys_tags
    from packaging.utils import parse_wheel_filename

    tags = parse_wheel_filename(wheel.name)[3]
    assert tags & {*sys_tags()}
    if COMPILER:
        python_tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
        assert {(tag.interpreter, tag.abi) for tag in tags} == {(python_tag, python_tag)}


def test_extras_do_not_contradict_one_another():
    """One range a package, so that any set of extras has a solution if each has."""
    from packaging.requirements import Requirement

    ranges: dict[str, set[str]] = {}
    for extra, texts in PROJECT["optional-dependencies"].items():
        names = [Requirement(text).name for text in texts]
        assert len({*names}) == len(names), f"{extra} names a package twice"
        for requirement in map(Requirement, texts):
            ranges.setdefault(requirement.name.lower(), set()).add(str(requirement.specifier))
    assert {name: found for name, found in ranges.items() if len(found) > 1 and "" not in found} == {}
    for tools in ("docs",):  # all tools of a contributor are in dev
        assert {*PROJECT["optional-dependencies"][tools]} <= {*PROJECT["optional-dependencies"]["dev"]}


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: the wheel has no extension")
def test_the_wheel_works_where_there_is_no_compiler(installed, tmp_path):
    smoke(installed, "cpu", tmp_path)


def build_without_compiler(sdist: Path, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A wheel in folder/dist from the sdist alone, as pip makes it."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", filter="data")
    command = ("-m", "build", "--no-isolation", "--wheel", "--outdir", folder / "dist", folder / "source" / STEM)
    return python(*command, env=WITHOUT_COMPILER | env)


@pytest.fixture(scope="module")
def pure(sdist, tmp_path_factory) -> tuple[Path, str]:
    """An environment with what the sdist gives where there is no compiler, and what the build said."""
    folder = tmp_path_factory.mktemp("pure")
    built = build_without_compiler(sdist, folder)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    return environment(folder / "clean", wheel), built.stdout + built.stderr


def test_without_a_compiler_the_sdist_installs_and_says_so_in_one_line(pure):
    interpreter, output = pure
    (line,) = [line for line in output.splitlines() if "compiler" in line]
    assert line.startswith("fastalign: C++ kernels left out: no C++ compiler (")
    code = """
import torch
from fastalign.ops import backends
backends.resolve("auto", torch.zeros(1))
print(backends.resolve("auto", torch.zeros(2)).name)
print(backends.available()["cpu"])
"""
    command = [interpreter, "-P", "-c", code]
    done = subprocess.run(command, env={"PATH": ""}, capture_output=True, text=True, check=True)
    name, reason = done.stdout.splitlines()
    assert name == "torch"
    assert done.stderr == f"cpu tensors run on the slower backend 'torch': {reason}\n"
    assert "install with a C++ compiler" in reason


@pytest.mark.long
def test_without_a_compiler_everything_else_works(pure, tmp_path):
    smoke(pure[0], "torch", tmp_path)


def test_a_build_that_insists_on_the_extension_fails_without_it(sdist, tmp_path):
    built = build_without_compiler(sdist, tmp_path, FASTALIGN_BUILD_EXT="1")
    assert built.returncode != 0
    assert "no C++ compiler" in built.stdout + built.stderr
    assert not list((tmp_path / "dist").glob("*.whl"))


CONSUMER = Path(__file__).parent / "consumer.py"

MYPY = """
[mypy]
strict = true
[mypy-transformers.*,accelerate.*,datasets.*,peft.*,pyarrow.*,safetensors.*,tokenizers.*,triton.*,yaml.*]
follow_imports = skip
ignore_missing_imports = true
"""


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not here: pip install '.[dev]'")
def test_type_checkers_see_the_installed_package(installed, tmp_path):
    """py.typed counts: someone else's code is checked in strict mode, and what is wrong in it is found."""
    (tmp_path / "mypy.ini").write_text(MYPY)
    shutil.copy(CONSUMER, tmp_path)
    command = ("-m", "mypy", "--config-file", "mypy.ini", "--python-executable", installed, "consumer.py")
    checked = python(*command, cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
