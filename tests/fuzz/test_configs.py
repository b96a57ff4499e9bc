"""Configuration files and command lines of any kind: status 2 and one line, or the settings that were written."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from fastalign.cli import main
from fastalign.cli.flags import Raw, load_yaml
from fastalign.cli.settings import config_fields, typed
from fastalign.cli.values import coerce
from fastalign.trainers import DPOConfig, PPOConfig

PIECES = [
    "beta: 0.1",
    "max_steps: 5",
    "a",
    ": ",
    "- ",
    "\n",
    "  ",
    "? ",
    "[",
    "]",
    "{",
    "}",
    "&x ",
    "*x",
    "<<: *x",
    "!!int ''",
]
PIECES += ["!!bool maybe", "!!timestamp now", "2001-13-45", "!!float x", "!!binary é", "!!python/object:os.system {}"]
PIECES += [
    "\0",
    "'",
    '"',
    "|",
    ">",
    "%YAML 9",
    "---",
    "...",
    "1:99",
    "0x",
    "1_",
    ".nan",
    "~",
    "\t",
    "#",
    "!!set {a}",
    "0o9",
]
NAMES = sorted(config_fields(DPOConfig).keys() | config_fields(PPOConfig).keys())

scalar = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
scalar |= st.sampled_from([10**400, "1e400", "1" * 5000, "nan", '{"a":' * 2000, "{}", "none", "auto", ""])
value = st.recursive(
    scalar,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def test_files_of_any_text(fuzz, tmp_path):
    path = tmp_path / "run.yaml"

    def check(parts: list[Any]) -> None:
        path.write_bytes(b"".join(p if isinstance(p, bytes) else p.encode("utf-8", "replace") for p in parts))
        try:
            found = load_yaml(path)
        except ValueError as error:
            assert str(path) in str(error), "the file is not named"  # noqa: PT017
            raise
        assert all(isinstance(key, str) for key in found)

    fuzz(check, st.lists(st.sampled_from(PIECES) | st.text(max_size=5) | st.binary(max_size=4), max_size=8))


@pytest.mark.parametrize("config", [DPOConfig, PPOConfig])
def test_values_of_any_type(fuzz, config):
    fields = config_fields(config)

    def check(name: str, given: Any, words: bool) -> None:
        if name in fields:
            many = [str(item) for item in (given if isinstance(given, list) else [given])]
            typed(config, {name: Raw(many, "the command line", True) if words else Raw(given, "run.yaml")})

    fuzz(check, st.sampled_from(NAMES), value, st.booleans())


def test_files_that_yaml_can_spell(fuzz, tmp_path):
    path = tmp_path / "run.yaml"

    def check(settings: dict[str, Any]) -> None:
        path.write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8", errors="replace")
        load_yaml(path)

    fuzz(check, st.dictionaries(st.sampled_from(NAMES), value, max_size=3))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("beta: [1, 2", "not valid YAML"),
        ("- 1\n- 2", "expected `name: value` lines"),
        ("beta: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("beta: 2001-13-45", "not what it is written as"),
        ("beta: !!int ''", "not what it is written as"),
        ("beta: !!bool maybe", "not what it is written as"),
        ("beta: !!timestamp now", "not what it is written as"),
        ("? []\n: 1\n? []\n: 2", "not valid YAML"),
        ("beta: " + "[" * 1000, "nested too deep"),
        ("beta: 1\nbeta: 2", "beta is given twice"),
        ("\0", "not valid YAML"),
    ],
)  # fmt: skip
def test_bad_files_get_one_line_and_status_2(tmp_path, capsys, text, says):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    assert main(["dpo", "--config", str(path)]) == 2
    _, err = capsys.readouterr()
    assert err.startswith("fastalign dpo: error: ")
    assert err.count("\n") == 1
    assert says in err
    assert str(path) in err


def test_a_line_that_stands_for_gigabytes(tmp_path):
    """Aliases of aliases: a billion values in 300 bytes, which nothing may walk through or print."""
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    path = tmp_path / "run.yaml"
    path.write_text("\n".join(lines), encoding="utf-8")
    assert len(refused_value(load_yaml(path)["a9"])) < 500
    path.write_text("beta: &x [*x]", encoding="utf-8")
    assert len(refused_value(load_yaml(path)["beta"])) < 500


def refused_value(value: Any) -> str:
    with pytest.raises(ValueError, match="cannot be taken") as refused:
        typed(DPOConfig, {"beta": Raw(value, "run.yaml")})
    return str(refused.value)


def test_json_on_the_command_line_that_nests_too_deep():
    with pytest.raises(ValueError, match="not valid JSON"):
        coerce('{"a":' * 200_000, dict)
