"""Write the tables of losses.md and policy_losses.md from the lists of losses: `python docs/make_losses.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastalign.losses import DPO_LOSSES, DPOLoss, DPOOptions
from fastalign.losses.policy_options import POLICY_LOSSES, PolicyLoss

DOCS = Path(__file__).parent
BEGIN = "<!-- losses: begin; written by docs/make_losses.py -->"
END = "<!-- losses: end -->"

Columns = dict[str, Callable[[str, Any], str]]

_FORMULAS: Columns = {
    "`loss_type`": lambda name, loss: f"`{name}`",
    "loss": lambda name, loss: loss.formula,
    "source": lambda name, loss: loss.source,
}


def _options(loss: DPOLoss) -> str:
    return ", ".join(f"`{name}`" for name in DPOOptions._fields if name in loss.options and name != "beta")


def _schedule(loss: DPOLoss) -> str:
    if loss.couples_batch:
        return "deferred: sorts its batch"
    if loss.needs_kl:
        return "streamed, after a pass for z₀"
    if loss.accepts_shift:
        return "streamed, δ from earlier steps"
    return "streamed"


_NEEDS: Columns = {
    "`loss_type`": lambda name, loss: f"`{name}`",
    "learns from": lambda name, loss: loss.rows,
    "reference": lambda name, loss: "yes" if loss.needs_reference else "none",
    "schedule": lambda name, loss: _schedule(loss),
    "options beside `beta`": lambda name, loss: _options(loss) or "none",
}


def _advantages(loss: PolicyLoss) -> str:
    return f"`{loss.advantage_estimator}`" + ("" if loss.scale_rewards else ", not divided by the deviation")


_DEFAULTS: Columns = {
    "`loss_type`": lambda name, loss: f"`{name}`",
    "ratio of a": lambda name, loss: loss.importance_sampling_level,
    "aggregation": lambda name, loss: f"`{loss.aggregation}`",
    "ε_low": lambda name, loss: f"{loss.epsilon_low:g}",
    "ε_high": lambda name, loss: f"{loss.epsilon_high:g}",
    "advantages": lambda name, loss: _advantages(loss),
    "KL in the rewards": lambda name, loss: f"{loss.kl_coef:g}",
    "KL in the loss": lambda name, loss: f"{loss.kl_loss_coef:g}",
}

PAGES: dict[str, tuple[Mapping[str, Any], Columns]] = {
    "losses.md": (DPO_LOSSES, _NEEDS),
    "policy_losses.md": (POLICY_LOSSES, _DEFAULTS),
}


def _table(columns: Columns, losses: Mapping[str, Any]) -> str:
    rows = [list(columns), ["---"] * len(columns)]
    rows += [[cell(name, loss) for cell in columns.values()] for name, loss in losses.items()]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def block(name: str) -> str:
    """What stands between the markers of a page."""
    losses, columns = PAGES[name]
    return f"{_table(_FORMULAS, losses)}\n\n{_table(columns, losses)}"


def page(name: str) -> str:
    """A page with its block made anew."""
    before, rest = (DOCS / name).read_text(encoding="utf-8").split(BEGIN)
    return f"{before}{BEGIN}\n\n{block(name)}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    for name in PAGES:
        (DOCS / name).write_text(page(name), encoding="utf-8")
