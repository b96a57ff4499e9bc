"""The trainers' kit of models, data and trainers."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("kit", Path(__file__).parents[1] / "trainers/conftest.py")
trainers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(trainers)


@pytest.fixture
def kit(tmp_path):
    return trainers.Kit(tmp_path, trainers.make_tokenizer())


@pytest.fixture(scope="session")
def conftest():
    return trainers
