"""What the suite prints of a cell, and of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cells import Cell

Columns = Sequence[tuple[str, str, int]]  # title, key, digits
COLUMNS: dict[str, Columns] = {
    "head": (
        ("ms", "seconds", 3), ("TFLOP/s", "tflops", 0), ("÷ naive", "over_naive", 2), ("GEMMs", "gemms", 2),
        ("÷ its GEMMs", "over_gemms", 3), ("aim", "target", 2), ("÷ all rows", "over_all_rows", 2),
        ("MiB beside", "beside_mib", 0), ("planned", "planned_mib", 0), ("differs", "difference", 5),
    ),
    "roofs": (("ms", "seconds", 4), ("rate", "rate", 3), ("of the roof", "of_roof", 3)),
    "steps": (
        ("ms", "seconds", 1), ("tokens/s", "tokens_per_second", 0), ("÷ naive", "over_naive", 2),
        ("MiB", "peak_mib", 0), ("loss", "loss", 5),
    ),
}  # fmt: skip


def number(value: Any, digits: int) -> str:
    if value in (None, ""):
        return ""
    return f"{float(value):,.{digits}f}"


def figure(row: Mapping[str, Any], title: str, key: str, digits: int) -> str:
    value = row.get(key)
    return number(float(value) * 1e3 if title == "ms" and value not in (None, "") else value, digits)


def lines(cell: Cell, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of the cell's rows; of numerics the worst, and what is wrong."""
    if cell.kind == "numerics":
        return _numerics(rows)
    columns = COLUMNS.get(cell.kind, ())
    missing = [str(row["provider"]) for row in rows if str(row.get("error")).startswith("not installed")]
    body = [["", *(title for title, *_ in columns)]]
    for row in rows:
        if row["provider"] in missing:
            continue
        figures = [figure(row, *column) for column in columns]
        if row.get("error"):
            figures = [f"failed: {str(row['error'])[:80]}"]
        body.append([str(row["provider"]), *figures])
    widths = [max((len(line[i]) for line in body if len(line) == len(body[0])), default=0) for i in range(len(body[0]))]
    found = []
    for name, *rest in body:
        if len(rest) == len(columns):
            rest = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
        found.append(f"    {name.ljust(max(widths[0], 24))}  " + "  ".join(rest))
    return [*_about(rows), *found, *([f"    not installed: {', '.join(missing)}"] if missing else [])]


def _about(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    first = rows[0] if rows else {}
    said = []
    if first.get("gemm_seconds"):
        said.append(f"GEMM {float(first['gemm_seconds']) * 1e3:.3f} ms, {float(first['gemm_tflops']):.0f} TFLOP/s")
    if first.get("roof_rate"):
        said.append(f"roof {float(first['roof_rate']):.3f} {first['unit']}")
    if first.get("sm_mhz"):
        said.append(f"{first['sm_mhz']} MHz, {first['watts']} W, {first['celsius']} °C after it")
    return [f"    ({'; '.join(said)})"] if said else []


def _numerics(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    wrong = [row for row in rows if row.get("error")]
    excesses = [float(row["excess"]) for row in rows if row.get("excess") not in (None, "")]
    refused = sum(bool(row.get("refused")) for row in rows)
    found = [
        f"    {len(rows) - len(wrong)} of {len(rows)} checks hold, {refused} of them refusals; the largest error is "
        f"{max(excesses, default=0.0):.2f} of what the rule allows"
    ]
    for row in wrong[:5]:
        where = ", ".join(str(row[key]) for key in ("check", "logits", "head") if row.get(key))
        found.append(f"    WRONG {where}: {str(row['error'])[:160]}")
    return found + ([f"    and {len(wrong) - 5} more"] if len(wrong) > 5 else [])


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
