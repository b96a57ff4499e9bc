"""docs/policy_losses.md says what the losses are: its tables are those that the list of policy losses makes."""

import importlib.util
from pathlib import Path

from fastalign.losses.policy_options import POLICY_LOSSES

DOCS = Path(__file__).parents[1] / "docs"
spec = importlib.util.spec_from_file_location("make_policy_losses", DOCS / "make_policy_losses.py")
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)


def test_the_tables_are_current():
    text = made.PAGE.read_text(encoding="utf-8")
    assert made.page(text) == text, "run: python docs/make_policy_losses.py"


def test_every_loss_is_there_with_its_options():
    lines = made.PAGE.read_text(encoding="utf-8").splitlines()
    for name, loss in POLICY_LOSSES.items():
        formula, defaults = (line.replace("\\|", "|") for line in lines if line.startswith(f"| `{name}` |"))
        assert loss.source in formula
        assert loss.formula in formula
        assert f"| {loss.importance_sampling_level} | `{loss.aggregation}` | {loss.epsilon_low:g} |" in defaults
        assert f"`{loss.advantage_estimator}`" in defaults
