"""Plots of the suite's rows beside them: time and memory of the head by tokens, whole steps."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from cells.store import Store
from matplotlib import pyplot

matplotlib.rcParams["svg.hashsalt"] = "fastalign"  # the same rows give the same file
matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
TASKS = {
    "forward": "log-probs, forward", "logps": "log-probs, loss known later", "sft": "SFT", "dpo": "DPO", "ppo": "PPO",
    "frozen": "frozen head",
}  # fmt: skip
COLOURS = {
    "naive": "tab:grey", "naive, rows selected": "silver", "torch.compile": "tab:olive",
    "checkpointed chunks": "tab:brown", "torch linear_cross_entropy": "tab:pink", "trl": "tab:orange",
    "liger": "tab:green", "cce": "tab:red", "quack": "tab:purple", "verl": "tab:cyan",
}  # fmt: skip
OURS = {"fastalign": "tab:blue", "fastalign 0.3 GB": "navy"}
STEPS = COLOURS | OURS | {"naive, completion logits": "silver", "fastalign padded": "lightsteelblue"}
Row = dict[str, str]


def draw(folder: Path) -> list[Path]:
    """The files drawn, of what there are rows for."""
    store = Store(folder)
    found = []
    rows = _sweep([row for row in store.rows("head") if row.get("seconds")])
    if rows:
        found.append(_by_tokens(rows, "seconds", 1e3, "ms", folder / "suite_time.svg"))
        found.append(_by_tokens(rows, "beside_mib", 1.0, "MiB beside gradients", folder / "suite_memory.svg"))
    steps = [row for row in store.rows("steps") if row.get("seconds")]
    if steps:
        found.append(_steps(steps, folder / "suite_steps.svg"))
    return found


def _sweep(rows: list[Row]) -> list[Row]:
    """Random logits, all tokens: those of the hidden size and vocabulary with the most token counts."""
    rows = [row for row in rows if float(row["fraction"]) == 1 and row["peaked"] == "False" and float(row["live"]) == 1]
    sizes = Counter(size for size, _ in {(_head(row), row["shape"]) for row in rows})
    if not sizes:
        return []
    chosen = max(sizes, key=lambda size: (sizes[size], size))
    return [row for row in rows if _head(row) == chosen]


def _head(row: Row) -> tuple[int, int]:
    _, hidden, vocab = map(int, row["shape"].split("x"))
    return hidden, vocab


def _finish(figure: Any, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)
    return path


def _by_tokens(rows: list[Row], key: str, scale: float, unit: str, path: Path) -> Path:
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 7), squeeze=False)
    handles: dict[str, Any] = {}
    for axis, task in zip(axes.flat, tasks, strict=False):
        of_task = [row for row in rows if row["task"] == task]
        for name, colour in (COLOURS | OURS).items():
            points = sorted(
                (int(row["shape"].split("x")[0]), scale * float(row[key]))
                for row in of_task if row["provider"] == name and row.get(key)
            )  # fmt: skip
            points = [(n, y) for n, y in points if y > 0]
            if points:
                width = 2.2 if name in OURS else 1.2
                (handles[name],) = axis.plot(*zip(*points, strict=True), "o-", color=colour, lw=width, ms=3, label=name)
        axis.set_title(TASKS[task], fontsize=10)
        axis.set_xscale("log", base=2)
        counts = sorted({int(row["shape"].split("x")[0]) for row in of_task})
        axis.set_xticks(counts, [f"{n // 1024}k" if n >= 1024 else str(n) for n in counts])
        axis.set_yscale("log")
        axis.set_xlabel("tokens")
        axis.set_ylabel(unit)
        axis.grid(alpha=0.3, which="both", lw=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes.flat)[len(tasks) :]:
        axis.set_visible(False)
    hidden, vocab = _head(rows[0])
    figure.suptitle(f"hidden {hidden}, vocabulary {vocab}, {rows[0]['dtype']}", fontsize=10)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.legend(handles.values(), handles, loc="lower center", ncols=6, fontsize=8, frameon=False)
    return _finish(figure, path)


def _steps(rows: list[Row], path: Path) -> Path:
    groups = list(dict.fromkeys((row["task"], row["model"]) for row in rows))
    names = list(dict.fromkeys(row["provider"] for row in rows))
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 0.35 * len(groups) * len(names) + 1.5), sharey=True)
    titles = {"tokens_per_second": "tokens a second", "peak_mib": "peak memory beside weights and optimizer, MiB"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for place, (task, model) in enumerate(groups):
            own = {row["provider"]: row for row in rows if (row["task"], row["model"]) == (task, model)}
            for number, name in enumerate(names):
                if name in own:
                    y = place * (len(names) + 1) + number
                    bar = axis.barh(y, float(own[name][key]), color=STEPS[name])
                    axis.bar_label(bar, fmt="{:,.0f}", padding=3, fontsize=7)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.15, y=0.01)
        axis.spines[["top", "right"]].set_visible(False)
    places = [(p * (len(names) + 1) + n, f"{task} {model}: {name}") for p, (task, model) in enumerate(groups)
              for n, name in enumerate(names)]  # fmt: skip
    axes[0].set_yticks([y for y, _ in places], [label for _, label in places], fontsize=7)
    axes[0].invert_yaxis()
    figure.tight_layout()
    return _finish(figure, path)
