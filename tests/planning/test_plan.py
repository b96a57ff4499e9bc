"""The plan in numbers and words."""

from __future__ import annotations

import json
from dataclasses import replace

from fastalign.planning import StepPlan, render

PLAN = StepPlan(
    model="llama", parameters=8_000_000_000, trainable=8_000_000, device_type="cuda", layout="shared",
    checkpointing=True, micro_batch_tokens=0, parts={"weights": 3 * 2**30, "activations": 2**30},
    flops={"forward": 4 * 10**9, "backward": 8 * 10**9, "head": 10**9},
    tokens={"padded": 40, "real": 30, "computed": 20, "scored": 10}, passes=2, pass_tokens=12, head="frozen: …",
)  # fmt: skip


def test_the_total_is_the_sum_of_the_parts():
    assert PLAN.peak_bytes == 4 * 2**30
    assert PLAN.total_flops == 13 * 10**9
    found = json.loads(json.dumps(PLAN.as_dict()))
    assert found["peak_bytes"] == PLAN.peak_bytes
    assert found["parts"] == PLAN.parts


def test_the_table_says_what_dominates_and_what_would_help():
    half = replace(PLAN, parts={"weights": 3 * 2**30, "activations": 2**29})
    text = render(PLAN, [("micro_batch_tokens 6", half)])
    lines = text.splitlines()
    assert "8.00 B parameters, 0.1% of them train" in lines[0]
    assert "weights dominate the memory" in text
    order = [line.split()[0] for line in lines if line.startswith("  ")]
    assert order[:3] == ["weights", "activations", "total"]
    assert next(line for line in lines if line.startswith("  weights")).split()[1:3] == ["3072.0", "75%"]
    assert "3584.0 MiB (-12%), work of a token +0%" in lines[-1]
    assert "micro_batch_tokens unlimited" in text
