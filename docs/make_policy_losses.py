"""Write the tables of docs/policy_losses.md from the one list of policy losses: `python docs/make_policy_losses.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastalign.losses.policy_options import POLICY_LOSSES, PolicyLoss

PAGE = Path(__file__).with_name("policy_losses.md")
BEGIN = "<!-- policy losses: begin; written by docs/make_policy_losses.py -->"
END = "<!-- policy losses: end -->"

Columns = dict[str, Callable[[str, PolicyLoss], str]]


def _number(value: float) -> str:
    return f"{value:g}"


_FORMULAS: Columns = {
    "`loss_type`": lambda name, loss: f"`{name}`",
    "loss": lambda name, loss: loss.formula,
    "source": lambda name, loss: loss.source,
}
_DEFAULTS: Columns = {
    "`loss_type`": lambda name, loss: f"`{name}`",
    "ratio of a": lambda name, loss: loss.importance_sampling_level,
    "aggregation": lambda name, loss: f"`{loss.aggregation}`",
    "ε_low": lambda name, loss: _number(loss.epsilon_low),
    "ε_high": lambda name, loss: _number(loss.epsilon_high),
    "advantages": lambda name, loss: (
        f"`{loss.advantage_estimator}`" + ("" if loss.scale_rewards else ", not divided by the deviation")
    ),
    "KL in the rewards": lambda name, loss: _number(loss.kl_coef),
    "KL in the loss": lambda name, loss: _number(loss.kl_loss_coef),
}


def _table(columns: Columns) -> str:
    rows = [list(columns), ["---"] * len(columns)]
    rows += [[cell(name, loss) for cell in columns.values()] for name, loss in POLICY_LOSSES.items()]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def page(text: str) -> str:
    """A page with its block made anew."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{_table(_FORMULAS)}\n\n{_table(_DEFAULTS)}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
