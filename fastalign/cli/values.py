"""Raw settings → values of the types that a dataclass field declares.

YAML 1.1 and command lines both hand over text where a number was meant (`5e-7` is text to YAML), and YAML turns `no`
into false where a name was meant (`eval_strategy: no`); one set of rules for both sources straightens that out.
"""

from __future__ import annotations

import contextlib
import enum
import types
import typing
from pathlib import Path
from typing import Any

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_MISSING = object()


class Mismatch(ValueError):
    """A value that none of the accepted types can take."""


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself; `None` for NoneType."""
    members = typing.get_args(hint) if _is_union(hint) else (hint,)
    return tuple(None if member is type(None) else member for member in members)


def takes_many(hint: Any) -> bool:
    """Whether a flag of this type may have several words."""
    return any(_origin(member) is list for member in alternatives(hint))


def describe(hint: Any, choices: tuple[Any, ...] | None = None) -> str:
    """What is accepted, in words: 'a number or null'."""
    if choices is not None:
        return _one_of(choices)
    members = alternatives(hint)
    named = [member for member in members if _is_enum(member)]
    parts = [_describe_one(member) for member in members if not (named and member is str)]
    return " or ".join(dict.fromkeys(parts))


def coerce(value: Any, hint: Any) -> Any:
    """`value` as one of the types of `hint`; the first that takes it as it is wins, then the first that can read it.

    Raises:
        Mismatch: no alternative takes it.
    """
    members = alternatives(hint)
    if value is None or (isinstance(value, str) and _reads_as_none(value, members)):
        if None in members:
            return None
        raise Mismatch
    members = tuple(member for member in members if member is not None)
    if any(_is_enum(member) for member in members):  # `IntervalStrategy | str`: the names are the enum's
        members = tuple(member for member in members if member is not str)
    for member in members:
        result = _exact(value, member)
        if result is not _MISSING:
            return result
    for member in members:
        result = _read(value, member)
        if result is not _MISSING:
            return result
    raise Mismatch


def _exact(value: Any, member: Any) -> Any:
    if member in (bool, int, str, float) and type(value) is member:
        return value
    if member is float and type(value) is int:  # an int is a float to type checkers too, and 10 reads better than 10.0
        return value
    if _origin(member) is dict and isinstance(value, dict):
        return value
    if typing.get_origin(member) is typing.Literal:
        return next((item for item in typing.get_args(member) if type(item) is type(value) and item == value), _MISSING)
    return _MISSING


def _read(value: Any, member: Any) -> Any:
    text = value.strip() if isinstance(value, str) else None
    if member is bool and text is not None:
        return text.lower() in _TRUE if text.lower() in _TRUE + _FALSE else _MISSING
    if member in (int, float) and text is not None:
        for number in (int, member):
            with contextlib.suppress(ValueError):
                return number(text)
    if member is Path and text is not None:
        return Path(value)
    if typing.get_origin(member) is typing.Literal:
        return next((item for item in typing.get_args(member) if _names(item, value)), _MISSING)
    if _is_enum(member):
        return next((item.value for item in member if _names(item.value, value)), _MISSING)
    if _origin(member) is list:
        items = value if isinstance(value, list) else [value]
        inner = (typing.get_args(member) or (Any,))[0]
        return items if inner is Any else [coerce(item, inner) for item in items]
    if _origin(member) is dict and text is not None and text.startswith("{"):
        from fastalign.data.files import parse_json

        try:
            return parse_json(text)
        except ValueError as error:
            raise Mismatch(f"not valid JSON: {error}") from error
    return _MISSING


def _names(item: Any, value: Any) -> bool:
    """Whether `value` spells `item`; YAML 1.1 reads the bare words no, off, yes, on as booleans."""
    if isinstance(value, bool) and isinstance(item, str):
        return item in (("yes", "on") if value else ("no", "off"))
    return str(item).lower() == str(value).strip().lower()


def _reads_as_none(text: str, members: tuple[Any, ...]) -> bool:
    if text.lower() == "none":  # a name to some fields (report_to: none); nothing to a number
        return None in members and not any(m is str or _is_enum(m) for m in members)
    return text in ("null", "~") and None in members


def _describe_one(member: Any) -> str:
    names = {None: "null", bool: "true or false", int: "an integer", float: "a number", str: "text", Path: "a path"}
    if member in names:
        return names[member]
    if _origin(member) is dict:
        return "a mapping (JSON on the command line)"
    if _origin(member) is list:
        inner = typing.get_args(member)
        return f"a list of {describe(inner[0])}" if inner else "a list"
    if _is_enum(member):
        return _one_of(tuple(item.value for item in member))
    if typing.get_origin(member) is typing.Literal:
        return _one_of(typing.get_args(member))
    return f"a {getattr(member, '__name__', member)} (from Python only)"


def _one_of(choices: tuple[Any, ...]) -> str:
    words = [str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in choices]
    return words[0] if len(words) == 1 else f"one of {', '.join(words)}"


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _is_enum(member: Any) -> bool:
    return isinstance(member, type) and issubclass(member, enum.Enum)


def _origin(member: Any) -> Any:
    return typing.get_origin(member) or member
