"""How micro_batch_tokens follows from a budget."""

from __future__ import annotations

import logging

import pytest

from fastalign.planning import StepPlan, auto_micro_batch_tokens, memory_budget


def plan_of(tokens: int) -> StepPlan:
    """1 MiB of weights and 1 KiB a token."""
    asked.append(tokens)
    return StepPlan(
        model="llama", parameters=1, trainable=1, device_type="cpu", layout="padded", checkpointing=True,
        micro_batch_tokens=tokens, parts={"weights": 2**20, "activations": tokens * 1024}, flops={}, tokens={},
        passes=1, pass_tokens=tokens, head="",
    )  # fmt: skip


asked: list[int] = []


@pytest.mark.parametrize(
    ("budget_kib", "largest", "expected"),
    [(1024 + 256, 10**6, 256), (1024 + 511, 10**6, 256), (1024 + 512, 10**6, 512), (1024 + 9000, 10**6, 8192),
     (10**7, 3000, 4096), (10**7, 1, 256)],
)  # fmt: skip
def test_the_largest_power_of_two_that_fits(budget_kib, largest, expected, caplog):
    asked.clear()
    with caplog.at_level(logging.INFO, logger="fastalign.planning.sizing"):
        choice, plan = auto_micro_batch_tokens(plan_of, budget_kib * 1024, largest=largest)
    assert choice == plan.micro_batch_tokens == expected
    assert plan.peak_bytes <= budget_kib * 1024
    assert len(asked) <= 5
    assert f"micro_batch_tokens: {expected}" in caplog.text


def test_a_budget_that_nothing_fits_says_what_is_needed():
    with pytest.raises(ValueError, match=r"a pass of 256 tokens takes .* weights take"):
        auto_micro_batch_tokens(plan_of, 2**20, largest=1000)


def test_budgets():
    assert memory_budget("cpu", 2.0) == 2 * 2**30
    assert memory_budget("cuda", None, 100) == 90
    assert memory_budget("cuda", 1.0, 100) == 2**30
    with pytest.raises(ValueError, match="memory_gb is missing"):
        memory_budget("cpu", None, 10**12)
    with pytest.raises(ValueError, match="memory_gb is missing"):
        memory_budget("cuda", None)
    with pytest.raises(ValueError, match="memory_gb=0"):
        memory_budget("cpu", 0)
