"""Write the tables of docs/losses.md from the one list of losses: `python docs/make_losses.py`."""

from __future__ import annotations

from pathlib import Path

from fastalign.losses import DPO_LOSSES, DPOLoss, DPOOptions

PAGE = Path(__file__).with_name("losses.md")
BEGIN = "<!-- losses: begin; written by docs/make_losses.py -->"
END = "<!-- losses: end -->"


def block() -> str:
    """What stands between the page's markers."""
    return f"{_table(_FORMULAS, DPO_LOSSES)}\n\n{_table(_NEEDS, DPO_LOSSES)}"


def _options(variant: DPOLoss) -> str:
    return ", ".join(f"`{name}`" for name in DPOOptions._fields if name in variant.options and name != "beta")


def _schedule(variant: DPOLoss) -> str:
    if variant.couples_batch:
        return "deferred: sorts its batch"
    if variant.needs_kl:
        return "streamed, after a pass for z₀"
    if variant.accepts_shift:
        return "streamed, δ from earlier steps"
    return "streamed"


_FORMULAS = {
    "`loss_type`": lambda name, variant: f"`{name}`",
    "loss": lambda name, variant: variant.formula,
    "source": lambda name, variant: variant.source,
}
_NEEDS = {
    "`loss_type`": lambda name, variant: f"`{name}`",
    "learns from": lambda name, variant: variant.rows,
    "reference": lambda name, variant: "yes" if variant.needs_reference else "none",
    "schedule": lambda name, variant: _schedule(variant),
    "options beside `beta`": lambda name, variant: _options(variant) or "none",
}


def _table(columns: dict, losses: dict[str, DPOLoss]) -> str:
    rows = [list(columns), ["---"] * len(columns)]
    rows += [[cell(name, variant) for cell in columns.values()] for name, variant in losses.items()]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def page(text: str) -> str:
    """A page with its block made anew."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{block()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
