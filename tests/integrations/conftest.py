"""The tiny models of tests/models, and what the tests on TRL's trainers share."""

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


zoo = load(HERE.parent / "models" / "conftest.py").zoo


@pytest.fixture(scope="session")
def kit():
    pytest.importorskip("trl", reason="TRL lives in an environment of its own: see tests/integrations/test_trl.py")
    module = load(HERE / "trl_kit.py")
    module.load = load
    return module
