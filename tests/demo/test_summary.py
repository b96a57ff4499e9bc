import dataclasses
import io
import shlex
import sys

import pytest

from fastalign.cli.flags import parse_argv
from fastalign.demo import DemoSettings
from fastalign.demo.evaluation import Estimate
from fastalign.demo.summary import COLUMNS, cell, conclusion, next_commands, score_table, verdict


def commands(text):
    """The shell commands in a text, each as a list of words."""
    joined = text.replace(" \\\n", " ")
    return [shlex.split(line) for line in joined.splitlines() if line.startswith("  ")]


def test_the_commands_are_taken_by_the_command_line(tmp_path):
    from fastalign.trainers import DPOConfig

    folder = tmp_path / "a folder"
    dpo, demo = commands(next_commands(DemoSettings(output_dir=f"{folder}/")))
    assert dpo[1] == "dpo"
    flags = {name: words[0] for name, words in parse_argv(dpo[2:]).items()}
    assert set(flags) <= {field.name for field in dataclasses.fields(DPOConfig)}
    assert flags["dataset_name"] == f"{folder}/preferences.jsonl"
    assert demo[1] == "demo"
    flags = {name: words[0] for name, words in parse_argv(demo[2:]).items()}
    assert set(flags) <= {field.name for field in dataclasses.fields(DemoSettings)}
    assert float(flags["length_alpha"]) == DemoSettings().alpha / 2


def test_command_lines_fit_a_terminal():
    assert all(len(line) <= 80 for line in next_commands(DemoSettings()).splitlines() if line.startswith("  "))


@pytest.mark.parametrize(
    ("argv0", "found", "shown"),
    [
        ("/opt/bin/fastalign", "/opt/bin/fastalign", "fastalign"),
        ("/usr/lib/pytest", None, "fastalign"),
        (".venv/bin/fastalign", None, ".venv/bin/fastalign"),
    ],
)
def test_the_program_is_named_as_it_was_started(monkeypatch, argv0, found, shown):
    monkeypatch.setattr(sys, "argv", [argv0])
    monkeypatch.setattr("shutil.which", lambda name: found)
    assert all(words[0] == shown for words in commands(next_commands(DemoSettings())))


def with_scores(result, **figures):
    """`result` with other mean lengths and gold rewards: name=(length, gold)."""
    scores = dict(result.scores)
    for name, (length, gold) in figures.items():
        name = name.replace("_", "-")
        scores[name] = dataclasses.replace(scores[name], length=Estimate(length, 1.0), gold=Estimate(gold, 0.01))
    return dataclasses.replace(result, scores=scores)


def test_the_verdict_says_what_was_found(tiny_demo):
    result, _ = tiny_demo
    shorter = with_scores(result, DPO=(40.0, 0.8), R_DPO=(20.0, 0.84))
    assert verdict(shorter) == "R-DPO's answers are 50% shorter than DPO's, with 105.0% of its gold reward."
    longer = with_scores(result, DPO=(20.0, 0.8), R_DPO=(25.0, 0.4))
    assert verdict(longer) == "R-DPO's answers are 25% longer than DPO's, with 50.0% of its gold reward."
    assert "nan" in verdict(with_scores(result, DPO=(20.0, 0.0)))


def test_the_conclusion_says_where_things_are(tiny_demo):
    result, _ = tiny_demo
    assert f"Report: {result.report}" in conclusion(result)
    assert "matplotlib is not installed" in conclusion(dataclasses.replace(result, plot=None))


def test_the_table_fits_80_characters_with_every_name(tiny_demo):
    from rich.console import Console

    result, _ = tiny_demo
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(score_table(result.scores.values()))
    text = console.export_text()
    for name, score in result.scores.items():
        line = next(line for line in text.splitlines() if line.split()[:1] == [name])
        assert cell(score, COLUMNS[0]) in line
        assert cell(score, COLUMNS[4]) in line


def test_cells(tiny_demo):
    result, _ = tiny_demo
    score = dataclasses.replace(
        result.scores["DPO"], gold=Estimate(0.8765, 0.0123), wins=Estimate(0.75, 0.0125), kl=Estimate(3.21, 0.1)
    )
    by_field = {column.field: cell(score, column) for column in COLUMNS}
    assert by_field["gold"] == "0.876 ± 0.012"
    assert by_field["wins"] == "75.0 ± 1.2"
    assert by_field["kl"] == "3.21 ± 0.10"
    assert cell(result.scores["SFT"], COLUMNS[1]) == "–"
