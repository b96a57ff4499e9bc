"""argv and YAML → raw settings, before anything heavy is imported."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path

import pytest

from fastalign.cli.dpo import COMMAND
from fastalign.cli.flags import Raw, UsageError, collect, dataclass_field_names, load_yaml, parse_argv

KNOWN = ["beta", "loss_type", "learning_rate", "max_steps", "bf16", "report_to"]


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(textwrap.dedent(text))
    return str(path)


def test_argv_forms():
    argv = [
        "--beta",
        "0.2",
        "--loss-type=hinge",
        "--bf16",
        "--max_steps",
        "-1",
        "--report_to",
        "tensorboard",
        "trackio",
    ]
    assert parse_argv(argv) == {
        "beta": ["0.2"],
        "loss_type": ["hinge"],
        "bf16": [],
        "max_steps": ["-1"],
        "report_to": ["tensorboard", "trackio"],
    }


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["beta"], "unexpected argument 'beta'"),
        (["--beta=1", "2"], "unexpected argument '2'"),
        (["-beta", "1"], "flags have two dashes"),
        (["--beta", "1", "--beta", "2"], "--beta is given twice"),
        (["--"], "'--' is not a flag"),
    ],
)
def test_argv_that_cannot_be_taken(argv, message):
    with pytest.raises(UsageError, match=message):
        parse_argv(argv)


def test_command_line_wins_over_the_file(tmp_path):
    path = write(tmp_path, "beta: 0.1\nloss_type: sigmoid\n")
    settings = collect(["--config", path, "--beta", "0.2"], KNOWN, "dpo")
    assert settings == {"beta": Raw(["0.2"], "the command line", words=True), "loss_type": Raw("sigmoid", path)}


def test_no_prefix_switches_off():
    assert collect(["--no_bf16"], KNOWN, "dpo") == {"bf16": Raw(["false"], "the command line", words=True)}


def test_every_unknown_name_is_reported_with_the_nearest(tmp_path):
    path = write(tmp_path, "lerning_rate: 1.0e-6\nquux: 1\n")
    with pytest.raises(UsageError) as caught:
        collect(["--config", path, "--bata", "0.2"], KNOWN, "dpo")
    message = str(caught.value)
    assert f"unknown key 'lerning_rate' in {path} (did you mean learning_rate?)" in message
    assert f"unknown key 'quux' in {path};" in message
    assert "unknown flag --bata (did you mean --beta?)" in message
    assert "fastalign dpo --help" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta: 0.1\nbeta: 0.2\n", "beta is given twice"),
        ("- beta\n", "expected `name: value` lines, got list"),
        ("1: 2\n", "expected `name: value` lines"),
        ("beta: [1\n", "not valid YAML.*line 2"),
    ],
)
def test_yaml_that_cannot_be_taken(tmp_path, text, message):
    with pytest.raises(UsageError, match=message) as caught:
        load_yaml(write(tmp_path, text))
    assert "run.yaml" in str(caught.value)


def test_yaml_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match=r"--config .*absent\.yaml: No such file"):
        load_yaml(tmp_path / "absent.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not a UTF-8 text file"):
        load_yaml(binary)
    with pytest.raises(UsageError, match="--config takes one file, got none"):
        collect(["--config"], KNOWN, "dpo")


def test_empty_yaml_has_no_settings(tmp_path):
    assert load_yaml(write(tmp_path, "# nothing\n")) == {}


def test_field_names_from_source_are_those_of_the_class():
    from fastalign.trainers import DPOConfig

    expected = {field.name for field in dataclasses.fields(DPOConfig) if field.init}
    assert dataclass_field_names(*COMMAND.config) == expected


def test_field_names_that_cannot_be_read_from_source():
    assert dataclass_field_names("fastalign.no_such_module", "DPOConfig") is None
    assert dataclass_field_names("fastalign.types", "NoSuchClass") is None
