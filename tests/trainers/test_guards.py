"""Which steps are bad, what is remembered of the good ones, and what is written down of the others."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastalign.trainers.guards import BadStep, StepGuard, suspects

finite = st.floats(-1e6, 1e6)
not_finite = st.sampled_from([math.nan, math.inf, -math.inf])


@given(finite, finite.map(abs))
def test_finite_numbers_are_good_without_limits(loss, norm):
    guard = StepGuard()
    assert guard.judge(loss, norm) is None
    assert list(guard.losses) == [loss]


@given(not_finite, finite)
def test_what_is_not_finite_is_bad_and_not_remembered(wrong, right):
    guard = StepGuard()
    assert "loss" in guard.judge(wrong, right)
    assert "gradient" in guard.judge(right, wrong)
    assert guard.judge(right, None) is None
    assert list(guard.losses) == [right]


def test_a_gradient_above_its_limit_is_bad():
    guard = StepGuard(grad_norm_limit=10.0)
    assert guard.judge(1.0, 10.0) is None
    assert guard.judge(1.0, 10.1) == "the norm of the gradient is 10.1, grad_norm_limit=10"


@given(st.lists(st.floats(0.4, 0.6), min_size=20, max_size=150))
def test_a_spike_is_bad_once_enough_is_known(losses):
    guard = StepGuard(loss_spike=8.0)
    for loss in losses[:19]:
        assert guard.judge(loss, 1.0) is None
    assert guard.judge(50.0, 1.0) is None  # too little is known yet
    guard.losses.pop()
    for loss in losses[19:]:
        guard.judge(loss, 1.0)
    if len(guard.losses) >= 20:
        assert "loss_spike=8" in guard.judge(5.0, 1.0)
        assert guard.judge(-50.0, 1.0) is None  # a loss may fall as far as it likes
    assert len(guard.losses) <= 100


def test_a_constant_loss_has_room_around_it():
    guard = StepGuard(loss_spike=5.0)
    for _ in range(30):
        guard.judge(0.5, 1.0)
    assert guard.judge(0.52, 1.0) is None
    assert guard.judge(0.53, 1.0) is not None


def test_a_resumed_run_judges_as_the_first_would():
    first, second = StepGuard(loss_spike=3.0), StepGuard(loss_spike=3.0)
    for i in range(40):
        first.judge(0.5 + 0.01 * (i % 5), 1.0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for loss in (0.51, 0.9, 0.55, 0.6):
        assert first.judge(loss, 1.0) == second.judge(loss, 1.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"action": "halt"}, "on_bad_step must be one of stop, skip, ignore"), ({"grad_norm_limit": 0.0}, "positive"),
     ({"loss_spike": math.nan}, "positive"), ({"action": "ignore", "loss_spike": 3.0}, "needs on_bad_step")],
)  # fmt: skip
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(ValueError, match=words):
        StepGuard(**settings)


def test_the_record_is_json_and_grows(tmp_path):
    steps = [BadStep(3, "the loss is nan", "skip", math.nan, 1.5, [4, 7], [7]),
             BadStep(9, "the norm of the gradient is inf", "stop", 0.5, math.inf, None, None)]  # fmt: skip
    for step in steps:
        path = step.write(tmp_path / "new")
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first["rows"] == [4, 7]
    assert (first["loss"], second["grad_norm"]) == ("nan", "inf")
    assert str(steps[0]) == "step 3: the loss is nan; rows 7"
    assert str(steps[1]) == "step 9: the norm of the gradient is inf"


def test_suspects_are_the_rows_of_what_is_not_finite_or_the_largest():
    assert suspects([(0, [1, 2], 0.5), (0, [3], math.nan), (1, [4], math.inf)]) == {0: [3], 1: [4]}
    assert suspects([(0, [1, 2], 0.5), (1, [3, 0], 2.0)]) == {1: [0, 3]}
    assert suspects([]) == {}


def test_the_process_is_named_where_there_are_several():
    step = BadStep(3, "the loss is nan", "skip", math.nan, 1.5, [4, 7], [7], {1: [7]})
    assert str(step) == "step 3: the loss is nan; rows 7 in process 1"
    assert str(replace(step, processes={0: [7]})) == "step 3: the loss is nan; rows 7"
