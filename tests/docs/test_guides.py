"""The guides' examples run, one block after the other, and their configurations are configurations."""

from __future__ import annotations

import contextlib
import io
import math
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
GUIDES = ("loop", "measuring")


def blocks(guide: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / f"{guide}.md").read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("guide", GUIDES)
def test_python_examples_run_in_order(guide):
    printed, names = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        for number, code in enumerate(blocks(guide, "python")):
            exec(compile(code, f"{guide}.md, block {number}", "exec"), names)
    assert printed.getvalue().strip()


def test_the_loop_trains():
    """After the guide's DPO steps every chosen response is the likelier one; all metrics are defined."""
    names: dict[str, Any] = {}
    for code in blocks("loop", "python")[:4]:
        exec(code, names)
    metrics = names["fastalign"].losses.summarize(names["metrics"])
    assert metrics["rewards/margins"] > 0.05
    assert metrics["rewards/accuracies"] == 1
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize(("number", "name"), [(0, "DPOConfig"), (1, "RewardConfig"), (2, "PPOConfig")])
def test_configurations_are_configurations(number, name, tmp_path):
    import fastalign
    from fastalign.cli.flags import collect
    from fastalign.cli.settings import config_fields, typed

    config = getattr(fastalign, name)
    path = tmp_path / "run.yaml"
    path.write_text(textwrap.dedent(blocks("training", "yaml")[number]))
    raw = collect(["--config", str(path), "--output_dir", str(tmp_path / "out")], set(config_fields(config)), "")
    assert config(**typed(config, raw)).output_dir == str(tmp_path / "out")
