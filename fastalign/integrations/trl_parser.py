"""TRL's argument parser for scripts that take fastalign's configs beside TRL's own dataclasses."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
from collections.abc import Iterable
from typing import Any


@functools.cache
def parser_class() -> type:
    """The class `TrlParser`, made when it is first asked for, since its base is TRL's."""
    base: Any = importlib.import_module("trl").TrlParser

    class TrlParser(base):
        """`trl.TrlParser`, in which fastalign's configs leave to TRL's ScriptArguments and ModelConfig what is theirs.

        Both have `dataset_name`, `model_name_or_path`, `use_peft` and others, which one command line cannot hold twice.
        The flag fills TRL's dataclass, as in a script whose trainer is TRL's; the config's field keeps its default.
        """

        def __init__(self, dataclass_types: Any = None, **kwargs: Any) -> None:
            given = [dataclass_types] if isinstance(dataclass_types, type) else list(dataclass_types or ())
            super().__init__(_yielding(given), **kwargs)

    return TrlParser


def _yielding(types: Iterable[type]) -> list[type]:
    """The types, fastalign's without the flags that another one has too."""
    types = list(types)
    ours = [kind.__module__.split(".")[0] == "fastalign" for kind in types]
    theirs = {
        field.name for kind, own in zip(types, ours, strict=True) if not own for field in dataclasses.fields(kind)
    }
    return [_without(kind, theirs) if own else kind for kind, own in zip(types, ours, strict=True)]


def _without(kind: Any, names: set[str]) -> type:
    """Stands in for `kind` where parsers look at its fields, and makes instances of it."""
    shown = {}
    for name, field in kind.__dataclass_fields__.items():
        field = copy.copy(field)
        if name in names:
            field.init = False  # parsers pass over it
        shown[name] = field
    members = {
        "__dataclass_fields__": shown,
        "__module__": kind.__module__,
        "__new__": lambda _, **settings: kind(**settings),
    }
    return type(kind.__name__, (kind,), members)
