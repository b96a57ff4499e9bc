"""Rows of finished cells in results/<device>/suite_<kind>.csv, and which cells need not run again."""

from __future__ import annotations

import csv
import functools
from pathlib import Path

import harness

from cells import Cell, Row


class Store:
    """Results of one device in a folder.

    same_code: only results of the sources at hand, with the versions at hand, count as finished.
    """

    def __init__(self, folder: Path, *, commit: str | None = None, driver: str = "", same_code: bool = True) -> None:
        self.folder, self.same_code = folder, same_code
        self._given = {"driver": driver} | ({} if commit is None else {"commit": commit})

    @functools.cached_property
    def known(self) -> dict[str, str]:
        """What is written beside every row."""
        return {"code": harness.code_digest(), "versions": harness.versions()} | self._given

    def rows(self, kind: str | None = None) -> list[dict[str, str]]:
        """The newest rows of each cell."""
        found: dict[str, list[dict[str, str]]] = {}
        for path in sorted(self.folder.glob(f"suite_{kind or '*'}.csv")):
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    run = found.setdefault(row["cell"], [])
                    if run and run[-1]["run"] != row["run"]:
                        run.clear()
                    run.append(row)
        return [row for run in found.values() for row in run]

    def finished(self) -> set[str]:
        """Names of cells that need not run again."""
        names = ("code", "versions")
        return {
            row["cell"] for row in self.rows()
            if not self.same_code or all(row[name] == self.known[name] for name in names)
        }  # fmt: skip

    def add(self, cell: Cell, rows: list[Row]) -> None:
        run = 1 + max((int(row["run"]) for row in self.rows() if row["cell"] == cell.name), default=0)
        kept = [{"cell": cell.name, "run": run} | row for row in rows]
        harness.append_rows(f"suite_{cell.kind}", "", kept, folder=self.folder, **self.known)
