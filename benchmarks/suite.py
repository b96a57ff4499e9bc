"""Numerics, speed and memory of everything on one device, in cells that are run once.

    python benchmarks/suite.py                          # all of it, most important first; hours on a fast GPU
    python benchmarks/suite.py --minutes 9              # what fits; the same command goes on where it stopped
    python benchmarks/suite.py --dry-run                # the cells that are left, with estimates
    python benchmarks/suite.py --device cpu --small     # every kind of cell at tiny sizes, to see that it runs

Kinds of cells (benchmarks/cells/):
    numerics  every schedule and kernel against float64, float32, bfloat16 and float16; nothing is timed while one fails
    head      log-probs, SFT, DPO, PPO, frozen head: fastalign, plain PyTorch, and the libraries that are installed
    roofs     fused forward, row kernels, scans: share of cuBLAS's rate, or of memory bandwidth
    steps     DPO and PPO steps of Llama and Qwen shapes with random weights

Rows go to results/<device>/suite_<kind>.csv with commit, digest of the sources, versions, driver and clocks. Cells run
in a process of their own, which is replaced when it dies; a provider that fails, or ends it, is a row that says so.
Times are medians of interleaved rounds, behind an emptied cache; peak memory is the allocator's, above the inputs.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import harness
import source_tree  # noqa: F401  (the checkout's fastalign, installed or not)
import torch
from cells import Cell, Row, head, numerics, roofs, show, steps
from cells.store import Store
from cells.worker import Worker

KINDS = {"numerics": numerics, "head": head, "roofs": roofs, "steps": steps}


def chosen(options: argparse.Namespace) -> list[Cell]:
    """Cells to run, numerics and what matters most first."""
    found = [cell for name in KINDS for cell in KINDS[name].cells(options.device, options.small)]
    kept = [
        cell for cell in found
        if (cell.kind == "numerics" and not options.unchecked)
        or (cell.kind in options.only and cell.tier <= options.tier and re.search(options.cells, cell.name))
    ]  # fmt: skip
    return sorted(kept, key=lambda cell: (cell.kind != "numerics", cell.tier))


class Run:
    """One call of the suite: runs cells while there is time, and keeps account of what is left."""

    def __init__(self, worker: Worker, store: Store, minutes: float | None, say: Callable[[str], None] = print) -> None:
        self.worker, self.store, self.say = worker, store, say
        self.start = time.monotonic()
        self.seconds = float("inf") if minutes is None else 60 * minutes
        self.spent: dict[str, list[float]] = {}  # by kind: seconds estimated, seconds taken

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def predicted(self, cell: Cell) -> float:
        estimated, taken = self.spent.get(cell.kind, [0.0, 0.0])
        return cell.seconds * (taken / estimated if estimated else 1.0)

    def fits(self, cell: Cell) -> bool:
        return self.elapsed + self.predicted(cell) <= self.seconds

    def cells(self, cells: list[Cell]) -> list[Cell]:
        """Run those that fit; returns those that are left."""
        left = []
        for number, cell in enumerate(cells):
            if not self.fits(cell):
                left.append(cell)
                continue
            ahead = sum(self.predicted(other) for other in cells[number:])
            self.say(
                f"[{number + 1}/{len(cells)}] {cell.name}  ({show.clock(self.elapsed)} so far, about "
                f"{show.clock(ahead)} for all that is left)"
            )
            begin = time.monotonic()
            rows = self.worker.run(cell, limit=max(120.0, 20 * self.predicted(cell)))
            taken = time.monotonic() - begin
            self.store.add(cell, rows)
            account = self.spent.setdefault(cell.kind, [0.0, 0.0])
            self.spent[cell.kind] = [account[0] + cell.seconds, account[1] + taken]
            for line in show.lines(cell, rows):
                self.say(line)
        return left

    def remains(self, left: list[Cell]) -> str:
        seconds = sum(self.predicted(cell) for cell in left)
        return f"{len(left)} cells remain, about {show.clock(seconds)}; the same command goes on with them"


def wrong_numerics(store: Store, cells: list[Cell]) -> list[Row]:
    names = {cell.name for cell in cells}
    return [dict(row) for row in store.rows("numerics") if row["cell"] in names and row.get("error")]


def listing(cells: list[Cell]) -> list[str]:
    found = [f"{'tier':>4}  {'s':>6}  {'GiB':>6}  cell"]
    found += [f"{cell.tier:>4}  {cell.seconds:6.1f}  {cell.gib:6.1f}  {cell.name}" for cell in cells]
    total = sum(cell.seconds for cell in cells)
    return [*found, f"{len(cells)} cells, about {total / 60:.0f} minutes; most memory {most(cells):.0f} GiB"]


def most(cells: list[Cell]) -> float:
    return max((cell.gib for cell in cells), default=0.0)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="tiny sizes; kept in build/suite, not in results/")
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS), help="kinds, besides numerics")
    parser.add_argument("--cells", default="", metavar="REGEX", help="only cells whose name it is found in")
    parser.add_argument("--tier", type=int, default=5, help="only cells up to this tier; the targets are 1, peers 3")
    parser.add_argument("--minutes", type=float, help="stop between cells before so many have passed")
    parser.add_argument("--fresh", action="store_true", help="run finished cells again")
    parser.add_argument("--keep", action="store_true", help="count cells of other sources and versions as finished")
    parser.add_argument("--unchecked", action="store_true", help="time without numerics")
    parser.add_argument("--dry-run", action="store_true", help="list what is left, with estimates")
    parser.add_argument("--results", type=Path, help="folder instead of benchmarks/results")
    parser.add_argument("--commit", help="what to write as the commit, where there is no git")
    parser.add_argument("--threads", type=int, help="of PyTorch, on the CPU")
    return parser.parse_args(argv)


def run(options: argparse.Namespace, cells: list[Cell], worker: Worker, say: Callable[[str], None] = print) -> int:
    """Exit status."""
    about = worker.start()
    folder = options.results / about["name"]
    store = Store(folder, commit=options.commit, driver=about["driver"], same_code=not options.keep)
    say(f"{about['name']}: {store.known['versions']}; sources {store.known['code']}")
    finished = set() if options.fresh else store.finished()
    todo = [cell for cell in cells if cell.name not in finished]
    say(f"{len(cells)} cells, {len(cells) - len(todo)} of them finished before")
    going = Run(worker, store, options.minutes, say)
    checks = [cell for cell in todo if cell.kind == "numerics"]
    left = going.cells(checks)
    wrong = [] if options.unchecked else wrong_numerics(store, cells)
    timed = [cell for cell in todo if cell.kind != "numerics"]
    if wrong or left:
        left += timed
    else:
        left = going.cells(timed)
    for name in dict.fromkeys(row["cell"] for row in wrong):
        of_cell = [row for row in wrong if row["cell"] == name]
        say(f"WRONG {name}: {len(of_cell)} checks, {of_cell[0].get('check', '')}: {of_cell[0]['error'][:160]}")
    if wrong:
        say(f"{len(wrong)} checks fail, so nothing is timed (--unchecked does it all the same)")
    if left:
        say(going.remains(left))
    draw(folder, say)
    return 1 if wrong else 0


def draw(folder: Path, say: Callable[[str], None]) -> None:
    try:
        import plots
    except ImportError as error:
        say(f"no plots: {error}")
        return
    for path in plots.draw(folder):
        say(f"drawn: {path.name}")


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    cells = chosen(options)
    scratch = options.results or harness.ROOT.parent / "build/suite"  # what compilers say is no result
    if options.results is None:
        options.results = scratch if options.small else harness.ROOT / "results"
    for folder in (scratch, options.results):
        folder.mkdir(parents=True, exist_ok=True)
    if options.dry_run:
        here = options.device == "cpu" or torch.cuda.is_available()
        folder = options.results / harness.device_name(options.device) if here else Path("nowhere")
        finished = set() if options.fresh else Store(folder, same_code=not options.keep).finished()
        print("\n".join(listing([cell for cell in cells if cell.name not in finished])))
        return 0
    worker = Worker(options.device, threads=options.threads, log=scratch / "suite.log")
    try:
        return run(options, cells, worker)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with the cell that was at work")
        return 130
    finally:
        worker.stop()


if __name__ == "__main__":
    raise SystemExit(main())
