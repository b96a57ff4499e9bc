"""The pages of losses say what the losses are: their tables are those that the lists of losses make."""

import importlib.util
from pathlib import Path

import pytest

from fastalign.losses import DPO_LOSSES, DPOOptions
from fastalign.losses.policy_options import POLICY_LOSSES

DOCS = Path(__file__).parents[1] / "docs"
spec = importlib.util.spec_from_file_location("make_losses", DOCS / "make_losses.py")
make_losses = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_losses)


@pytest.mark.parametrize("name", make_losses.PAGES)
def test_the_tables_are_current(name):
    text = (DOCS / name).read_text(encoding="utf-8")
    assert make_losses.page(name) == text, "run: python docs/make_losses.py"


def test_every_preference_loss_and_option_is_there():
    lines = make_losses.block("losses.md").splitlines()
    for name, variant in DPO_LOSSES.items():
        formula, needs = (line for line in lines if line.startswith(f"| `{name}` |"))
        assert variant.source in formula
        assert all(f"`{option}`" in needs for option in variant.options if option != "beta")
        assert ("none" in needs.split(" | ")[2]) == (not variant.needs_reference)
    known = {f"`{option}`" for option in DPOOptions._fields}
    assert all(f"`{option}`" in known for variant in DPO_LOSSES.values() for option in variant.options)
    widths = {line.replace("\\|", "").count("|") for line in lines if line}
    assert widths == {4, 6}  # bars inside formulas are escaped


def test_every_policy_loss_is_there_with_its_defaults():
    lines = make_losses.block("policy_losses.md").splitlines()
    for name, loss in POLICY_LOSSES.items():
        formula, defaults = (line.replace("\\|", "|") for line in lines if line.startswith(f"| `{name}` |"))
        assert loss.source in formula
        assert loss.formula in formula
        assert f"| {loss.importance_sampling_level} | `{loss.aggregation}` | {loss.epsilon_low:g} |" in defaults
        assert f"`{loss.advantage_estimator}`" in defaults
