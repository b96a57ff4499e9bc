"""Tables of the newest results, and the block of the README between its markers.

python benchmarks/report.py            # print
python benchmarks/report.py --write    # rewrite the block of the README
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path

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
        (row["model"], row["provider"], number(row["step_seconds"]), number(row["time_over_trl"]),
         number(row["peak_training_mib"], 0), number(row["memory_over_trl"]))
        for row in rows
    ]  # fmt: skip
    head = ("model", "trainer", "s per step", "time ÷ TRL", "MiB above the bare process", "memory ÷ TRL")
    return [
        "",
        f"**A DPO step, end to end** ({rows[0]['batch']} pairs, max_length 512, float32)",
        "",
        *table(head, body),
    ]


def ppo_tables(path: Path) -> list[str]:
    rows = newest(path, ("task", "shape", "dtype", "live", "provider"))
    lines: list[str] = []
    updates = [row for row in rows if row["task"] == "update"]
    for shape in dict.fromkeys(row["shape"] for row in updates):
        body = []
        for row in (row for row in updates if row["shape"] == shape):
            failed = f" (failed: {row['error'][:60]})" if row["error"] else ""
            figures = number(row["over_naive"]), number(row["over_all_live"]), number(row["beside_gradients_mib"], 0)
            body.append((f"{float(row['live_share']):.0%}", row["provider"] + failed, *figures))
        lines += [
            "",
            f"**The head in a PPO update, {sizes_of(shape)}** (tokens × hidden × vocabulary, {updates[0]['dtype']})",
            "",
        ]
        head = ("tokens with a gradient", "provider", "time ÷ naive", "time ÷ all with one", "MiB beside gradients")
        lines += table(head, body)
    if updates:
        lines += [
            "",
            "The other tokens are clipped or have no advantage. Without entropy: ÷ naive without it.",
        ]
    scans = [row for row in rows if row["task"] == "gae"]
    for shape in dict.fromkeys(row["shape"] for row in scans):
        body = []
        for row in (row for row in scans if row["shape"] == shape):
            milliseconds = 1e3 * float(row["seconds"])
            body.append((sizes_of(shape), row["provider"], f"{milliseconds:.1f}", number(row["over_scan"], 3)))
        lines += ["", "**Generalised advantage estimation** (float32)", ""]
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
