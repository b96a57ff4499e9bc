"""Raw settings → a config dataclass, its help text, and the file that reproduces a run.

The fields of the dataclass are the flags: name, type, default and `metadata["help"]` come from there and nowhere else.
`metadata["choices"]` (optional) lists the accepted values of a field.
"""

from __future__ import annotations

import dataclasses
import json
import os
import reprlib
import shutil
import textwrap
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastalign.cli.flags import Raw, UsageError
from fastalign.cli.values import Mismatch, alternatives, coerce, describe, takes_many

_SHOWN = reprlib.Repr()  # aliases can make gigabytes of a few lines of YAML: values are shown in part
_SHOWN.maxlevel, _SHOWN.maxstring = 2, 80

CONFIG_FILE = "fastalign_config.yaml"


def config_fields(config_class: type) -> dict[str, dataclasses.Field[Any]]:
    """The fields that `config_class(...)` takes, by name."""
    return {field.name: field for field in dataclasses.fields(config_class) if field.init}


def typed(config_class: type, raw: Mapping[str, Raw]) -> dict[str, Any]:
    """Every raw setting as a value of its field's type.

    Raises:
        UsageError: naming the key, the value, where it was given and what is accepted.
    """
    fields, hints = config_fields(config_class), typing.get_type_hints(config_class)
    return {name: _typed_one(name, setting, hints[name], fields[name]) for name, setting in raw.items()}


def _typed_one(name: str, setting: Raw, hint: Any, field: dataclasses.Field[Any]) -> Any:
    choices = _choices(field)
    accepted = describe(hint, choices)
    where = f"--{name}" if setting.words else f"{setting.source}: {name}"
    value = _unpack(where, setting.value, hint, accepted) if setting.words else setting.value
    try:
        result = coerce(value, hint)
        for item in result if isinstance(result, list) else [result]:
            if choices is not None and item is not None and item not in choices:
                raise Mismatch
    except Mismatch as error:
        detail = f" ({error})" if str(error) else ""
        hint_quotes = "; put it in quotes" if accepted.startswith("text") and not isinstance(value, str) else ""
        shown = _SHOWN.repr(value)
        raise UsageError(f"{where}: {shown} cannot be taken{detail}; accepted: {accepted}{hint_quotes}") from error
    return result


def _unpack(where: str, words: list[str], hint: Any, accepted: str) -> Any:
    """The words after a flag as one value: none switches a bool on, several are a list."""
    if len(words) == 1:
        return words[0]
    if not words and bool in alternatives(hint):
        return True
    if words and takes_many(hint):
        return words
    problem = f"takes one value, got {len(words)}: {_in_part(' '.join(words))}" if words else "needs a value"
    raise UsageError(f"{where} {problem}; accepted: {accepted}")


def _in_part(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:197]}..."


def _choices(field: dataclasses.Field[Any]) -> tuple[Any, ...] | None:
    choices = field.metadata.get("choices")
    return None if choices is None else tuple(choices)


def resolved(config_class: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """What `config_class(**given)` starts from: given values over defaults, before the class derives anything."""
    fields = config_fields(config_class)
    return {name: given[name] if name in given else _default(field) for name, field in fields.items()}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def save(config_class: type, given: Mapping[str, Any], folder: str | Path, command: str) -> Path:
    """Write the resolved configuration, without tokens, to `folder`/fastalign_config.yaml, which `--config` takes."""
    import yaml

    from fastalign import __version__

    values = {name: value for name, value in resolved(config_class, given).items() if not name.endswith("_token")}
    parts = [
        f"# The resolved configuration of a run of fastalign {__version__};"
        f" run it again with: fastalign {command} --config {CONFIG_FILE}\n"
    ]
    for title, names in (
        ("Given on the command line or in a configuration file", [name for name in values if name in given]),
        ("Defaults", [name for name in values if name not in given]),
    ):
        if names:
            body = {name: _plain(values[name]) for name in names}
            parts.append(f"\n# {title}\n{yaml.safe_dump(body, sort_keys=False, allow_unicode=True)}")
    path = Path(folder) / CONFIG_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(parts), encoding="utf-8")
    os.replace(partial, path)
    return path


def _plain(value: Any) -> Any:
    """Enums and paths as the text they stand for, at any depth."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    value = getattr(value, "value", value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def own_fields(config_class: type) -> list[str]:
    """The fields that our classes declare, in the order of the source; transformers' are the inherited ones."""
    fields = config_fields(config_class)
    ours = [cls for cls in config_class.__mro__ if cls is config_class or cls.__module__.startswith("fastalign.")]
    return list(dict.fromkeys(name for cls in ours for name in cls.__annotations__ if name in fields))


def help_text(config_class: type, command: str, summary: str, *, everything: bool = False) -> str:
    """Usage and one entry a field: those of `config_class` itself in full, inherited ones by name, or in full too."""
    fields, hints = config_fields(config_class), typing.get_type_hints(config_class)
    own = own_fields(config_class)
    inherited = [name for name in fields if name not in own]
    lines = [
        f"usage: fastalign {command} [--config FILE.yaml] [--NAME VALUE ...]",
        "",
        *_wrap(summary, ""),
        "",
        *_entry("--config FILE.yaml", "flat `name: value` lines, the names being those below; the command line wins"),
        *_entry("--traceback", "show the Python traceback of an error"),
    ]
    if inherited:
        lines += _entry("--help_all", "describe the fields inherited from transformers' TrainingArguments too")
    lines += ["", f"fields of {config_class.__name__}:"]
    for name in own:
        lines += _field_entry(fields[name], hints[name])
    if inherited:
        lines += ["", "fields of transformers' TrainingArguments:"]
    if everything:
        for name in inherited:
            lines += _field_entry(fields[name], hints[name])
    else:
        lines += _wrap(", ".join(inherited), "  ")
    return "\n".join(lines) + "\n"


def _field_entry(field: dataclasses.Field[Any], hint: Any) -> list[str]:
    text = " ".join(str(field.metadata.get("help", "")).split())
    default = _default(field)
    shown = "" if default is None else f", default {json.dumps(_plain(default))}"
    return _entry(f"--{field.name}", f"{text} [{describe(hint, _choices(field))}{shown}]")


def _entry(flag: str, text: str) -> list[str]:
    return [f"  {flag}", *_wrap(text, "        ")]


def _wrap(text: str, indent: str) -> list[str]:
    width = min(shutil.get_terminal_size().columns, 110)
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False)
