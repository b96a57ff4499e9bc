"""Raw settings → values of the declared types, from YAML and from the command line alike."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from fastalign.cli.values import Mismatch, coerce, describe, takes_many


class Strategy(enum.Enum):
    NO = "no"
    STEPS = "steps"


@pytest.mark.parametrize(
    ("text", "hint", "expected"),
    [
        ("5e-7", float, 5e-7),  # text to YAML 1.1
        ("1", float, 1),
        ("-1", int, -1),
        ("true", bool, True),
        ("0", bool, False),
        ("yes", bool | None, True),
        ("null", float | None, None),
        ("none", int | None, None),
        ("none", str | None, "none"),  # `report_to: none` is a name
        ("null", str | None, None),
        ("0.5", float | None, 0.5),
        ("steps", Strategy | str, "steps"),
        ("STEPS", Strategy | str, "steps"),
        ("a", str | list[str] | None, "a"),
        ("a", list[str] | None, ["a"]),
        ('{"a": 1}', dict[str, Any] | None, {"a": 1}),
        ("file.json", dict | str | None, "file.json"),
        ("runs/x", Path, Path("runs/x")),
        ("error", Literal["error", "skip"], "error"),
    ],
)
def test_text(text, hint, expected):
    value = coerce(text, hint)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("document", "hint", "expected"),
    [
        ("x: 0.2", float, 0.2),
        ("x: 2", float, 2),
        ("x: 5e-7", float, 5e-7),
        ("x: no", Strategy | str, "no"),  # YAML 1.1 reads false
        ("x: false", bool, False),
        ("x: null", float | None, None),
        ("x: [sigmoid, sft]", str | list[str], ["sigmoid", "sft"]),
        ("x: [1, 2.5]", list[float], [1, 2.5]),
        ("x: {a: 1}", dict | str | None, {"a": 1}),
        ("x: off", Literal["off", "min"], "off"),
    ],
)
def test_yaml(document, hint, expected):
    value = coerce(yaml.safe_load(document)["x"], hint)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("abc", float),
        ("1.5", int),
        (1.5, int),
        (True, int),
        (True, float),
        (7, str),  # `run_name: 7` must be quoted
        (None, float),
        ("null", float),
        ("maybe", bool),
        (2, bool),
        ("epochs", Strategy | str),
        (True, Strategy | str),
        ([1], float),
        (["a", "b"], str),
        (["x"], list[float]),
        ("{broken", dict),
        ({"a": 1}, float),
    ],
)
def test_values_that_no_alternative_takes(value, hint):
    with pytest.raises(Mismatch):
        coerce(value, hint)


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (float, "a number"),
        (int | None, "an integer or null"),
        (Strategy | str, "one of no, steps"),
        (None | str | list[str], "null or text or a list of text"),
        (dict | str | None, "a mapping (JSON on the command line) or text or null"),
        (Literal["skip", "error"], "one of skip, error"),
        (bool, "true or false"),
    ],
)
def test_descriptions(hint, words):
    assert describe(hint) == words


def test_choices_take_the_place_of_the_type():
    assert describe(str, ("sigmoid", "ipo")) == "one of sigmoid, ipo"


def test_only_lists_take_several_words():
    assert takes_many(str | list[str] | None)
    assert not takes_many(str | None)
