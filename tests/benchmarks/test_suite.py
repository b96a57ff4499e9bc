"""The suite on the CPU, at tiny sizes: all kinds of cells, what it does about failures, and how it goes on."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib")

FAULTY = """
import os
from cells import protected

def run(cell, tell, skip):
    rows = []
    for name in cell.settings["providers"]:
        row = {"provider": name, "error": skip.get(name, "")}
        rows.append(row)
        if row["error"]:
            continue
        tell(name)
        actions = {"dies": lambda: os._exit(3), "raises": lambda: 1 / 0, "works": lambda: row.update(pid=os.getpid())}
        row["error"] = protected(actions[name]) or ""
    return rows
"""


def rows_of(folder: Path, kind: str) -> list[dict[str, str]]:
    (path,) = folder.rglob(f"suite_{kind}.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def suite(bench, tmp_path):
    """suite(*arguments) -> (exit status, what it printed), with results in tmp_path."""
    module = bench("suite")

    def call(*arguments: str, worker=None) -> tuple[int, str]:
        printed: list[str] = []
        options = module.arguments(["--device", "cpu", "--results", str(tmp_path), *arguments])
        made = worker or bench("cells.worker").Worker("cpu", threads=1, log=tmp_path / "suite.log")
        try:
            status = module.run(options, module.chosen(options), made, printed.append)
        finally:
            if worker is None:
                made.stop()
        return status, "\n".join(printed)

    return call


def test_it_runs_end_to_end_and_only_once(suite, tmp_path):
    chosen = "--small", "--cells", "ppo/(64.*all/random$|tiny)|sft/128|rows|scans"
    status, said = suite(*chosen)
    assert status == 0, said
    numerics = rows_of(tmp_path, "numerics")
    assert not [row for row in numerics if row["error"]]
    assert {row["dtype"] for row in numerics if "/head/" in row["cell"]} == {"float32", "bfloat16", "float16"}
    head = {row["provider"]: row for row in rows_of(tmp_path, "head") if "/ppo/" in row["cell"]}
    for name in ("naive", "fastalign", "fastalign streamed", "fastalign 0.3 GB"):
        assert float(head[name]["over_gemms"]) > 0
    assert float(head["fastalign"]["planned_mib"]) > 0
    assert float(head["fastalign"]["difference"]) < 1e-4
    missing = [row for row in head.values() if row["error"].startswith("not installed")]
    assert all(not row["seconds"] for row in missing)
    assert {row["subject"] for row in rows_of(tmp_path, "roofs")} == {"rows", "scans"}
    steps = {row["provider"]: row for row in rows_of(tmp_path, "steps")}
    assert float(steps["fastalign"]["loss"]) == pytest.approx(float(steps["naive"]["loss"]), abs=1e-5)
    assert {path.name for path in tmp_path.rglob("*.svg")} == {"suite_time.svg", "suite_memory.svg", "suite_steps.svg"}

    before = {path: path.read_bytes() for path in tmp_path.rglob("*.csv")}
    device = next(iter(before)).parent.name
    status, said = suite(*chosen, worker=SimpleNamespace(start=lambda: {"name": device, "driver": ""}))
    assert status == 0
    counts = re.search(r"(\d+) cells, (\d+) of them finished before", said)
    assert counts[1] == counts[2] != "0"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.csv")} == before


@pytest.fixture
def cell(bench):
    def make(name: str, *providers: str, module: str = "cells.head"):
        return bench("cells").Cell(module, name, 1, 1.0, 0.0, {"providers": providers})

    return make


def test_a_provider_that_raises_or_ends_the_process_is_a_row(bench, cell, tmp_path, monkeypatch):
    (tmp_path / "faulty_cells.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(str(tmp_path))
    worker = bench("cells.worker").Worker("cpu", threads=1, log=tmp_path / "suite.log")
    try:
        rows = worker.run(cell("a", "works", "raises", "dies", module="faulty_cells"), limit=60)
        (again,) = worker.run(cell("b", "works", module="faulty_cells"), limit=60)
    finally:
        worker.stop()
    found = {row["provider"]: row for row in rows}
    assert found["works"]["error"] == ""
    assert found["raises"]["error"] == "ZeroDivisionError: division by zero"
    assert found["dies"]["error"] == "the process ended with status 3"
    assert again["pid"] == found["works"]["pid"]  # a process serves many cells


class Answers:
    """In place of a worker: rows at once; a name in `raises` raises."""

    def __init__(self, wrong: str = "", raises: dict[str, BaseException] | None = None) -> None:
        self.wrong, self.raises, self.ran = wrong, raises or {}, []

    def start(self) -> dict[str, str]:
        return {"name": "device", "driver": "1"}

    def run(self, cell, limit: float) -> list[dict[str, object]]:
        if cell.name in self.raises:
            raise self.raises[cell.name]
        self.ran.append(cell.name)
        return [{"provider": "p", "check": "c", "error": self.wrong if cell.kind == "numerics" else ""}]


@pytest.fixture
def run(bench, tmp_path):
    module = bench("suite")

    def call(cells, worker, *arguments: str) -> tuple[int, str]:
        printed: list[str] = []
        options = module.arguments(["--device", "cpu", "--results", str(tmp_path), *arguments])
        return module.run(options, cells, worker, printed.append), "\n".join(printed)

    return call


def test_an_interrupted_run_goes_on_where_it_stopped(run, cell):
    cells = [cell("one"), cell("two"), cell("three")]
    stopped = Answers(raises={"two": KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        run(cells, stopped)
    status, said = run(cells, second := Answers())
    assert (status, stopped.ran, second.ran) == (0, ["one"], ["two", "three"])
    assert "3 cells, 1 of them finished before" in said
    assert run(cells, third := Answers())[0] == 0
    assert third.ran == []
    run(cells, fresh := Answers(), "--fresh")
    assert fresh.ran == ["one", "two", "three"]


def test_results_of_other_sources_are_not_continued(run, cell, monkeypatch, bench):
    cells = [cell("one")]
    run(cells, Answers())
    monkeypatch.setattr(bench("harness"), "code_digest", lambda: "changed")
    run(cells, kept := Answers(), "--keep")
    run(cells, again := Answers())
    assert (kept.ran, again.ran) == ([], ["one"])


def test_time_that_is_up_leaves_the_rest(run, cell):
    status, said = run([cell("one"), cell("two")], none := Answers(), "--minutes", "0")
    assert (status, none.ran) == (0, [])
    assert "2 cells remain, about 0:02" in said


def test_nothing_is_timed_while_numerics_fail(run, cell):
    cells = [cell("n", module="cells.numerics"), cell("one")]
    status, said = run(cells, worker := Answers(wrong="AssertionError: too far"))
    assert (status, worker.ran) == (1, ["n"])
    assert "WRONG n: 1 checks, c: AssertionError: too far" in said
    assert run(cells, later := Answers(wrong="unused"))[0] == 1  # the row is remembered
    assert later.ran == []
    assert run(cells, anyway := Answers(), "--unchecked")[0] == 0
    assert anyway.ran == ["one"]


def test_a_dry_run_lists_without_measuring(bench, tmp_path, capsys):
    assert bench("suite").main(["--device", "cuda", "--dry-run", "--tier", "1", "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "head/ppo/8192x4096x131072/all/random" in printed
    assert "numerics/head/triton/bfloat16/2048x4096x128256" in printed
    assert not list(tmp_path.rglob("*.csv"))
