"""Tables of the newest results, and the block of the README between its markers.

python benchmarks/report.py            # print
python benchmarks/report.py --write    # rewrite the block of the README
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import report_suite

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- results: begin; written by benchmarks/report.py -->"
END = "<!-- results: end -->"
TASKS = {
    "logps": "per-token log-probs, loss known later",
    "loss": "cross-entropy",
    "pairs": "DPO, pairs fit the workspace",
    "pairs-large": "DPO, a pair is twice the workspace",
    "frozen": "per-token log-probs, frozen head",
}

Row = dict[str, str]


def newest(path: Path, keys: tuple[str, ...]) -> list[Row]:
    """The last row of each combination of `keys`: files are append-only."""
    with path.open(newline="") as file:
        rows = {tuple(row[key] for key in keys): row for row in csv.DictReader(file)}
    return list(rows.values())


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return [
        "| " + " | ".join(head) + " |",
        "|" + "|".join(["---"] * 2 + ["---:"] * (len(head) - 2)) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def number(text: str | None, digits: int = 2) -> str:
    return f"{float(text):.{digits}f}" if text else "–"


def sizes_of(shape: str) -> str:
    return shape.replace("x", " × ")


def head_tables(path: Path) -> list[str]:
    lines: list[str] = []
    rows = newest(path, ("task", "shape", "dtype", "provider"))
    for shape in dict.fromkeys(row["shape"] for row in rows):
        of_shape = [row for row in rows if row["shape"] == shape and row["task"] in TASKS]
        body = []
        for row in of_shape:
            failed = f" (failed: {row['error'][:60]})" if row["error"] else ""
            over_gemms = number(row["over_gemms"]) if row["seconds"] else "–"
            figures = number(row["over_naive"]), over_gemms, row["gemms"] or "–", number(row["beside_gradients_mib"], 0)
            body.append((TASKS[row["task"]], row["provider"] + failed, *figures))
        head = ("task", "provider", "time ÷ naive", "time ÷ its GEMMs", "GEMMs", "MiB beside gradients")
        lines += ["", f"**{sizes_of(shape)}** (tokens × hidden × vocabulary, {of_shape[0]['dtype']})", ""]
        lines += table(head, body)
        halves = [row for row in rows if row["shape"] == shape and row.get("over_all_rows")]
        if halves:
            said = ", ".join(f"{row['provider'].split()[-1]} {number(row['over_all_rows'])}" for row in halves)
            lines += ["", f"Half of the rows ignored, time ÷ that of all rows: {said}."]
    return lines


def step_table(path: Path) -> list[str]:
    rows = newest(path, ("provider", "model", "batch"))
    body = [
        (row["model"], row["provider"], number(row["step_seconds"]),
         *(number(row[name]) if row.get(name) else "" for name in ("time_over_trl", "time_over_trl_precomputed",
                                                                   "time_over_better_naive")),
         number(row["peak_training_mib"], 0), number(row["memory_over_trl"]) if row.get("memory_over_trl") else "",
         number(row["reference_rate_over_trl"]) if row.get("reference_rate_over_trl") else "")
        for row in rows
    ]  # fmt: skip
    head = (
        "model", "trainer", "s per step", "time ÷ TRL", "time ÷ TRL precomputed", "time ÷ better loop by hand",
        "MiB above the bare process", "memory ÷ TRL", "reference tokens/s ÷ TRL's",
    )  # fmt: skip
    plot = path.with_suffix(".svg")
    return [
        "",
        f"**A DPO step, end to end** ({rows[0]['batch']} pairs, max_length 512, float32)",
        "",
        *table(head, body),
        *(["", f"![Tokens a second and memory of a DPO step]({plot.relative_to(ROOT)})"] if plot.exists() else []),
    ]


def clock_of(rows: list[Row]) -> str:
    """What the times of a table are, where they are not those of an undisturbed clock on the wall."""
    busy = max(float(row["cores_of_others"] or 0) for row in rows)
    if all(row["clock"] == "wall" for row in rows):
        return "" if busy < 0.3 else f"; other processes kept {busy:.1f} cores busy"
    return f"; CPU time, because other processes kept {busy:.1f} cores busy"


def update_lines(rows: list[Row]) -> list[str]:
    """Table of one shape."""
    body = []
    for row in rows:
        failed = f" (failed: {row['error'][:60]})" if row["error"] else ""
        figures = number(row["over_naive"]), number(row["over_all_live"]), number(row["beside_gradients_mib"], 0)
        body.append((f"{float(row['live_share']):.0%}", row["provider"] + failed, *figures))
    sizes = f"{sizes_of(rows[0]['shape'])}** (tokens × hidden × vocabulary, {rows[0]['dtype']}{clock_of(rows)})"
    head = ("tokens with a gradient", "provider", "time ÷ naive", "time ÷ all with one", "MiB beside gradients")
    return ["", f"**The head of a PPO update, {sizes}", "", *table(head, body)]


def ppo_tables(path: Path) -> list[str]:
    rows = newest(path, ("task", "shape", "dtype", "live", "provider"))
    of_task = {task: [row for row in rows if row["task"] == task] for task in ("update", "live", "gae")}
    lines: list[str] = []
    for shape in dict.fromkeys(row["shape"] for row in of_task["update"]):
        lines += update_lines([row for row in of_task["update"] if row["shape"] == shape])
    if of_task["update"]:
        lines += ["", "The other tokens are clipped or have no advantage. Without entropy: ÷ naive without it."]
    for shape, provider in dict.fromkeys((row["shape"], row["provider"]) for row in of_task["live"]):
        found = [row for row in of_task["live"] if (row["shape"], row["provider"]) == (shape, provider)]
        said = ", ".join(f"{float(row['live_share']):.0%} {number(row['over_all_live'])}" for row in found[1:])
        where = f"{sizes_of(shape)}, {provider.removeprefix('fastalign ')}{clock_of(found)}"
        lines += ["", f"Time by share of tokens with a gradient ÷ that of all ({where}): {said}."]
    for shape in dict.fromkeys(row["shape"] for row in of_task["gae"]):
        found = [row for row in of_task["gae"] if row["shape"] == shape]
        body = [
            (sizes_of(shape), row["provider"], number(str(1e3 * float(row["seconds"])), 1), number(row["over_scan"]))
            for row in found
        ]
        lines += ["", f"**Generalised advantage estimation** (float32{clock_of(found)})", ""]
        lines += table(("sequences × tokens", "provider", "ms", "time ÷ log-step scan"), body)
    return lines


def block() -> str:
    """What stands between the README's markers."""
    lines: list[str] = []
    for device in sorted((ROOT / "benchmarks/results").glob("*")):
        lines += ["", f"### {device.name.replace('_', ' ')}"]
        for name, render in (("linear_logps", head_tables), ("dpo_step", step_table), ("ppo_step", ppo_tables)):
            path = device / f"{name}.csv"
            if path.exists():
                lines += render(path)
        lines += report_suite.lines(device)
    return "\n".join(lines).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if not arguments.write:
        print(block())
        return
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n\n{block()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
