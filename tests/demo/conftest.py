from __future__ import annotations

import random

import pytest

_TINY = {
    "sft_examples": 64,
    "preference_pairs": 64,
    "batch_size": 16,
    "questions": 12,
    "curve_questions": 4,
    "curve_points": 2,
    "max_new_tokens": 24,
    "ranked_questions": 32,
    "ppo_steps": 2,
    "ppo_batch_size": 8,
}
"""Settings of a demonstration that takes seconds and teaches the model nothing."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the demonstration itself runs: a model this small gains nothing from a second thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny():
    return dict(_TINY)


@pytest.fixture(scope="session")
def tiny_demo(tmp_path_factory):
    """A DemoResult of a tiny run, made once, and what it printed."""
    from rich.console import Console

    from fastalign.demo import run

    console = Console(record=True, width=80)
    result = run(tmp_path_factory.mktemp("demo") / "out", 3, console=console, **_TINY)
    return result, console.export_text()


@pytest.fixture(scope="session")
def tokenizer():
    from fastalign.demo.model import build_tokenizer

    return build_tokenizer()


@pytest.fixture
def model(tokenizer):
    from fastalign.demo.model import build_model

    return build_model(tokenizer, 0)


@pytest.fixture
def questions():
    from fastalign.demo.language import ask

    rng = random.Random(0)
    return [ask(rng) for _ in range(8)]
