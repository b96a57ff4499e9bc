"""What we parse ourselves, fuzzed by coverage for some seconds each; longer by hand, see atheris_targets.py."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("atheris_targets.py")
SECONDS = 10


def targets() -> list[str]:
    """The functions that are decorated as targets, read from the source: importing it needs atheris."""
    functions = [
        node for node in ast.parse(SCRIPT.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)
    ]
    return [f.name for f in functions if any(ast.unparse(d).startswith("target(") for d in f.decorator_list)]


@pytest.mark.long
@pytest.mark.parametrize("name", targets())
def test_target(name, tmp_path):
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed (pip install atheris)")
    command = [sys.executable, str(SCRIPT), name, f"-max_total_time={SECONDS}", "-timeout=20", "-rss_limit_mb=6000"]
    run = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "Done " in run.stderr, "libFuzzer did not run"
