"""argv and a YAML file → raw settings by name, checked against the known names.

Everything here happens before torch or transformers is imported, so that a typo is answered at once.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple


class UsageError(ValueError):
    """A command line or configuration file that cannot be taken as it is."""


class Failure(Exception):
    """A command did its work and the answer is no: one line, exit status 1."""


class Stopped(Exception):
    """SIGTERM ended a command before its work was done: one line, exit status 143."""


class Raw(NamedTuple):
    """A setting as it was given. From the command line `value` is the list of its words (none for a bare flag)."""

    value: Any
    source: str  # "the command line", or the file's name
    words: bool = False


def suggestion(name: str, known: Iterable[str], prefix: str = "") -> str:
    """' (did you mean …?)', or nothing when no known name is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


def parse_argv(argv: list[str]) -> dict[str, list[str]]:
    """`--name word …`, `--name=word` and bare `--name`, in order; dashes inside a name count as underscores.

    Raises:
        UsageError: a word that belongs to no flag, a flag given twice, or a single dash before a name.
    """
    flags: dict[str, list[str]] = {}
    current: list[str] | None = None
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if not name:
                raise UsageError(f"{word!r} is not a flag; flags are written --name value")
            if name in flags:
                raise UsageError(f"--{name} is given twice")
            current = flags[name] = [value] if equals else []
            if equals:
                current = None  # --name=value takes no further words
        elif re.match(r"-[A-Za-z]", word):
            raise UsageError(
                f"unknown flag {word!r}; flags have two dashes (a value may start with one: --name={word})"
            )
        elif current is None:
            raise UsageError(f"unexpected argument {word!r}; settings are written --name value")
        else:
            current.append(word)
    return flags


def check_known(flags: Iterable[str], known: Collection[str], command: str) -> None:
    """Raise UsageError for the flags that a command without a configuration file does not have."""
    unknown = [f"unknown flag --{name}{suggestion(name, known, '--')}" for name in flags if name not in known]
    if unknown:
        raise UsageError("; ".join(unknown) + f"; see `fastalign {command} --help`")


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The flat mapping in a YAML file.

    Raises:
        UsageError: no such file, invalid YAML, a key given twice, or something other than a mapping of names.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """SafeLoader lets the last of two equal keys win; here that is an error."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            if twice := sorted(key for key, count in keys.items() if count > 1):
                raise UsageError(f"{path}: {', '.join(twice)} is given twice")
            return super().construct_mapping(node, deep)

    try:
        settings = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {path}: not a UTF-8 text file") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except UsageError:
        raise
    except RecursionError as error:
        raise UsageError(f"{path}: nested too deep") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        # of the loader's own conversions: a date with a 13th month, `!!int ""`, `!!bool maybe`, `!!timestamp now`
        raise UsageError(f"{path}: a value is not what it is written as ({' '.join(str(error).split())})") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise UsageError(f"{path}: expected `name: value` lines, got {type(settings).__name__}")
    return settings


def collect(argv: list[str], known: Collection[str], command: str) -> dict[str, Raw]:
    """Settings of the `--config` file, then those of the command line over them.

    Raises:
        UsageError: naming every unknown key and flag at once, each with the nearest known name.
    """
    flags = parse_argv(argv)
    config = flags.pop("config", None)
    unknown: list[str] = []
    settings: dict[str, Raw] = {}
    if config is not None:
        if len(config) != 1:
            raise UsageError(f"--config takes one file, got {' '.join(config) or 'none'}")
        for name, value in load_yaml(config[0]).items():
            if name in known:
                settings[name] = Raw(value, config[0])
            else:
                unknown.append(f"unknown key {name!r} in {config[0]}{suggestion(name, known)}")
    for name, words in flags.items():
        positive = name.removeprefix("no_")
        if name in known:
            settings[name] = Raw(words, "the command line", words=True)
        elif name != positive and positive in known and not words:
            settings[positive] = Raw(["false"], "the command line", words=True)
        else:
            unknown.append(f"unknown flag --{name}{suggestion(name, known, '--')}")
    if unknown:
        raise UsageError("; ".join(unknown) + f"; `fastalign {command} --help` lists what there is")
    return settings


# Where names that a package resolves lazily are really defined.
_LAZY_HOMES = {("transformers", "TrainingArguments"): "transformers.training_args"}


def dataclass_field_names(module: str, class_name: str) -> frozenset[str] | None:
    """The `__init__` fields of a dataclass and its bases, read from source without importing anything.

    Returns None where the source cannot be read that way: the caller then imports the class, which takes seconds.
    """
    module = _LAZY_HOMES.get((module, class_name), module)
    tree = _source_tree(module)
    found = None if tree is None else next((n for n in tree.body if _is_class(n, class_name)), None)
    if tree is None or not isinstance(found, ast.ClassDef):
        return None
    names = {
        statement.target.id
        for statement in found.body
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and "ClassVar" not in ast.unparse(statement.annotation)
        and not _is_init_false(statement.value)
    }
    imported = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0
        for alias in node.names
    }
    for base in found.bases:
        if not isinstance(base, ast.Name):
            return None
        base_names = dataclass_field_names(*imported.get(base.id, (module, base.id)))
        if base_names is None:
            return None
        names |= base_names
    return frozenset(names)


def _source_tree(module: str) -> ast.Module | None:
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder).joinpath(*rest)
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return ast.parse(candidate.read_text(encoding="utf-8"))
    return None


def _is_class(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.ClassDef) and node.name == name


def _is_init_false(value: ast.expr | None) -> bool:
    keywords = value.keywords if isinstance(value, ast.Call) else []
    return any(k.arg == "init" and isinstance(k.value, ast.Constant) and k.value.value is False for k in keywords)
