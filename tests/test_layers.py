"""The rules of the house that a program can check: who imports whom, who reads the environment, how long a file is.

CONTRIBUTING.md gives the rules in words and their reasons.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# layer -> the layers that it may import, besides itself
MAY_IMPORT: dict[str, set[str]] = {
    "types": set(),
    "kernels": set(),
    "ops": {"types", "kernels"},
    "losses": {"types"},
    "linear": {"types", "ops", "losses"},
    "data": {"types"},
    "models": {"types"},
    "reference": {"types", "ops", "data", "models"},
    "integrations": {"types", "ops", "losses", "linear", "models"},
    "rollouts": {"types", "models", "reference"},  # reference: one way to score sequences
    "planning": {"types", "ops", "models"},
    "trainers": {"types", "ops", "losses", "linear", "data", "models", "reference", "rollouts", "planning"},
}
MAY_IMPORT["doctor"] = {*MAY_IMPORT} - {"kernels", "demo", "cli"}
MAY_IMPORT["demo"] = {*MAY_IMPORT} - {"kernels"}
MAY_IMPORT["cli"] = {*MAY_IMPORT} - {"kernels"}

# The numerical core knows torch and nothing else of the outside world.
MAY_IMPORT_FROM_OUTSIDE = {
    "types": {"torch"},
    "kernels": {"torch", "triton"},
    "ops": {"torch", "triton", "numpy"},
    "losses": {"torch"},
    "linear": {"torch"},
}

MAX_FILE_LINES = 320
MAX_FUNCTION_LINES = 70  # without the docstring


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


LIBRARY = [path for path in python_files("fastalign", "kernels") if path != ROOT / "fastalign/__init__.py"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def layer_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "kernels" if parts[0] == "kernels" else parts[1]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import in the file, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 1 and layer_of(path) == "kernels":  # its files know each other, and nothing of fastalign
                module = "fastalign.kernels" + (f".{node.module}" if node.module else "")
            else:
                assert node.level == 0, f"{name_of(path)}:{node.lineno}: imports are absolute in this house"
                module = str(node.module)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_imports_point_downwards(path: Path):
    layer = layer_of(path)
    for line, name in imports(path):
        top, *rest = name.split(".")
        where = f"{name_of(path)}:{line}: {layer} imports {name}"
        if top == "fastalign":
            imported = rest[0] if rest else ""
            if imported == "__version__":
                continue
            assert imported in MAY_IMPORT, f"{where}; import a public name from the module that defines it"
            assert imported == layer or imported in MAY_IMPORT[layer], (
                f"{where}; it may import {sorted(MAY_IMPORT[layer])}"
            )
        elif layer in MAY_IMPORT_FROM_OUTSIDE and top not in sys.stdlib_module_names:
            assert top in MAY_IMPORT_FROM_OUTSIDE[layer], (
                f"{where}; from outside it may import {sorted(MAY_IMPORT_FROM_OUTSIDE[layer])}"
            )


def test_every_layer_has_its_rule():
    folders = {path.parent.name for path in (ROOT / "fastalign").glob("*/__init__.py")}
    modules = {path.stem for path in (ROOT / "fastalign").glob("*.py")} - {"__init__"}
    assert folders | modules <= set(MAY_IMPORT)


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_environment_and_capability_are_read_in_one_place(path: Path):
    if path == ROOT / "fastalign/ops/backends.py":
        pytest.skip("this is the one place")
    forbidden = {"environ", "getenv", "get_device_capability", "get_device_properties"}
    for node in ast.walk(ast.parse(path.read_text())):
        names = {node.attr} if isinstance(node, ast.Attribute) else set()
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
        assert not names & forbidden, (
            f"{name_of(path)}:{getattr(node, 'lineno', 0)}: ask fastalign.ops.backends instead"
        )


# `.item()` and `.cpu()` stop the host until the device has caught up; these read host tensors, or are documented.
HOST_READS = {
    "fastalign/ops/groups.py": 3,  # cu_seqlens and groups are host tensors; targets are searched where rows are missing
    "fastalign/ops/linear_loss.py": 1,  # grad_output == 1, asked of CPU tensors only
}
NUMERICAL = [path for path in LIBRARY if layer_of(path) in ("ops", "losses", "linear", "kernels")]


@pytest.mark.parametrize("path", NUMERICAL, ids=name_of)
def test_no_host_synchronisation_in_ops_and_losses(path: Path):
    calls = [
        f"{name_of(path)}:{node.lineno}: .{node.func.attr}()"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("item", "cpu")
    ]
    assert len(calls) <= HOST_READS.get(name_of(path), 0), calls


SOURCES = [
    *python_files("fastalign", "kernels", "tests", "benchmarks", "examples"),
    *sorted(path for suffix in ("h", "cpp", "cuh", "cu") for path in (ROOT / "csrc").rglob(f"*.{suffix}")),
]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_are_short_or_say_why(path: Path):
    lines = path.read_text().splitlines()
    if len(lines) > MAX_FILE_LINES:
        assert "long:" in lines[0], (
            f"{name_of(path)} has {len(lines)} lines; split it, or begin its first line's reason with 'long:'"
        )


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_functions_are_short(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
            assert length <= MAX_FUNCTION_LINES, f"{name_of(path)}:{node.lineno}: {node.name} has {length} lines"


def test_every_folder_is_a_package():
    """setup.py finds packages by their __init__.py; tests/test_wheel.py has what is installed."""
    folders = {path.parent for path in (ROOT / "fastalign").rglob("*.py")}
    assert not {str(folder) for folder in folders if not (folder / "__init__.py").exists()}
    assert not list((ROOT / "kernels").glob("*/")) or {p.name for p in (ROOT / "kernels").glob("*/")} <= {
        "__pycache__",
        "tiles",
    }


def test_our_kernels_folder_does_not_shadow_the_package_of_that_name():
    """transformers imports Hugging Face's `kernels` if it can; from the root of a checkout it finds our folder."""
    assert (ROOT / "kernels/__init__.py").read_text() == ""
    code = "import sys; sys.path.insert(0, ''); from transformers import Trainer; print(Trainer.__name__)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "Trainer", result.stderr


def test_pytest_never_puts_the_root_on_the_path():
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not (ROOT / "conftest.py").exists()
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert "--import-mode=importlib" in options["addopts"]
