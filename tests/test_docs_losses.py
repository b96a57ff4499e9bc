"""docs/losses.md says what the losses are: its tables are those that the list of losses makes."""

import importlib.util
from pathlib import Path

from fastalign.losses import DPO_LOSSES, DPOOptions

DOCS = Path(__file__).parents[1] / "docs"
spec = importlib.util.spec_from_file_location("make_losses", DOCS / "make_losses.py")
make_losses = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_losses)


def test_the_tables_are_current():
    text = make_losses.PAGE.read_text(encoding="utf-8")
    assert make_losses.page(text) == text, "run: python docs/make_losses.py"


def test_every_loss_and_option_is_there():
    lines = make_losses.block().splitlines()
    for name, variant in DPO_LOSSES.items():
        formula, needs = (line for line in lines if line.startswith(f"| `{name}` |"))
        assert variant.source in formula
        assert all(f"`{option}`" in needs for option in variant.options if option != "beta")
        assert ("none" in needs.split(" | ")[2]) == (not variant.needs_reference)
    known = {f"`{option}`" for option in DPOOptions._fields}
    assert all(f"`{option}`" in known for variant in DPO_LOSSES.values() for option in variant.options)
    widths = {line.replace("\\|", "").count("|") for line in lines if line}
    assert widths == {4, 6}  # bars inside formulas are escaped
