"""What the package exports, where each name is defined, and what the source says of it."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
from pathlib import Path

# documented under their own names
PACKAGES = ("losses", "ops", "models", "data", "reference", "rollouts", "integrations")
SHARED_CONFIG = "fastalign.trainers.config.TrainerConfig"  # of all trainers: not exported, and yet theirs


@functools.cache
def homes(package: str) -> dict[str, str]:
    """Every public name of a package and the module that defines it, as the package's imports say."""
    module = importlib.import_module(package)
    tree = ast.parse(Path(str(module.__file__)).read_text())
    found = {
        alias.asname or alias.name: str(node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return {name: found.get(name, package) for name in module.__all__ if not name.startswith("__")}


@functools.cache
def documented() -> dict[str, str]:
    """Every name that the reference documents, `fastalign.losses.dpo_loss`, and where its description stands: what the
    package itself exports is described under that name, not under its subpackage's."""
    import fastalign

    top = {name: getattr(fastalign, name) for name, home in homes("fastalign").items() if home != "fastalign"}
    names = {f"fastalign.{name}": f"fastalign.{name}" for name in top}
    for package in PACKAGES:
        module = f"fastalign.{package}"
        for name in homes(module):
            same = name in top and top[name] is getattr(importlib.import_module(module), name)
            names[f"{module}.{name}"] = f"fastalign.{name}" if same else f"{module}.{name}"
    return names | {SHARED_CONFIG: SHARED_CONFIG}


def full_name(code: str, besides: str = "") -> str | None:
    """What `code` in a text refers to, if it is documented: a full name, or the end of exactly one."""
    name = code.removesuffix("()")
    if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", name):
        return None
    names = documented()
    name = name.replace("fastalign.trainers.", "fastalign.", 1)
    found = {names[full] for full in names if full == name or full.endswith(f".{name}")}
    if len(found) != 1 or (target := found.pop()) == besides:
        return None
    return target


def described(package: str, name: str) -> list[str]:
    """Docstring of a function or class; of a constant the string after it, or the comment before it."""
    value = getattr(importlib.import_module(package), name)
    if inspect.isclass(value) or inspect.isroutine(value):
        return (inspect.getdoc(value) or "").split("\n")
    return constant_text(homes(package).get(name, package), name)


@functools.cache
def _tree(module: str) -> tuple[list[str], ast.Module]:
    text = Path(str(importlib.import_module(module).__file__)).read_text()
    return text.split("\n"), ast.parse(text)


def _assignment(module: str, name: str) -> tuple[int, ast.stmt] | None:
    for place, node in enumerate(_tree(module)[1].body):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return place, node
    return None


def constant_text(module: str, name: str) -> list[str]:
    lines, tree = _tree(module)
    found = _assignment(module, name)
    if found is None:
        return []
    place, node = found
    after = tree.body[place + 1] if place + 1 < len(tree.body) else None
    if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
        return inspect.cleandoc(after.value.value).split("\n")
    comments: list[str] = []
    for line in reversed(lines[: node.lineno - 1]):
        if not line.startswith("#"):
            break
        comments.insert(0, line.lstrip("# "))
    trailing = re.search(r"  # (.*)$", lines[node.lineno - 1]) if node.lineno == node.end_lineno else None
    return comments or ([trailing[1]] if trailing else [])


def defined_at(module: str, name: str) -> int:
    for node in ast.walk(_tree(module)[1]):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node.lineno
    found = _assignment(module, name)
    return found[1].lineno if found else 0
