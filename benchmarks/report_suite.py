"""Tables of the suite's rows (suite.py) for report.py."""

from __future__ import annotations

from pathlib import Path

Row = dict[str, str]
TASKS = {
    "forward": "log-probs, forward only", "logps": "log-probs, loss known later", "sft": "SFT", "dpo": "DPO",
    "ppo": "PPO", "frozen": "frozen head",
}  # fmt: skip
AIMED = (8192, 131072)  # tokens, vocabulary


def number(text: str | None, digits: int = 2) -> str:
    return f"{float(text):,.{digits}f}" if text else "–"


def table(head: list[str], rows: list[list[str]], named: int = 1) -> list[str]:
    """Markdown; the first `named` columns are text."""
    rule = ["---"] * named + ["---:"] * (len(head) - named)
    return ["| " + " | ".join(line) + " |" for line in (head, rule, *rows)]


def lines(folder: Path) -> list[str]:
    """What there is to say of a device; nothing where the suite has not run."""
    if not any(folder.glob("suite_*.csv")):
        return []
    from cells.store import Store  # which imports PyTorch

    store = Store(folder)
    found = numerics(store.rows("numerics"))
    head = store.rows("head")
    shapes = list(dict.fromkeys(row["shape"] for row in head))
    aimed = [shape for shape in shapes if (int(shape.split("x")[0]), int(shape.split("x")[2])) == AIMED]
    for shape in aimed or shapes[:1]:
        found += head_table([row for row in head if row["shape"] == shape])
    found += roofs(store.rows("roofs")) + steps(store.rows("steps"))
    plots = [path.name for path in sorted(folder.glob("suite_*.svg"))]
    if plots:
        found += ["", "Plots: " + ", ".join(f"`benchmarks/results/{folder.name}/{name}`" for name in plots) + "."]
    return found


def numerics(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    worst = max((float(row["excess"]) for row in rows if row.get("excess")), default=0.0)
    wrong = [row for row in rows if row["error"]]
    driver = f", driver {rows[-1]['driver']}" if rows[-1].get("driver") else ""
    said = f"{len(rows)} checks against float64, {len(wrong)} fail; largest error {worst:.2f} of what the rule allows"
    return ["", f"**Numerics**: {said} ({rows[-1]['versions']}{driver}; commit {rows[-1]['commit']})."]


def plain(row: Row) -> bool:
    """All tokens, random logits, nothing clipped."""
    return float(row["fraction"]) == 1 and row["peaked"] == "False" and float(row["live"]) == 1


def head_table(rows: list[Row]) -> list[str]:
    """fastalign's settings by task, and the others' time over its own."""
    body = []
    for task in TASKS:
        of_task = {row["provider"]: row for row in rows if row["task"] == task and plain(row)}
        own = of_task.get("fastalign")
        if own is None or not own.get("seconds"):
            continue
        others = [
            f"{name} {float(row['seconds']) / float(own['seconds']):.2f}" if row.get("seconds") else f"{name} failed"
            for name, row in of_task.items()
            if not name.startswith("fastalign") and not row["error"].startswith("not installed")
        ]
        for name, row in of_task.items():
            if not name.startswith("fastalign") or not row.get("seconds"):
                continue
            figures = [number(str(1e3 * float(row["seconds"])), 2), number(row["tflops"], 0), number(row["gemms"])]
            figures += [f"{number(row['over_gemms'])} (≤ {row['target']})", number(row["beside_mib"], 0)]
            figures += [number(row["planned_mib"], 0), ", ".join(others) if name == "fastalign" else ""]
            body.append([TASKS[task], name, *figures])
    if not body:
        return []
    first = rows[0]
    head = ["task", "fastalign's setting", "ms", "TFLOP/s", "GEMMs", "time ÷ its GEMMs (aim)", "MiB beside gradients"]
    head += ["planned", "others' time ÷ fastalign's"]
    sizes = first["shape"].replace("x", " × ")
    said = f"**The head, {sizes}** (tokens × hidden × vocabulary, {first['dtype']}; one GEMM "
    said += f"{1e3 * float(first['gemm_seconds']):.2f} ms, {float(first['gemm_tflops']):.0f} TFLOP/s)"
    return ["", said, "", *table(head, body, 2), *_special(rows)]


def _special(rows: list[Row]) -> list[str]:
    halves = [row for row in rows if row["provider"] == "fastalign" and row.get("over_all_rows")]
    found = []
    if halves:
        said = ", ".join(f"{TASKS[row['task']]} {number(row['over_all_rows'])}" for row in halves)
        found += ["", f"Half of the tokens ignored, time ÷ that of all: {said}."]
    ours = [row for row in rows if row["provider"] == "fastalign" and row["task"] == "ppo" and row.get("seconds")]
    whole = next((row for row in ours if plain(row)), None)
    live = [row for row in ours if float(row["live"]) < 1]
    if whole and live:
        said = ", ".join(
            f"{float(row['live']):.0%} {float(row['over_gemms']) / float(whole['over_gemms']):.2f}" for row in live
        )
        found += ["", f"PPO by share of tokens that clipping leaves, in GEMMs ÷ those of all: {said}."]
    return found


def roofs(rows: list[Row]) -> list[str]:
    body = [
        [row["provider"], row["shape"].replace("x", " × "), row["dtype"], f"{number(row['rate'], 3)} {row['unit']}",
         number(row["of_roof"])]
        for row in rows if row.get("seconds")
    ]  # fmt: skip
    head = ["kernel", "size", "dtype", "rate", "share of the roof"]
    said = "**Kernels** (roof: torch.mm of the same product, or a copy of as many bytes, in the same rounds)"
    return ["", said, "", *table(head, body, 3)] if body else []


def steps(rows: list[Row]) -> list[str]:
    body = []
    for row in rows:
        if row["error"].startswith("not installed"):
            continue
        figures = [number(row["tokens_per_second"], 0), number(row["over_naive"]), number(row["peak_mib"], 0)]
        if row["error"]:
            figures = [f"failed: {row['error'][:60]}", "", ""]
        body.append([f"{row['task'].upper()}, {row['model']}", row["provider"], *figures])
    head = ["step", "provider", "tokens/s", "time ÷ naive", "MiB beside weights and optimizer"]
    return ["", "**Whole steps** (random weights, AdamW)", "", *table(head, body, 2)] if body else []
