"""What the documents show works: examples run, the configuration is one, links and commands lead somewhere."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", [pytest.param(code, id=code.split("\n", 1)[0]) for code in blocks("python")])
def test_python_examples_run(code):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue().strip()


def test_there_is_an_example_for_each_user():
    assert len(blocks("python")) == 3  # the first kind's has one for tensors and one for models
    assert len(blocks("yaml")) == 1


def test_the_configuration_is_a_dpo_config(tmp_path):
    from fastalign import DPOConfig
    from fastalign.cli.flags import collect
    from fastalign.cli.settings import config_fields, typed

    path = tmp_path / "run.yaml"
    path.write_text(blocks("yaml")[0])
    raw = collect(["--config", str(path), "--beta", "0.2"], set(config_fields(DPOConfig)), "dpo")
    config = DPOConfig(**typed(DPOConfig, raw | {"output_dir": raw["output_dir"]._replace(value=str(tmp_path))}))
    assert config.beta == 0.2
    assert config.learning_rate == 5e-7


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(document):
    text = document.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith(("http://", "https://", "#")):
            assert (document.parent / target.split("#")[0]).exists(), f"{document.name} links {target}"
    for path in re.findall(r"`((?:fastalign|tests|benchmarks|docs|kernels|csrc)/[\w./-]*)`", text):
        if "<" not in path:
            assert (ROOT / path).exists(), f"{document.name} names {path}"


def commands(text: str) -> Iterator[list[str]]:
    """The words of every indented line and code span, without comments and leading NAME=value."""
    for indented, span in re.findall(r"^    (.+)$|`([^`\n]+)`", text, re.MULTILINE):
        words = (indented or span).split("#")[0].split()
        yield words[1:] if words and re.match(r"[A-Z_]+=", words[0]) else words


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_exist(document):
    from fastalign.cli import COMMANDS

    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands(document.read_text()):
        program, argument = words[0].rpartition("/")[2] if words else "", words[1] if len(words) > 1 else ""
        if program == "make" and argument:
            assert argument in targets, f"{document.name}: {' '.join(words)}"
        if program == "fastalign" and re.fullmatch("[a-z]+", argument):
            assert argument in COMMANDS, f"{document.name}: {' '.join(words)}"
        if program == "python" and argument.endswith(".py"):
            assert (ROOT / argument).exists(), f"{document.name}: {' '.join(words)}"


def test_the_results_are_what_the_report_writes():
    report = subprocess.run(
        [sys.executable, "benchmarks/report.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    begin, end = "<!-- results: begin; written by benchmarks/report.py -->", "<!-- results: end -->"
    block = README.split(begin)[1].split(end)[0]
    assert block.strip() == report.stdout.strip(), "run benchmarks/report.py --write"
